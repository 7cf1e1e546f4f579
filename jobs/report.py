"""Report: figures and tables of a dataset and its models.

ceca report page --data s3://bucket/cuhk
"""

from __future__ import annotations

from typing import Any

import tyro

from jobs.reports.figures import (
    report_attributes,
    report_confidence,
    report_dialogues,
    report_omega,
    report_ranked,
    report_significance,
    report_statistics,
    report_training,
)
from jobs.reports.page import report_page
from jobs.runtime.console import entry

KINDS: dict[str, Any] = {
    "dialogues": report_dialogues,
    "training": report_training,
    "omega": report_omega,
    "confidence": report_confidence,
    "significance": report_significance,
    "ranked": report_ranked,
    "attributes": report_attributes,
    "statistics": report_statistics,
    "page": report_page,
}


def main(argv: list[str] | None = None) -> None:
    tyro.extras.subcommand_cli_from_dict(
        KINDS, args=argv, prog="ceca report", description="Figures and tables of a dataset."
    )


if __name__ == "__main__":
    entry(main)
