"""Runs a notebook as Jupyter would, without Jupyter."""

from __future__ import annotations

import ast
import json
from pathlib import Path


def run_notebook(path: Path) -> list[str]:
    """What the last line of each cell shows, as HTML where it has that."""
    names: dict = {}
    shown = []
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            *lines, last = ast.parse("".join(cell["source"])).body
            exec(compile(ast.Module(lines, []), str(path), "exec"), names)
            value = eval(compile(ast.Expression(last.value), str(path), "eval"), names)
            shown.append(value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))
    return shown
