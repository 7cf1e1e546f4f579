"""Who imports whom. The table is the rule; a new arrow is a new line here, with a reason in the commit that adds it."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("ceca", "jobs", "serve", "cluster", "benchmarks")

# Room → what its modules may import of ours, besides modules of the same room. A room is a folder or a root module.
MAY_IMPORT = {
    "ceca.errors": set(),
    "ceca.environment": {"ceca.errors"},
    "ceca.machines": set(),
    "ceca.settings": {"ceca.errors"},
    "ceca.config": {"ceca.errors", "ceca.settings"},
    "ceca.commandline": {"ceca.errors", "ceca.settings", "ceca.config"},
    "ceca.losses": set(),
    "ceca.metrics": {"ceca.search.feedback"},
    "ceca.data": {"ceca.errors", "ceca.environment"},
    "ceca.datasets": {"ceca.errors", "ceca.data"},
    "ceca.dialogue": {"ceca.errors", "ceca.environment", "ceca.settings", "ceca.config", "ceca.data", "ceca.datasets"},
    "ceca.model": {"ceca.errors", "ceca.environment", "ceca.settings", "ceca.config", "ceca.data"},
    "ceca.training": {
        *("ceca.errors", "ceca.environment", "ceca.settings", "ceca.config", "ceca.data", "ceca.model"),
        "ceca.losses",
    },
    "ceca.search": {"ceca.errors", "ceca.environment", "ceca.data", "ceca.model", "ceca.datasets.images"},
    "ceca.evaluation": {
        *("ceca.errors", "ceca.environment", "ceca.settings", "ceca.config", "ceca.data", "ceca.model", "ceca.search"),
        "ceca.metrics",
    },
    "ceca.report": {"ceca.errors"},
    "ceca.people": {"ceca.errors", "ceca.data", "ceca.datasets.images", "ceca.model", "ceca.search"},
    "jobs": {"ceca"},
    "serve": {"ceca"},
    "cluster": set(),
    "benchmarks": {"ceca", "jobs", "serve", "cluster"},
}
NO_RAY = "ceca"


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in PACKAGES:
        for file in sorted((REPOSITORY / package).rglob("*.py")):
            parts = file.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(source: str) -> set[str]:
    """Modules that a source imports, also inside functions and through importlib; `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module" and node.args:
            found.add(ast.unparse(node.args[0]).lstrip("f").strip("'\""))
    return found


def room(module: str) -> str:
    """The room a module is in."""
    fitting = [name for name in MAY_IMPORT if module == name or module.startswith(f"{name}.")]
    return max(fitting, key=len, default=module)


def within(module: str, place: str) -> bool:
    return module == place or module.startswith(f"{place}.")


MODULES = modules()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_room_may(module):
    own = room(module)
    ours = {name for name in imported(MODULES[module].read_text()) if name.split(".")[0] in PACKAGES}
    wrong = {
        name
        for name in ours
        if not within(name, own)
        and name != "ceca"
        and not any(within(name, place) for place in MAY_IMPORT.get(own, ()))
    }
    # `from ceca import schema` names the package and a module of it: only the latter counts.
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


def test_the_library_imports_no_ray():
    for module, file in MODULES.items():
        if within(module, NO_RAY):
            assert not any(within(name, "ray") for name in imported(file.read_text())), module


def loaded_with(module: str, found: set[str]) -> set[str]:
    """All modules that are loaded with one of ours: what it imports outside functions and not for types alone."""
    found.add(module)
    if module in MODULES:
        body = ast.parse(MODULES[module].read_text()).body
        at_once = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        for name in imported("\n".join(map(ast.unparse, at_once))) - found:
            loaded_with(name, found)
    return found


@pytest.mark.parametrize("module", ["serve.ingress", "serve.judge", "serve.intake", "serve.describer"])
def test_replicas_that_compute_no_embedding_load_no_torch(module):
    """It takes 400 MB and the larger part of a replica's start."""
    found = loaded_with(module, set())
    assert "ceca.search.facets" in found or module not in ("serve.ingress", "serve.judge")
    assert not any(within(name, "torch") for name in found)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_has_a_circle(package):
    graph = {
        module: {name for name in imported(file.read_text()) if name in MODULES and name != module}
        for module, file in MODULES.items()
        if within(module, package)
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_the_root_of_the_library_has_at_most_ten_modules():
    assert len(list((REPOSITORY / "ceca").glob("*.py"))) <= 10


def test_the_check_sees_imports_wherever_they_stand():
    assert imported("def f():\n    import ray.data\n") == {"ray.data"}
    assert imported("from jobs.train import train") == {"jobs.train", "jobs.train.train"}
    assert "jobs.{name}" in imported("import importlib\nimportlib.import_module(f'jobs.{name}')")
    assert room("ceca.search.gallery") == "ceca.search"
