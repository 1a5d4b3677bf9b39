"""Leases of data: each shard once an epoch, whoever dies; nothing left out."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.leases import Change, Entry, Leases

SIZES = [5, 1, 7, 3]


def leases(fragments: int = 2) -> Leases:
    return Leases(SIZES, fragments, seed=3)


def grant(book: Leases, site: str, ahead: int, finished: tuple[int, ...] = ()) -> list[Entry]:
    change = book.plan_grants(site, ahead, finished)
    if change is None:
        return []
    book.make(change)
    return list(change.entries)


def trained(book: Leases, site: str, fragment: int, *progress: tuple[int, int, int]) -> Change | None:
    change = book.plan_progress(site, fragment, progress)
    if change is not None:
        book.make(change)
    return change


def test_every_shard_is_leased_once_before_any_is_again() -> None:
    book = leases()
    granted = [entry for site in ("a", "b", "a", "b") for entry in grant(book, site, len(book.held_by(site)) + 2)]
    assert sorted(e.shard for e in granted if e.epoch == 0) == [0, 1, 2, 3]
    assert sorted(e.shard for e in granted if e.epoch == 1) == [0, 1, 2, 3]
    assert [e.epoch for e in granted] == [0] * 4 + [1] * 4
    orders = [tuple(e.shard for e in granted if e.epoch == epoch) for epoch in (0, 1)]
    assert orders[0] != orders[1], "each epoch in another order"


def test_asking_again_is_the_same_answer() -> None:
    book = leases()
    assert len(grant(book, "a", 2)) == 2
    assert grant(book, "a", 2) == []
    first = book.held_by("a")[0].number
    assert len(grant(book, "a", 2, (first,))) == 1, "one is trained to its end, so one more"
    assert grant(book, "a", 2, (first,)) == []


def test_a_shard_is_done_when_every_fragment_holds_all_of_it() -> None:
    book = leases()
    (entry,) = grant(book, "a", 1)
    size = SIZES[entry.shard]
    change = trained(book, "a", 0, (*entry.key, size))
    assert change is not None
    assert change.done == ()
    change = trained(book, "a", 1, (*entry.key, size))
    assert change is not None
    assert change.done == (entry.key,)
    assert book.entries == {}
    assert trained(book, "a", 1, (*entry.key, size)) is None


def test_a_shard_comes_back_from_where_the_whole_model_holds_it() -> None:
    book = leases()
    held = grant(book, "a", 4)
    entry = next(e for e in held if SIZES[e.shard] == 7)
    trained(book, "a", 0, (*entry.key, 6))
    trained(book, "a", 1, (*entry.key, 4))
    change = book.plan_return(["a"])
    assert change is not None
    book.make(change)
    assert book.held_by("a") == []
    again = {e.key: e for e in grant(book, "b", 4)}
    assert again[entry.key].positions == (4, 4)
    assert again.keys() == {e.key for e in held}, "what came back goes first"
    assert again[entry.key].number > max(e.number for e in held), "and is another lease by now"
    assert book.withdrawn([entry.number]) == [entry.number]
    assert book.withdrawn([again[entry.key].number]) == []


def test_a_lease_that_came_back_is_known_to_have_when_another_site_has_finished_it() -> None:
    book = leases(fragments=1)
    (entry,) = grant(book, "a", 1)
    change = book.plan_return(["a"])
    assert change is not None
    book.make(change)
    grant(book, "b", 1)
    trained(book, "b", 0, (*entry.key, SIZES[entry.shard]))
    assert book.entries == {}
    assert book.withdrawn([entry.number]) == [entry.number]


def test_no_number_is_given_twice_by_a_coordinator_that_was_restarted() -> None:
    book = leases(fragments=1)
    (entry,) = grant(book, "a", 1)
    trained(book, "a", 0, (*entry.key, SIZES[entry.shard]))
    other = leases(fragments=1)
    other.restore(book.entries.values(), book.dealt)
    assert grant(other, "a", 1)[0].number > entry.number


def test_nobody_moves_anothers_position_and_none_goes_back() -> None:
    book = leases()
    entry = next(e for e in grant(book, "a", 4) if SIZES[e.shard] == 5)
    assert trained(book, "b", 0, (*entry.key, 3)) is None
    assert trained(book, "a", 0, (*entry.key, 3)) is not None
    assert trained(book, "a", 0, (*entry.key, 2)) is None
    assert trained(book, "a", 0, (9, 9, 9), (0, 77, 1)) is None
    assert trained(book, "a", 0, (*entry.key, 10**12)) is not None
    assert book.entries[entry.key].positions[0] == 5, "no further than its size"


def test_what_was_done_is_not_taken_for_withdrawn() -> None:
    book = leases(fragments=1)
    (entry,) = grant(book, "a", 1)
    trained(book, "a", 0, (*entry.key, SIZES[entry.shard]))
    assert book.withdrawn([entry.number]) == []


@given(st.integers(0, 2**32), st.integers(1, 3), st.booleans())
def test_nothing_is_left_out_and_without_deaths_nothing_is_trained_twice(seed: int, fragments: int, die: bool) -> None:
    """Sites train, contribute fragment by fragment, die and are given up; the book is written and read again."""
    rng = random.Random(seed)
    book = leases(fragments)
    count: Counter[tuple[int, int, int]] = Counter()
    local: dict[str, dict[tuple[int, int], int]] = {"a": {}, "b": {}, "c": {}}
    numbers: dict[str, dict[int, tuple[int, int]]] = {"a": {}, "b": {}, "c": {}}
    for _ in range(120):
        site = rng.choice("abc")
        mine = local[site]
        match rng.choice(("lease", "train", "train", "contribute", "contribute", "die", "restart")):
            case "lease":
                done = tuple(n for n, key in numbers[site].items() if mine[key] >= SIZES[key[1]])
                grant(book, site, 2, done)
                for number in book.withdrawn(numbers[site]):
                    del mine[numbers[site].pop(number)]
                for entry in book.held_by(site):
                    if entry.number not in numbers[site]:
                        numbers[site][entry.number] = entry.key
                        mine[entry.key] = entry.position
            case "train":
                for key in sorted(mine):
                    if mine[key] < SIZES[key[1]]:
                        count[(*key, mine[key])] += 1
                        mine[key] += 1
                        break
            case "contribute":
                trained(book, site, rng.randrange(fragments), *((*key, at) for key, at in mine.items()))
            case "die" if die:
                mine.clear()
                numbers[site].clear()
                if (change := book.plan_return([site])) is not None:
                    book.make(change)
            case "restart":
                other = leases(fragments)
                other.restore(book.entries.values(), book.dealt)
                book = other
    done = [(epoch, shard) for epoch in range(book.dealt.epoch + 1) for shard in _dealt(book, epoch)]
    for epoch, shard in done:
        if (epoch, shard) not in book.entries:
            assert all(count[epoch, shard, at] >= 1 for at in range(SIZES[shard]))
    if not die:
        assert max(count.values(), default=1) == 1


def _dealt(book: Leases, epoch: int) -> list[int]:
    order = book.order(epoch)
    return order[: book.dealt.shards] if epoch == book.dealt.epoch else order
