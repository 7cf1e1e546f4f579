"""The `ceca` command: one subcommand per stage, each the same as `python jobs/<stage>.py`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

COMMANDS = {
    "open": "from a folder of pictures to a search page",
    "demo": "draw pedestrians and take them through every stage",
    "draw": "draw a synthetic benchmark in a published layout",
    "pipeline": "every stage from ingest to index",
    "ingest": "a folder, table, tar files or published layout → tables images and captions",
    "dialogue": "ask a multimodal model about every image → table dialogues",
    "train": "train a model",
    "compare": "train several methods, several seeds each, and print their table",
    "evaluate": "retrieval metrics of a model on a split",
    "index": "embed images → table gallery",
    "remove": "take images or people out of search",
    "gc": "versions that nothing names any more: what would go, and with --apply goes",
    "search": "find a person from a description, in this shell",
    "weights": "import checkpoints of other programs, export the CLIP part to open_clip",
    "push": "a model to the Hugging Face hub, with a model card",
    "export": "evaluations as TREC files, images as WebDataset tar files",
    "report": "figures and tables of a dataset and its models",
    "serve": "the search service with its page",
    "cluster": "a Ray cluster of several nodes on this machine: up, status, down",
}
# Packages that an extra of the package brings: `pip install ceca` alone searches, and runs no stage.
BROUGHT = {"ray": "cluster", "deepspeed": "cluster", "transformers": "cluster", "psutil": "cluster", "fastapi": "serve"}
PROGRAMS = {"serve": "serve", "cluster": "cluster.local"}  # started as programs: jobs import neither


def main() -> None:
    try:
        _main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # as in `ceca --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: ceca COMMAND [OPTIONS]    (ceca COMMAND --help lists a command's options)\n")
        for name, purpose in COMMANDS.items():
            print(f"  {name:<10} {purpose}")
        return
    name, *rest = map(_at_home, arguments)
    if name not in COMMANDS:
        print(f"error: no command {name!r}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    if name in PROGRAMS:
        if importlib.util.find_spec("ray") is None:
            print(f"error: `ceca {name}` needs ray: pip install 'ceca[serve,cluster]'", file=sys.stderr)
            sys.exit(2)
        os.execv(sys.executable, [sys.executable, "-m", PROGRAMS[name], *rest])
    from jobs.runtime.console import entry

    entry(lambda: _run(name, rest))


def _run(name: str, arguments: list[str]) -> None:
    try:
        importlib.import_module(f"jobs.{name}").main(arguments)
    except ModuleNotFoundError as error:
        extra = BROUGHT.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        from ceca.errors import UserError

        raise UserError(f"`ceca {name}` needs {error.name}: pip install 'ceca[{extra}]'") from None


def _at_home(argument: str) -> str:
    """Replace `~` in `--picture=~/x.png` by the home folder; a shell does that only at the start of a word."""
    option, _, value = argument.partition("=")
    return f"{option}={os.path.expanduser(value)}" if option.startswith("--") and value.startswith("~") else argument


if __name__ == "__main__":
    main()
