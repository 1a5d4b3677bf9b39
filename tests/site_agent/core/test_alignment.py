from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from site_agent.core.alignment import Rule, align, carry, take_up


def f32(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


THETA, SNAPSHOT, PUBLISHED = f32(-9, 1, 0.5), f32(-5, 2, 0.5), f32(-11, 4, 0)


@pytest.mark.parametrize(
    ("rule", "alpha", "wanted"),
    [
        ("overwrite", 0.5, [-11, 4, 0]),
        ("blend", 0.5, [-10, 2.5, 0.25]),
        ("blend", 0.25, [-10.5, 3.25, 0.125]),
        ("blend", 0.0, [-11, 4, 0]),
        ("blend", 1.0, [-9, 1, 0.5]),
        ("carry", 0.5, [-15, 3, 0]),
    ],
)
def test_each_rule_gives_its_definition(rule: Rule, alpha: float, wanted: list[float]) -> None:
    aligned = align(rule, THETA, SNAPSHOT, PUBLISHED, alpha)
    assert aligned.dtype == torch.float32
    assert aligned.tolist() == wanted


@pytest.mark.parametrize("rule", ["overwrite", "blend", "carry"])
def test_alignment_gives_a_new_vector_and_changes_none(rule: Rule) -> None:
    inputs = [THETA.clone(), SNAPSHOT.clone(), PUBLISHED.clone()]
    aligned = align(rule, *inputs, 0.5)
    assert not any(aligned.data_ptr() == each.data_ptr() for each in inputs)
    for before, after in zip([THETA, SNAPSHOT, PUBLISHED], inputs, strict=True):
        assert torch.equal(after, before)


@pytest.mark.parametrize("rule", ["overwrite", "carry"])
def test_without_steps_since_the_snapshot_the_new_version_is_taken_exactly(rule: Rule) -> None:
    published = f32(0.1, -3e38, 1e-45)
    assert torch.equal(align(rule, SNAPSHOT, SNAPSHOT, published, 0.5), published)


def test_after_a_refusal_everything_since_the_old_anchor_is_carried() -> None:
    old_anchor, theta, published = f32(1), f32(-9), f32(3)
    assert carry(theta, old_anchor, published).tolist() == [-7]  # 3 + (−9 − 1)
    # … so the next pseudo-gradient against the new anchor still holds all of the progress
    assert (published - carry(theta, old_anchor, published)).tolist() == (old_anchor - theta).tolist()


def test_blending_rounds_in_fp32() -> None:
    theta, published = f32(0.1), f32(0.7)
    wanted = np.float32(0.3) * theta.numpy() + np.float32(0.7) * published.numpy()
    assert align("blend", theta, theta, published, 0.3).numpy().tobytes() == wanted.tobytes()


def test_what_counts_as_progress_is_what_no_version_holds_yet() -> None:
    since, theta, published = f32(1), f32(-9), f32(3)
    assert take_up("align", theta, since, published, "blend", 0.5).tolist() == [-3]
    assert take_up("rebase", theta, since, published, "blend", 0.5).tolist() == [-7]
    assert take_up("overwrite", theta, None, published, "blend", 0.5).tolist() == [3]
    with pytest.raises(ValueError, match="leaves its snapshot"):
        take_up("align", theta, None, published, "carry", 0.5)
