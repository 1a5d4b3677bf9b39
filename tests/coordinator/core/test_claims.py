"""Counts that sites claim: bounded by the task where it knows, by three other sites where it does not."""

from __future__ import annotations

import pytest

from coordinator.core.claims import APART, LONGEST_CYCLES, LONGEST_SEQUENCE, REACH, Claims
from coordinator.core.rounds import Contribution


def claimed(site: str, tokens: int, steps: int = 10) -> Contribution:
    return Contribution(f"{site}-1", site, 0, 0, tokens, steps)


def noted(claims: Claims, **tokens: int) -> Claims:
    for site, count in tokens.items():
        claims.note(claims.credible(claimed(site, count), 0.0, None))
    return claims


@pytest.mark.parametrize("tokens", [10**18, 10 * 2 * 64 + 1])
def test_no_step_counts_more_than_its_batch_can_hold(tokens: int) -> None:
    claims = Claims(10, 2, sequence_tokens=64)
    assert claims.credible(claimed("a", tokens), 0.0, None).tokens == 10 * 2 * 64
    assert claims.credible(claimed("a", 10 * 2 * 64), 0.0, None).tokens == 10 * 2 * 64


def test_a_low_claim_of_another_site_bounds_nobody_where_the_task_knows() -> None:
    claims = noted(Claims(10, 2, sequence_tokens=64), low=1, low2=1, low3=1)
    assert claims.credible(claimed("a", 1280), 0.0, None).tokens == 1280


def test_where_the_task_does_not_know_the_middle_one_of_three_others_is_the_measure() -> None:
    claims = noted(Claims(10, 2), a=100, b=1, c=10**18)
    assert claims.credible(claimed("d", 10**18), 0.0, None).tokens == APART * 100
    assert claims.credible(claimed("d", 700), 0.0, None).tokens == 700


@pytest.mark.parametrize("others", [{}, {"b": 1}, {"b": 1, "c": 1}])
def test_fewer_others_are_no_measure(others: dict[str, int]) -> None:
    claims = noted(Claims(10, 2), **others)
    assert claims.credible(claimed("a", 10**6), 0.0, None).tokens == 10**6, "an honest one would pass for absurd"
    assert claims.credible(claimed("a", 10**18), 0.0, None).tokens == 10 * 2 * LONGEST_SEQUENCE
    assert claims.credible(claimed("a", 10**18, steps=0), 0.0, None).tokens == 0, "which would cost no credit"


def test_the_learners_of_a_site_are_one_witness_and_none_against_each_other() -> None:
    claims = Claims(10, 2)
    for site, count in {"liar~a": 1, "liar~b": 1, "liar~c": 1, "b": 100}.items():
        claims.note(claimed(site, count))
    assert claims.credible(claimed("d", 10**6), 0.0, None).tokens == 10**6, "two others say something"
    claims.note(claimed("c~x", 100))
    assert claims.credible(claimed("d", 10**6), 0.0, None).tokens == APART * 100
    assert claims.credible(claimed("liar~a", 10**6), 0.0, None).tokens == 10**6, "and only two beside this one"
    assert claims.tokens_per_step("d") == 10.0


def test_no_contribution_stands_for_more_than_so_many_cycles() -> None:
    claims = Claims(10, 2, sequence_tokens=64)
    found = claims.credible(claimed("a", 10**18, steps=10**15), 0.0, None)
    assert (found.steps, found.tokens) == (LONGEST_CYCLES * 10, LONGEST_CYCLES * 10 * 2 * 64)


def test_a_site_earns_credit_as_the_fastest_one_trains_and_keeps_what_it_did_not_use() -> None:
    claims = Claims(10, 2)
    full = LONGEST_CYCLES * 10

    def believed(steps: int, now: float, fastest: float | None = 2.0) -> int:
        found = claims.credible(claimed("a", 1, steps), now, fastest)
        claims.spend(found, now, fastest)
        return found.steps

    assert believed(10**9, 5.0) == full, "its first one may hold anything"
    assert believed(10**9, 6.0) == REACH * 2
    assert [believed(20, 16.0 + late) for late in (0.0, 0.1, 0.2)] == [20, 20, 20], "held up, they come together"
    assert believed(10**9, 16.2) <= 1, "sixty in ten seconds are all: the fastest one, three times over"
    assert believed(10**9, 10**6) == full, "credit is not kept for ever"
    assert believed(10**9, 10**6, None) == full, "where nobody can tell, nothing is cut but by cycles"


def test_each_fragment_has_its_own_credit() -> None:
    claims = Claims(10, 2)
    claims.spend(claimed("a", 1, LONGEST_CYCLES * 10), 0.0, 1.0)
    assert claims.credible(claimed("a", 1), 0.0, 1.0).steps == 0
    other = Contribution("2", "a", 1, 0, 1, 10)
    assert claims.credible(other, 0.0, 1.0) == other


def test_what_a_site_brings_is_known_from_its_last_contribution() -> None:
    claims = Claims(50, 2)
    assert (claims.steps_per_cycle("a"), claims.tokens_per_step("a")) == (None, 0.0)
    noted(claims, a=100, b=300, c=200)
    assert (claims.steps_per_cycle("a"), claims.tokens_per_step("a")) == (10.0, 10.0)
    assert claims.tokens_per_step("new") == 20.0, "as the middle one of the others"
    claims.note(claimed("a", 0, steps=0))
    assert claims.steps_per_cycle("a") == 10.0, "a contribution of no step says nothing"
