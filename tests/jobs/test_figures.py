"""What a figure is drawn of, and what it cannot be drawn of."""

from __future__ import annotations

import pytest

from ceca.data.store import Store
from ceca.errors import UserError
from jobs.reports.figures import report_training
from tests.serve.dataset import publish_tiny


def test_a_model_that_was_not_trained_here_has_no_curve(tmp_path):
    publish_tiny(Store(str(tmp_path)), "imported", seed=1)
    with pytest.raises(UserError, match="'imported' was imported and not trained here"):
        report_training(str(tmp_path), ("imported",), tmp_path / "curve.png")
