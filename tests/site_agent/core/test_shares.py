"""How a batch is shared among device groups: nobody waits longer than must be, and nothing is trained twice."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from site_agent.core.shares import SETTLED_STEPS, Balance, Pass, deal, passes, seconds

SPEEDS = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6)
Cost = Callable[[int], float]


# ---- a deal


@pytest.mark.parametrize(
    ("batch", "speeds", "shares"),
    [
        (8, [1.0], [8]),
        (8, [1.0, 1.0], [4, 4]),
        (8, [3.0, 1.0], [6, 2]),
        (8, [2.0, 1.0], [6, 2]),  # the last one is through after 3 s at either
        (2, [1.0, 100.0], [0, 2]),
        (1, [1.0, 1.0, 1.0], [1, 0, 0]),
        (5, [1.0, 1.0, 1.0], [2, 2, 1]),
    ],
)
def test_sequences_go_where_they_are_through_first_and_ties_to_the_first(
    batch: int, speeds: list[float], shares: list[int]
) -> None:
    assert deal(batch, speeds) == shares


@given(st.integers(1, 300), SPEEDS)
def test_shares_sum_to_the_batch(batch: int, speeds: list[float]) -> None:
    shares = deal(batch, speeds)
    assert sum(shares) == batch
    assert min(shares) >= 0


@given(st.integers(1, 9), st.lists(st.floats(0.01, 100.0), min_size=1, max_size=4))
def test_no_other_shares_are_through_sooner(batch: int, speeds: list[float]) -> None:
    every = [s for s in itertools.product(range(batch + 1), repeat=len(speeds)) if sum(s) == batch]
    best = min(seconds(shares, speeds) for shares in every)
    assert seconds(deal(batch, speeds), speeds) == pytest.approx(best, rel=1e-12)


# ---- passes


def test_passes_are_cut_evenly_and_ranks_meet_in_each() -> None:
    assert passes(0, 8, 1, 8) == [[Pass(0, 8)]]
    assert passes(4, 5, 2, 8) == [[Pass(4, 6)], [Pass(6, 9)]]
    assert passes(0, 5, 2, 2) == [[Pass(0, 1), Pass(1, 2)], [Pass(2, 3), Pass(3, 5)]]


def test_who_has_no_sequence_takes_another_s_which_weighs_nothing() -> None:
    assert passes(3, 1, 2, 4) == [[Pass(3, 4, weighs=False)], [Pass(3, 4)]]
    assert passes(7, 0, 2, 4) == [[Pass(0, 1, weighs=False)]] * 2


@given(st.integers(0, 50), st.integers(0, 80), st.integers(1, 9), st.integers(1, 20))
def test_every_sequence_is_in_one_pass_that_weighs(first: int, sequences: int, ranks: int, most: int) -> None:
    taken = passes(first, sequences, ranks, most)
    assert len(taken) == ranks
    assert len({len(mine) for mine in taken}) == 1
    assert all(0 < each.stop - each.start <= most for mine in taken for each in mine)
    weighed = [n for mine in taken for each in mine if each.weighs for n in range(each.start, each.stop)]
    assert weighed == list(range(first, first + sequences))
    borrowed = [each for mine in taken for each in mine if not each.weighs]
    assert all(each.stop <= first + sequences if sequences else each == Pass(0, 1, False) for each in borrowed)


@given(st.integers(0, 80), st.integers(1, 9), st.integers(1, 20))
def test_there_are_no_more_passes_than_the_micro_batch_makes(sequences: int, ranks: int, most: int) -> None:
    largest = -(-sequences // ranks)
    assert len(passes(0, sequences, ranks, most)[0]) == max(1, -(-largest // most))


# ---- a balance


def linear(fixed: float, each: float) -> Cost:
    return lambda sequences: fixed + each * sequences


def stairs(most: int, fixed: float, each: float) -> Cost:
    """A cost for each pass of at most so many sequences."""
    return lambda sequences: -(-sequences // most) * fixed + each * sequences


def train(balance: Balance, costs: Sequence[Cost], steps: int, noise: float = 0.0, seed: int = 0) -> list[list[int]]:
    """Steps of groups that cost so much; the shares after each deal."""
    wavering, deals = random.Random(seed), []
    for _ in range(steps):
        shares = zip(costs, balance.shares, strict=True)
        took = [cost(max(1, share)) * max(0.5, wavering.gauss(1.0, noise)) for cost, share in shares]
        if balance.stepped(took):
            deals.append(list(balance.shares))
        assert sum(balance.shares) == balance.batch
    return deals


def test_shares_follow_a_device_that_slows_down_and_recovers() -> None:
    balance = Balance(16, [1.0, 1.0])
    even, slow = [linear(0, 0.1), linear(0, 0.1)], [linear(0, 0.1), linear(0, 0.3)]
    assert train(balance, even, 3 * SETTLED_STEPS) == []
    assert train(balance, slow, 3 * SETTLED_STEPS) == [[12, 4]]
    assert balance.speeds == pytest.approx([10.0, 1 / 0.3])
    assert train(balance, even, 4 * SETTLED_STEPS)[-1] == [8, 8]


def test_shares_stay_where_others_would_gain_little() -> None:
    assert train(Balance(16, [1.0, 1.0]), [linear(0, 0.1), linear(0, 0.105)], 200) == []
    assert train(Balance(32, [1.0, 1.0]), [linear(0, 0.1)] * 2, 500, noise=0.02) == []


def test_a_deal_takes_a_whole_window_of_steps() -> None:
    balance, costs = Balance(8, [1.0, 1.0]), [linear(0, 0.1), linear(0, 0.3)]
    assert train(balance, costs, SETTLED_STEPS - 1) == []
    assert train(balance, costs, 1) == [[6, 2]]


def test_one_step_that_something_delayed_changes_nothing() -> None:
    balance = Balance(8, [1.0, 1.0])
    balance.stepped([0.4, 9.0])
    assert train(balance, [linear(0, 0.1)] * 2, 50) == []


def test_a_site_of_one_group_has_nothing_to_deal() -> None:
    balance = Balance(8, [3.0])
    assert train(balance, [linear(0, 1.0)], 100) == []
    assert (balance.shares, balance.speeds) == ([8], [3.0])


def test_a_group_without_sequences_keeps_its_speed_and_comes_back_when_it_is_worth_it() -> None:
    balance = Balance(2, [10.0, 1.0])
    assert balance.shares == [2, 0]
    train(balance, [linear(0, 0.1), linear(0, 1.0)], 50)
    assert (balance.shares, balance.speeds[1]) == ([2, 0], 1.0)
    train(balance, [linear(0, 2.0), linear(0, 1.0)], 50)
    assert balance.shares == [1, 1]


def test_fixed_costs_do_not_keep_shares_from_what_is_best() -> None:
    balance = Balance(16, [1.0, 1.0])
    assert train(balance, [linear(1.0, 0.1), linear(0.2, 0.3)], 500) == [[10, 6]]


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize(
    ("batch", "costs"),
    [
        (
            17,
            [stairs(8, 1, 0.1), stairs(8, 1, 0.1)],
        ),  # 8 and 9 sequences: as dealt by their speeds, for ever to and fro
        (48, [stairs(8, 1, 0.05), stairs(4, 0.7, 0.05), stairs(16, 2, 0.02)]),
        (64, [stairs(8, 1, 0.02), stairs(8, 1.6, 0.02)]),
        (32, [linear(1.0, 0.0), linear(1.1, 0.0)]),
    ],
)
def test_shares_come_to_rest_where_passes_have_costs_of_their_own(batch: int, costs: list[Cost], noise: float) -> None:
    balance = Balance(batch, [1.0] * len(costs))

    def slowest() -> float:
        return max(cost(share) for cost, share in zip(costs, balance.shares, strict=True))

    before = slowest()
    train(balance, costs, 400, noise)
    assert train(balance, costs, 2000, noise, seed=1) == []
    assert slowest() <= before


def test_shares_at_rest_still_follow_a_drift() -> None:
    balance = Balance(17, [1.0, 1.0])
    train(balance, [stairs(8, 1, 0.1), stairs(8, 1, 0.1)], 400)
    train(balance, [stairs(8, 1, 0.1), stairs(8, 4, 0.4)], 400)
    assert balance.shares[0] >= 12
