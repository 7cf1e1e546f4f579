"""cluster/Dockerfile without a container engine: a linter, and that its steps are those of locks and Makefile."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.metadata
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.conftest import REPOSITORY

FILE = REPOSITORY / "cluster" / "Dockerfile"
LOCKS = ("requirements/cpu-image.txt", "requirements/gpu.txt")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def instructions() -> list[tuple[str, str]]:
    """Every instruction of the file and what follows it, lines that continue joined."""
    lines = [line for line in FILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1].strip()) for line in joined.splitlines() if line.strip()]


def of(kind: str) -> list[str]:
    return [rest for name, rest in instructions() if name == kind]


def position(kind: str, words: str) -> int:
    (index,) = [at for at, (name, rest) in enumerate(instructions()) if name == kind and words in rest]
    return index


def settings() -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in of("ENV") for pair in shlex.split(rest))


def locked(lock: str) -> dict[str, str]:
    """Packages of a lock with their `==1.2.3`."""
    lines = [line.split("#")[0].strip() for line in (REPOSITORY / lock).read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line and not line.startswith("--")]
    return {requirement.name: str(requirement.specifier) for requirement in requirements}


# --- the linter -------------------------------------------------------------------------------------------


def lint(text: str) -> subprocess.CompletedProcess[str]:
    command = [f"{Path(sys.executable).parent}/hadolint", "--no-color", "--failure-threshold=style", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def test_the_linter_finds_nothing() -> None:
    done = lint(FILE.read_text())
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("before", "after", "rule"),
    [
        (r"python:3\S+", "python:latest", "DL3007"),  # any Python
        (r"--no-cache-dir ", "", "DL3042"),  # pip's cache in a layer
        (r"\\\n +&& rm -rf \S+", "", "DL3009"),  # apt's lists in a layer
        (r"USER 1000:1000", "USER root", "DL3002"),
        (r"# hadolint ignore=DL3008\n", "", "DL3008"),  # the one rule that is not followed, with its reason
    ],
)
def test_the_linter_would_find(before: str, after: str, rule: str) -> None:
    changed = re.sub(before, after, FILE.read_text())
    assert changed != FILE.read_text()
    assert rule in lint(changed).stdout


# --- the same environment as `make install` ----------------------------------------------------------------


def test_the_base_is_the_project_s_python_by_an_exact_version() -> None:
    (base,) = of("FROM")
    version = re.fullmatch(r"python:(3\.\d+)\.\d+-slim-bookworm(@sha256:[0-9a-f]{64})?", base)
    assert version
    assert version[1] in SpecifierSet(PROJECT["project"]["requires-python"])
    assert str(tuple(map(int, version[1].split(".")))) in (REPOSITORY / "Makefile").read_text()
    assert f"/python{version[1]}/" in settings()["PATH"]


def test_what_is_installed_is_installed_as_make_does() -> None:
    makefile = re.findall(r"\t\$\(BIN\)/pip install (.*)", (REPOSITORY / "Makefile").read_text())  # without TOOLS
    image = [words for rest in of("RUN") for words in re.findall(r"pip install (.*?)(?: && |$)", rest)]
    same = [words.replace("--no-cache-dir ", "").replace('"${LOCK}"', "$(LOCK)").split() for words in image]
    assert same == [words.split() for words in makefile]


def test_both_images_are_of_a_lock_that_is_there() -> None:
    (default,) = of("ARG")
    other = re.findall(r"--build-arg (LOCK=\S+)", FILE.read_text())
    assert [default, *other] == [f"LOCK={lock}" for lock in LOCKS]


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_what_the_image_needs(lock: str) -> None:
    versions = locked(lock)
    if "gpu" in lock:
        assert versions["torch"].startswith("==="), "two signs would let pip take a local build such as +cpu"
    assert "setuptools" in versions, "the code is installed without build isolation"
    assert "boto3" in versions, "the head starts machines with it"
    assert all(specifier.startswith("==") for specifier in versions.values())
    assert ("nvidia-cuda-nvcc" in versions) == ("gpu" in lock)
    if "gpu" in lock:  # where PATH looks for it
        assert versions["nvidia-cuda-nvcc"].startswith("==13.")
        assert "nvidia/cu13/bin" in settings()["PATH"]


@pytest.mark.parametrize("lock", LOCKS)
def test_an_image_holds_every_package_that_the_project_names(lock: str) -> None:
    extras = ("cluster", "serve", "watch", "vllm" if "gpu" in lock else "vllm-cpu")
    optional = PROJECT["project"]["optional-dependencies"]
    named = [*PROJECT["project"]["dependencies"], *(each for extra in extras for each in optional[extra])]
    held = {canonicalize_name(name): version for name, version in locked(lock).items()}
    for requirement in map(Requirement, named):
        version = held[canonicalize_name(requirement.name)].lstrip("=")
        assert requirement.specifier.contains(version), requirement


def test_the_workflow_builds_checks_pushes_and_signs_both_images() -> None:
    """It has not been run by a test: that needs a container engine."""
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "images.yaml").read_text())
    image, gpu = workflow["jobs"]["image"], workflow["jobs"]["gpu"]
    assert [each["lock"] for each in image["strategy"]["matrix"]["include"]] == list(LOCKS)
    steps = [step.get("name") for step in image["steps"] if "name" in step]
    named = ["base by digest", "build", "scan", "push", "sign"]
    assert [step for step in steps if step in named] == named
    assert "python benchmarks/gpu.py" in gpu["steps"][-1]["run"]
    assert let_through("benchmarks")
    assert (REPOSITORY / "benchmarks" / "gpu.py").is_file()


def test_the_workflow_builds_from_the_base_by_its_digest(tmp_path: Path) -> None:
    """Its own commands on a copy of the file; the digest is what a registry would say."""
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "images.yaml").read_text())
    (tmp_path / "cluster").mkdir()
    copied = Path(shutil.copy(FILE, tmp_path / "cluster"))
    lookup = next(step["run"] for step in workflow["jobs"]["base"]["steps"] if step.get("id") == "digest")
    write = next(step["run"] for step in workflow["jobs"]["image"]["steps"] if step.get("name") == "base by digest")

    def run(script: str) -> None:
        registry = f'docker() {{ test "$4" = "{of("FROM")[0]}" && echo sha256:{"0f" * 32}; }}'
        environment = {"PATH": "/usr/bin:/bin", "GITHUB_OUTPUT": "output"}
        subprocess.run(["bash", "-ec", f"{registry}\n{script}"], cwd=tmp_path, env=environment, check=True)

    run(lookup)
    base = (tmp_path / "output").read_text().strip().removeprefix("base=")
    run(write.replace("${{ needs.base.outputs.base }}", base))
    assert f"FROM {of('FROM')[0]}@sha256:{'0f' * 32}\n" in copied.read_text()
    assert lint(copied.read_text()).returncode == 0


@pytest.mark.parametrize("package", ["ray", "torch", "numpy", "pyarrow", "pydantic", "cloudpickle", "deepspeed"])
def test_head_and_workers_have_the_same(package: str) -> None:
    """The head has the image for CPUs, the others that for GPUs, and they send each other pickled work."""
    versions = {locked(lock)[package].lstrip("=").removesuffix("+cpu") for lock in LOCKS}
    assert len(versions) == 1


def tools() -> set[str]:
    """The packages that tests and checks ask for."""
    return {Requirement(line).name.lower() for line in PROJECT["project"]["optional-dependencies"]["dev"]}


@pytest.mark.parametrize("lock", [*LOCKS, "requirements/cpu.txt"])
def test_no_tool_of_tests_and_checks_is_in_what_runs(lock: str) -> None:
    assert {"pytest", "ruff", "playwright"} <= tools()
    assert not {name.lower() for name in locked(lock)} & tools()
    assert tools() <= {name.lower() for name in locked("requirements/dev.txt")}


def test_the_image_for_cpus_is_the_lock_for_cpus_without_cuda() -> None:
    lock, image = locked("requirements/cpu.txt"), locked(LOCKS[0])
    left_out = lock.keys() - image.keys()
    assert image == {name: found for name, found in image.items() if name in lock}
    assert all(re.match("nvidia-|cuda-|triton$", name) for name in left_out)
    assert not [name for name in image if re.match("nvidia-|cuda-|triton$", name)]
    other = {name for name, version in image.items() if version != lock[name]}
    assert other == {"torch", "torchvision", "torchaudio", "torchcodec"}
    assert all(image[name].lstrip("=") == lock[name].lstrip("=") + "+cpu" for name in other)


def test_the_image_for_cpus_is_2_5_gigabytes_smaller_than_with_cuda_and_tools() -> None:
    """By the files of the packages that it leaves out, as they are installed here; less than all may be here."""
    left_out = (locked("requirements/cpu.txt").keys() | locked("requirements/dev.txt").keys()) - locked(LOCKS[0]).keys()
    total = 0
    for name in left_out:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            files = importlib.metadata.distribution(name).files or ()
            total += sum(place.stat().st_size for file in files if (place := Path(str(file.locate()))).is_file())
    assert total > 2.5e9


def test_the_cluster_runs_these_images_of_this_version() -> None:
    built = set(re.findall(r"-t (\S+)", FILE.read_text()))
    cluster = yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())
    types = cluster["available_node_types"].values()
    used = {cluster["docker"]["image"], *(kind.get("docker", {}).get("worker_image") for kind in types)} - {None}
    assert built == used
    assert {image.rpartition("-")[2] for image in built} == {PROJECT["project"]["version"]}


# --- what is in it ----------------------------------------------------------------------------------------


def let_through(path: str) -> bool:
    """Whether .dockerignore leaves a file in: the last pattern that fits it or a folder above it decides."""
    parts = path.split("/")
    inside = True
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        names = parts if pattern.startswith("**/") else ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
        if any(fnmatch.fnmatchcase(name, pattern.removeprefix("**/")) for name in names):
            inside = line.startswith("!")
    return inside


def test_everything_that_is_copied_is_there() -> None:
    copied = of("COPY")
    assert copied == ["${LOCK} ${LOCK}", ". ."]
    for path in (*LOCKS, "pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]):
        assert (REPOSITORY / path).is_file()
        assert let_through(path)


def test_every_file_of_the_packages_is_in() -> None:
    packages = [name.removesuffix("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]]
    assert packages == ["ceca", "jobs", "serve", "cluster"]
    for package in packages:
        files = [
            path for path in (REPOSITORY / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ]
        left_out = [path for path in files if not let_through(path.relative_to(REPOSITORY).as_posix())]
        assert files
        assert not left_out


def test_the_code_is_installed_from_what_is_in(tmp_path: Path) -> None:
    """By pip's own step for `-e .` without build isolation, in a copy that has nothing else."""
    context, made = tmp_path / "context", tmp_path / "made"
    context.mkdir()
    made.mkdir()
    for path in REPOSITORY.iterdir():
        if path.is_dir() and let_through(path.name):
            shutil.copytree(path, context / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif let_through(path.name):
            shutil.copy(path, context)
    build = f"import setuptools.build_meta as backend; backend.build_editable({str(made)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=context, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = made.iterdir()
    assert wheel.name.startswith(f"ceca-{PROJECT['project']['version']}-")


@pytest.mark.parametrize(
    "path",
    [".git/config", ".venv/bin/python", "demo/data/manifest.json", "keys.yaml", ".env", "ceca/__pycache__/a.pyc"],
)
def test_what_lies_around_is_not(path: str) -> None:
    assert not let_through(path)


def test_a_change_of_the_code_does_not_install_the_environment_again() -> None:
    assert position("COPY", "${LOCK}") < position("RUN", "-r ") < position("COPY", ". .")
    after = instructions()[position("COPY", ". .") :]
    assert [kind for kind, _ in after] == ["COPY", "RUN", "USER", "CMD"]


def test_nothing_runs_as_root() -> None:
    (user,) = of("USER")
    assert user == "1000:1000", "a number, so that Kubernetes can tell"
    assert "useradd --uid 1000 --create-home" in " ".join(of("RUN"))
    assert settings()["HOME"] == "/home/ray", "Ray reads it from the image before it mounts files below ~"


def test_how_nodes_trust_each_other_is_not_in_it() -> None:
    assert not [name for name in settings() if re.match("RAY_|AWS_|.*(KEY|TOKEN|SECRET)", name)]


def test_what_ray_runs_in_the_container_is_there() -> None:
    """Ray copies files in by rsync, the head starts workers by ssh, KubeRay's checks use wget; all by login shells."""
    (install,) = [rest for rest in of("RUN") if "apt-get install" in rest]
    assert {"rsync", "openssh-client", "wget", "g++", "libnuma1"} <= set(install.split())
    assert any(rest == 'echo "export PATH=$PATH" > /etc/profile.d/ceca.sh' for rest in of("RUN"))
    assert settings()["PATH"].split(":")[0] == "/opt/venv/bin"
    assert position("ENV", "PATH=") < position("RUN", "/etc/profile.d/")
