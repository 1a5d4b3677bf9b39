"""When a round closes, in which order and with which weights it merges."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.rounds import (
    GRACE_FACTOR,
    SPARED,
    Contribution,
    Expected,
    OpenRound,
    Policy,
    Tempo,
    Weighting,
    closes_by,
    grace,
    reason_to_close,
    share,
    stalest,
    weights,
)

ALL = Policy(quorum=None, grace_seconds=0.0, deadline_seconds=600.0, max_staleness=8, weighting="tokens")
TWO = replace(ALL, quorum=2)
SPARE = 15.0 / SPARED
"""Of which a round takes 15 seconds."""


def contribution(site: str, base: int = 0, tokens: int = 10, steps: int = 1, id_: str = "") -> Contribution:
    return Contribution(id_ or f"{site}-{base}", site, 0, base, tokens, steps)


def collected(policy: Policy, *arrivals: tuple[str, float]) -> OpenRound:
    round_ = OpenRound()
    for site, at in arrivals:
        round_.add(contribution(site), policy, at)
    return round_


# ---- quorum "all"


@pytest.mark.parametrize(
    ("bound", "quorum", "sites", "versions"),
    [
        (5, 1, 100, 5),  # a number is taken as it is
        (0, None, 4, 0),
        (None, None, 100, 8),  # a cycle of everybody is one version
        (None, 1, 4, 32),
        (None, 1, 100, 800),
        (None, 3, 7, 24),
        (None, 5, 2, 8),  # most of them are away
        (None, None, 0, 8),
    ],
)
def test_the_bound_on_staleness_is_eight_cycles_however_many_versions_one_has(
    bound: int | None, quorum: int | None, sites: int, versions: int
) -> None:
    assert stalest(replace(ALL, max_staleness=bound, quorum=quorum), sites) == versions


@pytest.mark.parametrize(
    ("cycles", "quorum", "versions"),
    [
        ([10.0] * 4, 1, 32),
        ([1.0, 20.0], 1, 8 * 21),
        ([1.0, 2.0, 4.0, 8.0], 3, 8 * 5),
        ([1.0, 1e9], 1, 8 * 65),  # who is slower than that is refused rather than that memory is kept for ever
        ([1.0, 20.0], None, 8),
    ],
)
def test_a_cycle_is_that_of_the_slowest_site(cycles: list[float], quorum: int | None, versions: int) -> None:
    assert stalest(replace(ALL, max_staleness=None, quorum=quorum), len(cycles), cycles) == versions


def test_an_empty_round_never_closes() -> None:
    for policy in (ALL, TWO):
        assert reason_to_close(OpenRound(), [], {}, policy, 1e9) is None
        assert closes_by(OpenRound(), {}, policy) is None


def test_full_quorum_waits_for_every_site_that_trains() -> None:
    round_ = collected(ALL, ("a", 0.0))
    assert reason_to_close(round_, ["a", "b"], {}, ALL, 1.0) is None
    round_.add(contribution("b"), ALL, 2.0)
    assert reason_to_close(round_, ["a", "b"], {}, ALL, 2.0) == "complete"


def test_full_quorum_does_not_wait_for_sites_that_do_not_train() -> None:
    assert reason_to_close(collected(ALL, ("a", 0.0)), ["a"], {}, ALL, 0.0) == "complete"
    assert reason_to_close(collected(ALL, ("a", 0.0)), [], {}, ALL, 0.0) == "complete", "the one that sent has left"


def test_a_full_quorum_round_closes_at_its_deadline_with_whoever_is_there() -> None:
    round_ = collected(ALL, ("a", 100.0))
    assert closes_by(round_, {}, ALL) == 700.0
    assert reason_to_close(round_, ["a", "b"], {}, ALL, 699.9) is None
    assert reason_to_close(round_, ["a", "b"], {}, ALL, 700.0) == "deadline"


# ---- quorum K


def test_k_sites_close_a_round_after_the_stated_grace() -> None:
    policy = replace(TWO, grace_seconds=5.0)
    round_ = collected(policy, ("a", 0.0), ("b", 10.0))
    assert closes_by(round_, {}, policy) == 15.0
    assert reason_to_close(round_, ["a", "b", "c"], {}, policy, 14.9) is None
    assert reason_to_close(round_, ["a", "b", "c"], {}, policy, 15.0) == "quorum"


def test_grace_ends_early_once_everyone_is_in() -> None:
    policy = replace(TWO, grace_seconds=5.0)
    assert reason_to_close(collected(policy, ("a", 0.0), ("b", 10.0)), ["a", "b"], {}, policy, 10.0) == "complete"


def test_grace_does_not_outlast_the_deadline() -> None:
    policy = replace(TWO, grace_seconds=1e6)
    round_ = collected(policy, ("a", 0.0), ("b", 10.0))
    assert closes_by(round_, {}, policy) == 600.0
    assert reason_to_close(round_, ["a", "b", "c"], {}, policy, 600.0) == "deadline"


def test_a_round_below_k_stays_open_past_its_deadline_and_closes_with_the_kth() -> None:
    round_ = collected(TWO, ("a", 0.0))
    assert closes_by(round_, {}, TWO) is None
    assert reason_to_close(round_, ["a", "b"], {}, TWO, 1e6) is None
    round_.add(contribution("b"), TWO, 1e6)
    assert reason_to_close(round_, ["a", "b", "c"], {}, TWO, 1e6) == "deadline"


def test_two_contributions_of_one_site_are_no_quorum_of_two() -> None:
    round_ = OpenRound()
    round_.add(contribution("a", 0), TWO, 0.0)
    round_.add(contribution("a", 1), TWO, 1.0)
    assert round_.quorum_at is None
    assert reason_to_close(round_, ["a"], {}, TWO, 1e6) is None


def test_learners_of_one_site_are_no_quorum_of_two() -> None:
    round_ = collected(TWO, ("eu~fast", 0.0), ("eu~slow", 1.0))
    assert round_.quorum_at is None
    round_.add(contribution("us"), TWO, 2.0)
    assert round_.quorum_at == 2.0


# ---- the measured grace window

MEASURED = replace(TWO, grace_seconds=None)


def test_a_round_takes_part_of_what_its_own_sites_can_spare() -> None:
    """γ of it where nothing is known of who is missing (arXiv 2604.21428)."""
    round_ = collected(MEASURED, ("a", 100.0), ("b", 104.0))
    tempos = {"a": Tempo(overlap=30.0, sync=6.0), "b": Tempo(20.0, 2.0), "missing": Tempo(1.0, 0.5)}
    spare = min(100 + SPARED * 24.0, 104 + SPARED * 18.0) - 104
    assert grace(round_, tempos, MEASURED) == GRACE_FACTOR * spare
    assert closes_by(round_, tempos, MEASURED) == 104 + GRACE_FACTOR * spare


def test_a_site_whose_link_takes_all_that_it_has_is_no_measure() -> None:
    round_ = collected(MEASURED, ("a", 0.0), ("far", 0.0))
    tempos = {"a": Tempo(12.0, 2.0), "far": Tempo(10.0, 11.0)}
    assert grace(round_, tempos, MEASURED) == GRACE_FACTOR * SPARED * 10.0
    assert grace(round_, {"far": tempos["far"]}, MEASURED) == 0.0


def test_measured_grace_is_never_negative_and_zero_until_measured() -> None:
    round_ = collected(MEASURED, ("a", 0.0), ("b", 30.0))
    assert grace(round_, {"a": Tempo(overlap=10.0, sync=5.0)}, MEASURED) == 0.0
    assert grace(round_, {}, MEASURED) == 0.0
    assert reason_to_close(round_, ["a", "b", "c"], {}, MEASURED, 30.0) == "quorum"


@pytest.mark.parametrize(
    ("missing", "seconds"),
    [
        ([], 0.0),
        ([Expected(105.0, 110.0)], 10.0),
        ([Expected(114.0, 130.0)], 15.0),
        ([Expected(115.1, 130.0)], 0.0),
        ([Expected(80.0, 95.0)], 0.0),
        ([Expected(80.0, 102.0), Expected(105.0, 110.0), Expected(400.0, 500.0)], 10.0),
        ([Expected(101.0, 102.0), None], GRACE_FACTOR * 15.0),
    ],
    ids=["nobody", "expected", "at most what is spared", "too late", "overdue", "several", "unknown"],
)
def test_a_round_waits_for_those_it_can_expect_and_for_nobody_else(
    missing: list[Expected | None], seconds: float
) -> None:
    round_ = collected(MEASURED, ("a", 100.0), ("b", 100.0))
    tempos = {"a": Tempo(SPARE + 2.0, 2.0), "b": Tempo(SPARE + 2.0, 2.0)}
    assert grace(round_, tempos, MEASURED, missing) == pytest.approx(seconds)
    assert closes_by(round_, tempos, MEASURED, missing) == pytest.approx(100 + seconds)


# ---- order


@given(st.permutations(["asia", "eu", "us", "za"]))
def test_the_merge_order_is_that_of_site_names_whatever_the_arrival(arrival: list[str]) -> None:
    round_ = collected(ALL, *((site, float(at)) for at, site in enumerate(arrival)))
    assert [each.site for each in round_.ordered()] == ["asia", "eu", "us", "za"]


def test_contributions_of_one_site_merge_in_order_of_their_base() -> None:
    for order in itertools.permutations([("b", 0), ("a", 2), ("a", 1)]):
        round_ = OpenRound()
        for site, base in order:
            round_.add(contribution(site, base), ALL, 0.0)
        assert [(each.site, each.base_version) for each in round_.ordered()] == [("a", 1), ("a", 2), ("b", 0)]


# ---- weights


def weighed(sent: list[Contribution], weighting: Weighting, **policy: float) -> list[float]:
    return weights(sent, replace(ALL, weighting=weighting, **policy), version=1)


def test_uniform_weights_are_equal_whatever_the_tokens() -> None:
    assert weighed([contribution("a", tokens=1), contribution("b", tokens=99)], "uniform") == [0.5, 0.5]


def test_token_weights_are_in_proportion_to_tokens() -> None:
    assert weighed([contribution("a", tokens=1), contribution("b", tokens=2)], "tokens") == [
        1 / 3,
        2 / 3,
    ]


def test_the_weighted_mean_of_the_recipe_is_seven_thirds() -> None:
    one, three = weighed([contribution("a", tokens=1), contribution("b", tokens=2)], "tokens")
    assert one * 1.0 + three * 3.0 == pytest.approx(7 / 3, rel=1e-15)


def test_tokens_squared_per_step_favours_many_tokens_a_step() -> None:
    sent = [contribution("a", tokens=10, steps=1), contribution("b", tokens=20, steps=2)]  # 100 : 200
    assert weighed(sent, "tokens2-per-step") == [1 / 3, 2 / 3]
    unstepped = [contribution("a", tokens=10, steps=0), contribution("b", tokens=10, steps=1)]
    assert weighed(unstepped, "tokens2-per-step") == [0.5, 0.5]


@pytest.mark.parametrize("weighting", ["uniform", "tokens", "tokens2-per-step"])
def test_contributions_without_tokens_weigh_the_same(weighting: Weighting) -> None:
    assert weighed([contribution("a", tokens=0), contribution("b", tokens=0)], weighting) == [0.5, 0.5]


@given(
    st.lists(st.tuples(st.integers(0, 10**15), st.integers(0, 10**6)), min_size=1, max_size=20),
    st.sampled_from(["uniform", "tokens", "tokens2-per-step"]),
)
def test_weights_are_a_convex_combination(sent: list[tuple[int, int]], weighting: Weighting) -> None:
    found = weights(
        [contribution(f"s{i}", tokens=t, steps=s) for i, (t, s) in enumerate(sent)],
        replace(ALL, weighting=weighting),
        1,
    )
    assert all(0 <= weight <= 1 for weight in found)
    assert math.isclose(math.fsum(found), 1.0, rel_tol=1e-12)


def test_no_weight_is_more_than_the_cap_times_the_lower_median() -> None:
    sent = [contribution(site, tokens=tokens) for site, tokens in (("a", 10), ("b", 10**15), ("c", 20))]
    assert weighed(sent, "tokens", weight_cap=4.0) == [10 / 110, 80 / 110, 20 / 110]
    assert weighed(sent[:2], "tokens", weight_cap=4.0) == [0.2, 0.8], "one of two that is absurd is not the measure"
    assert weighed(sent[::2], "tokens", weight_cap=4.0) == [1 / 3, 2 / 3]


def test_older_contributions_weigh_less_where_that_is_wanted() -> None:
    sent = [contribution("a", base=3, tokens=10), contribution("b", base=0, tokens=10)]
    policy = replace(ALL, staleness_decay=0.5)
    assert weights(sent, policy, version=4) == [2 / 3, 1 / 3], "(1 + 3)^-1/2 = 1/2"
    assert weights(sent, ALL, version=4) == [0.5, 0.5]


def test_the_share_of_a_round_is_what_its_sites_train_against_what_all_do() -> None:
    sent = [contribution("a", tokens=30), contribution("b", tokens=10)]
    cycles = {"a": 32.0, "b": 16.0}
    assert share(sent, cycles, ALL, 1) == 1.0
    assert share(sent, cycles | {"c": 48.0}, ALL, 1) == 0.5
    assert share([contribution("a", tokens=1)], cycles, ALL, 1) == 32 / 48, "a short cycle is a short step already"
    assert share([contribution("a", tokens=0)], cycles, ALL, 1) == 0.0, "nothing was trained"
    assert share(sent, {}, ALL, 1) == 1.0, "nothing is known yet"


def test_a_stale_contribution_makes_its_round_worth_less_where_that_is_wanted() -> None:
    policy, cycles = replace(ALL, staleness_decay=0.5), {"a": 10.0}
    assert share([contribution("a", base=0)], cycles, policy, 1) == 1.0
    assert share([contribution("a", base=0)], cycles, policy, 4) == 0.5, "(1 + 3)^-1/2"
