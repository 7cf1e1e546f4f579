"""The `ceca` command: one subcommand per stage, each the same as `python jobs/<stage>.py`."""

from __future__ import annotations

import importlib
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
    "export": "evaluations as TREC files, images as WebDataset tar files",
    "report": "figures and tables of a dataset and its models",
    "serve": "the search service with its page",
    "cluster": "a Ray cluster of several nodes on this machine: up, status, down",
}
PROGRAMS = {"serve": "serve", "cluster": "cluster.local"}  # started as programs: jobs import neither


def main() -> None:
    arguments = sys.argv[1:]
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
        os.execv(sys.executable, [sys.executable, "-m", PROGRAMS[name], *rest])
    from jobs.runtime.console import entry

    entry(lambda: importlib.import_module(f"jobs.{name}").main(rest))


def _at_home(argument: str) -> str:
    """Replace `~` in `--picture=~/x.png` by the home folder; a shell does that only at the start of a word."""
    option, _, value = argument.partition("=")
    return f"{option}={os.path.expanduser(value)}" if option.startswith("--") and value.startswith("~") else argument


if __name__ == "__main__":
    main()
