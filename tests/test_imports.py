"""Who imports whom: `jobs → ceca`, `serve → ceca`, `cluster → nothing of ours`, and no Ray in the library."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
FORBIDDEN = {
    "ceca": {"ray", "jobs", "serve", "cluster"},
    "jobs": {"serve", "cluster"},
    "serve": {"jobs", "cluster"},
    "cluster": {"ceca", "jobs", "serve"},
}


def imported(source: str) -> set[str]:
    """Top-level packages that a module imports, also inside functions and through importlib."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module" and node.args:
            name = ast.unparse(node.args[0]).lstrip("f").strip("'\"")
            found.add(name.split(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_only_what_it_may(package):
    files = sorted((REPOSITORY / package).rglob("*.py"))
    assert files
    for file in files:
        wrong = imported(file.read_text()) & FORBIDDEN[package]
        assert not wrong, f"{file.relative_to(REPOSITORY)} imports {', '.join(sorted(wrong))}"


def test_the_check_sees_imports_wherever_they_stand():
    assert imported("def f():\n    import ray.data\n") == {"ray"}
    assert imported("from jobs.train import train") == {"jobs"}
    assert "jobs" in imported("import importlib\nimportlib.import_module(f'jobs.{name}')")
