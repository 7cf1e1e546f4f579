"""Names below a dataset's URI: the only module that knows the layout of the store.

<table>/manifest.json                  the current version of a table
<table>/<version>/manifest.json        every published version
<table>/<version>/part-00000.parquet   rows; `-<8 hex digits>` after the number if rows were erased
rejects/<stage>/                       a table of rows that a stage could not use
.work/<stage>/<version>/00000.json     receipts of finished units, until the stage is published
.leases/<name>/<claim>.json            holders of names, see `ceca.data.lease`
models/<name>/<digest>/                published models
evaluations/<digest>/                  embeddings and figures of a model
comparisons/<recipe>.json              figures of a benchmark's methods and seeds
removed/, arrivals/, added/, failed/   changes of single images, see `ceca.data.changes`
"""

from __future__ import annotations

import re

MANIFEST = "manifest.json"
WORK = ".work"
LEASES = ".leases"
MODELS = "models"
EVALUATIONS = "evaluations"
COMPARISONS = "comparisons"
REMOVED = "removed"
ARRIVALS = "arrivals"
ADDED = "added"
FAILED = "failed"

# A part's path below the dataset.
PART = re.compile(r"(?P<table>.+)/(?P<version>[^/]+)/(?P<stem>part-\d+)(-[0-9a-f]{8})?\.parquet")


def part_name(version: str, number: int) -> str:
    """Path of a part below its table.

    >>> part_name("0123456789ab", 7)
    '0123456789ab/part-00007.parquet'
    """
    return f"{version}/part-{number:05d}.parquet"


def rewritten_part_name(version: str, stem: str, sha256: str) -> str:
    """Path of a part that was written again after an erasure.

    Args:
        version: the version that the part belonged to.
        stem: the old part's name without suffix and digest, e.g. `part-00007`.
        sha256: digest of the new content.
    """
    return f"{version}/{stem}-{sha256[:8]}.parquet"


def receipt_name(unit: int) -> str:
    """Name of a unit's receipt, below `.work/<stage>/<version>`."""
    return f"{unit:05d}.json"


def rejects_table(stage: str) -> str:
    """Name of the table of rows that a stage could not use."""
    return f"rejects/{stage}"
