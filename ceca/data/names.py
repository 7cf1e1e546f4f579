"""Names below a dataset's URI: the only module that knows the layout of the store.

<table>/manifest.json                  the current version of a table
<table>/<version>/manifest.json        every published version
<table>/<version>/part-00000-<8 hex digits of its SHA-256>.parquet   rows; without the digits in older datasets
<folder>/.turns/                       writers of the folder's manifest, see `ceca.data.replacing`
rejects/<stage>/                       a table of rows that a stage could not use
.work/<stage>/<version>/00000.json     receipts of finished units, until the stage is published
.work/listing/<version>/00000.jsonl    records of a unit of ingest, until it is published
.leases/<name>/<claim>.json            holders of names, see `ceca.data.lease`
models/<name>/<digest>/                published models
evaluations/<digest>/                  embeddings and figures of a model
recall/                                a table of what approximate search finds of the published gallery
verdicts/<engine>/                     a table of what an engine says about images, by a digest of its settings
comparisons/<recipe>.json              figures of a benchmark's methods and seeds
removed/, arrivals/, added/, failed/   changes of single images, see `ceca.data.changes`
"""

from __future__ import annotations

import re

MANIFEST = "manifest.json"
WORK = ".work"
LISTING = "listing"
LEASES = ".leases"
TURNS = ".turns"
MODELS = "models"
EVALUATIONS = "evaluations"
COMPARISONS = "comparisons"
VERDICTS = "verdicts"
RECALL = "recall"
REMOVED = "removed"
ARRIVALS = "arrivals"
ADDED = "added"
FAILED = "failed"

# A part's path below the dataset.
PART = re.compile(r"(?P<table>.+)/(?P<version>[^/]+)/(?P<stem>part-\d+)(-[0-9a-f]{8})?\.parquet")


def part_name(version: str, number: int, sha256: str) -> str:
    """Path of a part below its table.

    Args:
        version: the version that the part belongs to.
        number: number of the part.
        sha256: digest of the content.

    >>> part_name("0123456789ab", 7, "89abcdef01234567")
    '0123456789ab/part-00007-89abcdef.parquet'
    """
    return f"{version}/part-{number:05d}-{sha256[:8]}.parquet"


def rewritten_part_name(path: str, sha256: str) -> str:
    """Path of a part that was written again after an erasure.

    Args:
        path: the old part, below its table.
        sha256: digest of the new content.

    >>> rewritten_part_name("0123456789ab/part-00007-89abcdef.parquet", "0011223344556677")
    '0123456789ab/part-00007-00112233.parquet'
    """
    old = PART.fullmatch(f"table/{path}")
    assert old is not None, path
    return f"{old['version']}/{old['stem']}-{sha256[:8]}.parquet"


def receipt_name(unit: int) -> str:
    """Name of a unit's receipt, below `.work/<stage>/<version>`."""
    return f"{unit:05d}.json"


def listing_name(unit: int) -> str:
    """Name of a unit's records, below `.work/listing/<version>`; no receipt ends like it."""
    return f"{unit:05d}.jsonl"


def rejects_table(stage: str) -> str:
    """Name of the table of rows that a stage could not use."""
    return f"rejects/{stage}"
