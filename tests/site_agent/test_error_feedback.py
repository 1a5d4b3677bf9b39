"""What the upload codec lost goes with the next contribution, once."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.config import WireTable
from shared.fragments import Layout
from shared.wire import open_container
from site_agent.contribution import Address, Anchor, Parcel, encode
from site_agent.learner import Learner
from site_agent.news import Accepted

FRAGMENT = Layout.from_wire([[("w", [128])]]).fragments[0]
ANCHOR = Anchor(0, "0" * 32, 0, np.ones(128, np.float32))
LEFT = torch.full((128,), 0.5)


def sent(residual: Tensor | None, *, feedback: bool) -> tuple[Tensor, Tensor | None]:
    """(what the coordinator reads of a contribution of zeros, the feedback after it)"""
    parcel = Parcel(0, ANCHOR, torch.ones(128), residual, 10, 1)
    body, left = encode(parcel, Address("run", FRAGMENT), WireTable(upload="fp32", error_feedback=feedback), "site")
    with open_container(body, FRAGMENT) as opened:
        return torch.from_numpy(opened.decode()), left


@pytest.mark.parametrize("feedback", [True, False])
def test_what_was_lost_so_far_is_sent_whether_or_not_more_is_kept(feedback: bool) -> None:
    read, left = sent(LEFT, feedback=feedback)
    assert torch.equal(read, LEFT)
    assert (left is not None) == feedback


@pytest.mark.parametrize("left", [None, torch.zeros(128)])
def test_what_an_accepted_contribution_held_is_not_sent_again(left: Tensor | None) -> None:
    """Also where [wire] error_feedback was switched off since, and with a contribution whose encoding was another's."""
    learner = SimpleNamespace(core=Mock(), residuals={0: LEFT, 1: LEFT}, _clock=lambda: 0.0)
    Learner._take_in(learner, [Accepted(0, 1, left)])  # type: ignore[arg-type]
    assert learner.residuals.get(0) is left
    assert learner.residuals[1] is LEFT
