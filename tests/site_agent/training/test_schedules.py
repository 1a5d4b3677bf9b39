from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from site_agent.training.schedules import lr_factor

SCHEDULES = ("constant", "cosine", "wsd")


@pytest.mark.parametrize(
    ("schedule", "tokens", "wanted"),
    [
        # warm-up over 99 tokens, the same for all
        *((s, 0, 0.01) for s in SCHEDULES),
        *((s, 49, 0.5) for s in SCHEDULES),
        *((s, 98, 0.99) for s in SCHEDULES),
        *((s, 99, 1.0) for s in SCHEDULES),
        # 1000 tokens are left after it
        ("constant", 599, 1.0),
        ("constant", 1099, 1.0),
        ("constant", 10**9, 1.0),
        ("cosine", 349, 0.1 + 0.45 * (1 + 2**-0.5)),
        ("cosine", 599, 0.55),
        ("cosine", 849, 0.1 + 0.45 * (1 - 2**-0.5)),
        ("cosine", 1099, 0.1),
        ("cosine", 10**9, 0.1),
        ("wsd", 599, 1.0),
        ("wsd", 899, 1.0),
        ("wsd", 999, 0.5),
        ("wsd", 1049, 0.25),
        ("wsd", 1099, 0.0),
        ("wsd", 10**9, 0.0),
    ],
)
def test_each_schedule_is_at_its_definition(schedule: str, tokens: int, wanted: float) -> None:
    assert lr_factor(schedule, tokens, 1099, 99) == pytest.approx(wanted, abs=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_training_starts_at_the_peak(schedule: str) -> None:
    assert lr_factor(schedule, 0, 1000, 0) == 1.0  # type: ignore[arg-type]


@given(st.sampled_from(SCHEDULES), st.floats(0, 1e12), st.integers(1, 10**12), st.floats(0, 0.99))
def test_the_factor_is_always_a_share(schedule: str, tokens: float, budget: int, warm: float) -> None:
    factor = lr_factor(schedule, tokens, budget, int(budget * warm))  # type: ignore[arg-type]
    assert 0.0 <= factor <= 1.0


@given(st.sampled_from(SCHEDULES), st.integers(0, 3000), st.integers(0, 3000))
def test_after_the_warm_up_the_rate_never_rises(schedule: str, one: int, other: int) -> None:
    early, late = sorted((one + 100, other + 100))
    at = [lr_factor(schedule, tokens, 2000, 100) for tokens in (early, late)]  # type: ignore[arg-type]
    assert at[0] >= at[1] - 1e-12
