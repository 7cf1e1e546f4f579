"""The curve says where a loss stopped being a number."""

from __future__ import annotations

import pytest
import torch

from ceca.errors import UserError
from ceca.training.curve import Curve


def curve(*losses: float) -> Curve:
    made = Curve()
    for loss in losses:
        made.add({"tal_global": torch.tensor(1.0), "cawl": torch.tensor(loss)})
    return made


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_is_named_with_its_step_and_the_last_checkpoint(bad):
    with pytest.raises(UserError, match=r"from step 3 on \(cawl\); the last good checkpoint is of step 2"):
        curve(1.0, 2.0, bad, bad).require_numbers(4, kept=2)
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        curve(bad).require_numbers(4, kept=0)


def test_finite_losses_are_no_error():
    curve(1.0, 2.0, 3.0).require_numbers(2, kept=0)
    Curve().require_numbers(2, kept=0)
