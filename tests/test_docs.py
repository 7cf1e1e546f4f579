"""The docs are true: links, commands, options, names and citations in them exist. Nothing here starts Ray."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ceca.commandline import parse_arguments
from ceca.config import STAGES
from ceca.data.store import Store
from ceca.environment import VARIABLES
from jobs.cli import COMMANDS
from tests.conftest import REPOSITORY

DOCS = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md")
    for path in REPOSITORY.glob(pattern)
)
# Pages about this code alone, in which every option, path and dotted name must exist.
USE = [f"docs/{name}.md" for name in ("stages", "dialogues", "training", "evaluation", "gallery", "results")]
PAGES = [*USE, "docs/architecture.md", "docs/design.md", "docs/environment.md", "docs/method.md", "CONTRIBUTING.md"]

HERE = "tests/test_docs.py"
METHODS = "tests/jobs/test_methods.py"
JOBS = "tests/jobs/test_stages.py"
PIPELINE = "tests/drills/test_pipeline.py"
FOREIGN = "tests/ceca/model/test_foreign.py"
AUTOSCALING = "tests/drills/test_autoscaling.py"
START = "tests/serve/test_start.py"
DEPLOY = "tests/serve/test_deploy.py"

# A command in the docs → the test that runs it, with other data. The longest head that fits counts.
RUN_BY = {
    "ceca open": (
        "tests/jobs/test_open.py",
        "test_a_folder_becomes_a_gallery_and_the_same_command_adds_what_is_new",
    ),
    "ceca draw": (HERE, "test_draw_makes_a_dataset_that_ingest_can_read"),
    "ceca ingest": ("tests/jobs/test_stages.py", "test_ingest_keeps_images_as_they_came_and_every_caption"),
    "ceca dialogue": (JOBS, "test_vllm_holds_all_six_turns_about_every_image"),
    "ceca train": (PIPELINE, "test_the_model_is_published_with_its_record"),
    "ceca evaluate": (PIPELINE, "test_evaluation_compares_every_similarity_with_chance"),
    "ceca index": ("tests/drills/test_index.py", "test_index_killed_and_started_again_ends_with_the_same_table"),
    "ceca search": (HERE, "test_search_prints_its_hits_and_draws_them"),
    "ceca compare": (METHODS, "test_every_method_trains_from_its_recipe_and_one_command_prints_the_table"),
    "ceca pipeline": (AUTOSCALING, "test_the_result_is_that_of_one_machine"),
    "ceca remove": (
        "tests/ceca/data/test_remove_command.py",
        "test_the_command_erases_and_finishes_what_was_interrupted",
    ),
    "ceca gc": (
        "tests/ceca/data/test_garbage.py",
        "test_the_command_says_what_would_go_and_removes_it_on_demand",
    ),
    "ceca report dialogues": (JOBS, "test_the_report_shows_images_of_different_people_with_caption_and_summary"),
    "ceca report training": (METHODS, "test_every_method_trains_from_its_recipe_and_one_command_prints_the_table"),
    "ceca report omega": (PIPELINE, "test_the_omega_curve_has_the_figures_of_an_evaluation_and_a_picture"),
    "ceca report confidence": (PIPELINE, "test_the_picture_of_confidence_has_the_open_set_figures_of_an_evaluation"),
    "ceca report ranked": (PIPELINE, "test_ranked_lists_of_a_report_are_those_of_a_search"),
    "ceca report significance": (
        PIPELINE,
        "test_a_model_does_not_differ_from_itself_and_one_that_was_not_evaluated_is_named",
    ),
    "ceca report attributes": (PIPELINE, "test_wrong_first_places_differ_from_the_person_in_some_attribute"),
    "ceca report statistics": (PIPELINE, "test_the_report_is_one_page_whose_pictures_a_browser_shows"),
    "ceca report page": (PIPELINE, "test_the_report_is_one_page_whose_pictures_a_browser_shows"),
    "ceca weights import": (FOREIGN, "test_an_imported_model_is_published_and_its_clip_part_loads_into_open_clip"),
    "ceca weights export": (FOREIGN, "test_an_imported_model_is_published_and_its_clip_part_loads_into_open_clip"),
    "ceca push": ("tests/ceca/model/test_hub.py", "test_a_model_goes_to_the_hub_and_comes_back"),
    "ceca export trec": ("tests/jobs/test_export.py", "test_a_run_and_its_qrels_give_the_figures_of_the_evaluation"),
    "ceca export huggingface": (
        "tests/jobs/test_export.py",
        "test_parquet_files_for_hugging_face_hold_what_is_known_and_are_read_again",
    ),
    "ceca export lance": ("tests/jobs/test_export.py", "test_a_lance_dataset_holds_what_is_known_and_is_read_again"),
    "ceca export webdataset": (
        "tests/jobs/test_export.py",
        "test_tar_files_hold_what_is_known_and_are_read_again",
    ),
    "ceca serve": (START, "test_command_serves_until_it_is_interrupted"),
    "make demo": ("tests/drills/test_demo.py", "test_the_demo_ends_in_a_table_and_answered_searches"),
    "make serve": (START, "test_command_serves_until_it_is_interrupted"),
    "pip install": ("tests/test_package.py", "test_the_library_searches_embeds_and_asks_a_service_without_ray"),
    "python -m cluster.object_store": (HERE, "test_the_object_store_prints_what_finds_it"),
    "python -m serve.access": ("tests/serve/test_access.py", "test_the_command_makes_a_key_that_its_entry_admits"),
    "python -m pytest": (HERE, "test_every_command_is_run_by_a_test_or_says_what_it_needs"),
    "ray job submit": (AUTOSCALING, "test_nodes_come_for_the_work_and_go_when_it_is_done"),
    "serve deploy": (DEPLOY, "test_serve_deploy_starts_the_service_and_changes_it_while_it_is_asked"),
    "curl": ("tests/serve/test_client.py", "test_every_example_of_the_guide_works_as_it_is_written"),
}
# A command, or all commands of a page → what it needs that tests do not have.
NEEDS_MORE = {
    "docs/aws.md": "an AWS account, a container engine and GPUs",
    "docs/kubernetes.md": "a Kubernetes cluster with the operator and GPUs",
    "make install LOCK=requirements/gpu.txt": "a machine with a GPU",
    "python benchmarks/gpu.py": "a machine with a GPU",
    "make long": "time that CI does not have; it runs tests only",
    "make lock": "a package index; it writes the locks",
}
SHELL = {"source", "export", "cd", "mkdir", "rm"}  # of every shell


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)


# --- README -----------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    text = read("README.md")
    assert len(text.splitlines()) <= 130
    items = re.split(r"\n\s*\n|\n(?=- )", without_code(text))
    paragraphs = [item for item in items if not item.lstrip().startswith("|")]
    assert {paragraph: len(paragraph) for paragraph in paragraphs if len(paragraph) > 400} == {}


def test_the_readme_shows_the_demos_results_as_the_results_page_has_them():
    def rows(text: str) -> list[list[str]]:
        lines = re.findall(r"^\| (.+) \|$", text.replace("**", ""), re.MULTILINE)
        return [line.split(" | ") for line in lines if re.search(r"\d+\.\d\d", line)]

    shown = rows(read("README.md"))
    complete = rows(read("docs/results.md").partition("## Methods compared")[0])
    assert len(shown) == 3
    for label, *figures in shown:
        name = label.partition(",")[0]
        assert [row for row in complete if row[0].startswith(name) and row[1 : 1 + len(figures)] == figures], label


# --- links ------------------------------------------------------------------------------------------------


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", DOCS)
def test_every_relative_link_leads_somewhere(page):
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(read(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, part = target.partition("#")
        file = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        if not file.exists() or (part and part not in map(anchor, headings(file.read_text(encoding="utf-8")))):
            missing.append(target)
    assert not missing


def test_the_index_names_every_page():
    linked = set(re.findall(r"\]\((\w+\.md)\)", read("docs/index.md")))
    assert linked == {path.name for path in (REPOSITORY / "docs").glob("*.md")} - {"index.md"}


# --- commands ---------------------------------------------------------------------------------------------


def shell_blocks(page: str) -> list[str]:
    """The shell blocks of a page, but for those that a guide's own test runs as they are written."""
    text = read(page)
    if page == "docs/cluster.md":
        text = text.partition("\n## ")[2]  # tests/drills/test_guide.py runs what comes before
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    if page == "docs/service.md":
        blocks = [block for block in blocks if not block.startswith("curl")]  # tests/serve/test_client.py
    return blocks


def commands(block: str) -> Iterator[list[str]]:
    """The commands of a shell block as words, without comments, assignments and what every shell has."""
    for line in block.replace("\\\n", " ").splitlines():
        with contextlib.suppress(ValueError):  # a loop or a quote over several lines, in guides that need more
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words and words[0] not in SHELL:
                yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def head(words: list[str]) -> str:
    """The longest head of a command that is listed; empty where none is."""
    heads = (" ".join(words[:length]) for length in range(len(words), 0, -1))
    return next((name for name in heads if name in RUN_BY or name in NEEDS_MORE or name in targets_of_ci()), "")


@functools.cache
def targets_of_ci() -> set[str]:
    """`make TARGET` for every target that CI runs, those that another one needs included."""
    needs = {
        name: set(others.split()) for name, others in re.findall(r"^(\w+):([\w ]*)##", read("Makefile"), re.MULTILINE)
    }
    open_targets = re.findall(r"make (\w+)", read(".ci/run"))
    run: set[str] = set()
    while open_targets:
        name = open_targets.pop()
        run.add(name)
        open_targets += needs.get(name, set()) - run
    return {f"make {name}" for name in run}


@pytest.mark.parametrize("page", [page for page in DOCS if page not in NEEDS_MORE])
def test_every_command_is_run_by_a_test_or_says_what_it_needs(page):
    unknown = [" ".join(words) for block in shell_blocks(page) for words in commands(block) if not head(words)]
    assert not unknown


def test_the_list_of_commands_names_tests_and_commands_that_exist():
    for command, (file, name) in RUN_BY.items():
        assert re.search(rf"^def {name}\(", read(file), re.MULTILINE), command
    words = [words for page in DOCS for block in shell_blocks(page) for words in commands(block)]
    used = {head(one) for one in words} | set(DOCS)
    assert NEEDS_MORE.keys() <= used
    targets = set(re.findall(r"^(\w+):.*##", read("Makefile"), re.MULTILINE))
    assert {one[1] for one in words if one[0] == "make"} <= targets


@functools.cache
def help_of(*command: str) -> str:
    """What `ceca COMMAND … --help` prints."""
    name, *rest = command
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        patch.setenv("COLUMNS", "200")
        if name in STAGES:
            parse_arguments(name, ["--help"])
        else:
            module = "cluster.local" if name == "cluster" else f"jobs.{name}"
            importlib.import_module(module).main([*rest, "--help"])
    return printed.getvalue()


def options_of(*command: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*", help_of(*command)))


def ceca_commands(page: str) -> Iterator[list[str]]:
    """Words behind `ceca` of every command of a page, in blocks and in the text; `python jobs/STAGE.py` is one too."""
    text = read(page)
    pieces = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    pieces += re.findall(r"`(ceca [^`]+)`", without_code(text))
    for piece in pieces:
        for line in re.sub(r"python jobs/(\w+)\.py", r"ceca \1", piece.replace("\\\n", " ")).splitlines():
            for start in re.finditer(r"(?:^|[|;] |-- )ceca (?=[a-z])", line):
                yield shlex.split(line[start.end() :], comments=True)


SUBCOMMANDS = ("report", "weights", "export", "cluster")


@pytest.mark.parametrize("page", DOCS)
def test_every_option_of_a_command_exists(page):
    unknown = []
    for words in ceca_commands(page):
        assert words[0] in COMMANDS, words
        deep = words[0] in SUBCOMMANDS and len(words) > 1
        known = options_of(*words[: 2 if deep else 1])
        unknown += [(words[0], word) for word in words if re.match(r"--[a-z]", word) and word not in known]
    assert not unknown


@pytest.mark.parametrize("page", USE)
def test_every_option_in_the_text_is_one_of_some_command(page):
    known = set().union(
        *(options_of(name) for name in [*STAGES, "open", "pipeline", "compare", "remove", "gc", "search"])
    )
    known |= options_of("report", "omega")
    known |= options_of("export", "trec") | options_of("export", "webdataset") | {"--help"}
    spans = [span for span in re.findall(r"`([^`]+)`", without_code(read(page))) if span.startswith("--")]
    assert not {option for span in spans for option in re.findall(r"--[a-z][a-z0-9.-]*", span)} - known


# --- names ------------------------------------------------------------------------------------------------


def defined(name: str) -> bool:
    """Whether a dotted name is a module of ours, or a class, function or method in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        place = REPOSITORY.joinpath(*parts[:length])
        if place.with_suffix(".py").is_file():
            body = ast.parse(place.with_suffix(".py").read_text()).body
            for part in parts[length:]:
                inner = [getattr(node, "body", None) for node in body if getattr(node, "name", None) == part]
                if not inner:
                    return False
                body = inner[0] or []
            return True
    return REPOSITORY.joinpath(*parts).is_dir()


@pytest.mark.parametrize("page", PAGES)
def test_every_module_function_and_file_that_a_page_names_exists(page):
    spans = set(re.findall(r"`([^`\n]+)`", without_code(read(page))))
    names = {span for span in spans if re.fullmatch(r"(ceca|jobs|serve|cluster|tests|benchmarks)(\.\w+)+", span)}
    assert not {name for name in names if not defined(name)}
    paths = {span for span in spans if re.fullmatch(r"(ceca|jobs|serve|cluster|tests|benchmarks)/[\w./-]*", span)}
    assert not {path for path in paths if not (REPOSITORY / path).exists()}


def test_the_design_names_every_module():
    layout = read("docs/design.md").partition("\n## Layout\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([\w/]+)`", layout))
    modules = [
        path.relative_to(REPOSITORY)
        for package in ("ceca", "jobs", "serve", "cluster")
        for path in (REPOSITORY / package).rglob("*.py")
    ]
    unnamed = [
        path.as_posix()
        for path in modules
        if not path.stem.startswith("__")
        and "drawn" not in path.parts
        and path.stem not in named
        # Stages are listed once, for all of them.
        and not (path.parent == Path("jobs") and path.stem in COMMANDS)
    ]
    assert not unnamed


def test_every_cited_part_of_the_method_is_there():
    page = read("docs/method.md")
    there = {*headings(page), *re.findall(r"^(?:- )?\*\*([^*]+?)\.?\*\*", page, re.MULTILINE)}
    files = [path for package in ("ceca", "jobs", "benchmarks") for path in (REPOSITORY / package).rglob("*.*")]
    cited = [
        (file.relative_to(REPOSITORY).as_posix(), name.strip())
        for file in files
        if file.suffix in (".py", ".yaml")
        for names in re.findall(r"\(method: ([A-Z][^)]*)\)", " ".join(file.read_text().split()))
        for name in names.split(",")
    ]
    assert len(cited) >= 14
    assert not [citation for citation in cited if citation[1] not in there]


def test_the_environment_page_has_every_variable_with_its_default():
    table = read("docs/environment.md").partition("## Of this project")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` (\|.*\|)$", table, re.MULTILINE))
    assert rows.keys() == VARIABLES.keys()
    for name, meaning in VARIABLES.items():
        for default in re.findall(r"Default: (\S+)\.(?:\s|$)", meaning):
            assert f"`{default}`" in rows[name], name


def test_contributing_lists_the_tests_that_ci_has_no_time_for():
    marked = set()
    for file in (REPOSITORY / "tests").rglob("test_*.py"):
        tree = ast.parse(file.read_text())
        everything = any(
            isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node) and "mark.long" in ast.unparse(node)
            for node in tree.body
        )
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            if everything or any("mark.long" in ast.unparse(decorator) for decorator in node.decorator_list):
                marked.add(f"{file.relative_to(REPOSITORY).as_posix()}::{node.name}")
    section = read("CONTRIBUTING.md").partition("## Tests that CI has no time for")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(tests/[^`]+)`", section, re.MULTILINE)) == marked


# --- the files beside the docs ----------------------------------------------------------------------------


def test_pre_commit_runs_what_make_lint_runs():
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", read("Makefile"), re.MULTILINE)
    assert recipe is not None
    lines = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    assert [hook["entry"] for hook in repository["hooks"]] == lines


def test_version_and_types_are_published():
    project = tomllib.loads(read("pyproject.toml"))
    version = project["project"]["version"]
    citation = yaml.safe_load(read("CITATION.cff"))
    assert (citation["version"], citation["license"]) == (version, project["project"]["license"])
    assert f"## [{version}]" in read("CHANGELOG.md")
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["ceca"]
    assert (REPOSITORY / "ceca" / "py.typed").exists()


# --- commands that no other test runs ---------------------------------------------------------------------


def test_draw_makes_a_dataset_that_ingest_can_read(tmp_path):
    from ceca.datasets.layouts import read_annotations

    recipe = tmp_path / "few.yaml"
    recipe.write_text("draw: {identities: 8, images_per_identity: 1, split_identities: [6, 1, 1], workers: 1}\n")
    command = [sys.executable, "-m", "jobs.cli", "draw", "--data", str(tmp_path / "drawn"), "--recipe", str(recipe)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    annotations = read_annotations(str(tmp_path / "drawn"))
    assert (annotations.layout.name, len(annotations.records)) == ("cuhk_pedes", 8)


def test_search_prints_its_hits_and_draws_them(tmp_path, monkeypatch, capsys):
    from jobs.search import main
    from tests.serve.dataset import QUERY, publish_gallery, publish_people, publish_tiny

    monkeypatch.setenv("CECA_CACHE", str(tmp_path / "cache"))
    store = Store(str(tmp_path / "data"))
    publish_people(store, 9)
    publish_gallery(store, *publish_tiny(store, "tiny", seed=0), "tiny")
    picture = tmp_path / "answer.png"
    main([QUERY, "--data", store.uri, "--top-k", "3", "--where", "camera=c1,c2", "--picture", str(picture)])
    assert len(re.findall(r"\d{4}\.jpg", capsys.readouterr().err)) == 3
    assert picture.stat().st_size > 5000


def test_the_object_store_prints_what_finds_it(tmp_path):
    from cluster.object_store import free_port

    command = [
        sys.executable,
        "-m",
        "cluster.object_store",
        "--folder",
        str(tmp_path / "s3"),
        "--port",
        str(free_port()),
    ]
    # A session of its own: ending that ends the server's process too.
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline().strip() for _ in range(4)]
        finally:
            os.killpg(process.pid, signal.SIGTERM)
    names = [line.removeprefix("export ").partition("=")[0] for line in lines]
    assert names == ["AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"]
