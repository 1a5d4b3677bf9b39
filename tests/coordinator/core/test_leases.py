"""Leases of data: each shard once an epoch, whoever dies; nothing left out."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from coordinator.core.leases import MOST_HELD, Change, Entry, Leases

SIZES = [5, 1, 7, 3]


def leases(fragments: int = 2) -> Leases:
    return Leases(SIZES, fragments, seed=3)


def grant(book: Leases, site: str, missing: int, newest: int | None = None, known: Any = None) -> list[Entry]:
    """What the site is leased; as one that has what it was leased before, unless said otherwise."""
    held = [entry.number for entry in book.held_by(site)]
    change = book.plan_grants(
        site, missing, max(held, default=-1) if newest is None else newest, held if known is None else known
    )
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
    granted = [entry for n in range(8) for entry in grant(book, "ab"[n % 2], 1)]
    assert sorted(e.shard for e in granted if e.epoch == 0) == [0, 1, 2, 3]
    assert sorted(e.shard for e in granted if e.epoch == 1) == [0, 1, 2, 3]
    assert [e.epoch for e in granted] == [0] * 4 + [1] * 4
    orders = [tuple(e.shard for e in granted if e.epoch == epoch) for epoch in (0, 1)]
    assert orders[0] != orders[1], "each epoch in another order"


def test_asking_again_is_the_same_answer() -> None:
    book = leases()
    first = grant(book, "a", 7)
    assert sum(SIZES[entry.shard] for entry in first) >= 7
    assert grant(book, "a", 7, -1, ()) == [], "what is on its way to the site counts"
    assert book.held_by("a") == first
    assert grant(book, "a", 0) == []


def test_a_site_gets_as_much_as_it_lacks_however_little_is_left_of_what_came_back() -> None:
    """Remnants go first; a site whose remnants are less than a batch must not wait for ever."""
    book = Leases([100] * 24, 1, seed=3)
    for entry in grant(book, "b", 2400):
        trained(book, "b", 0, (*entry.key, 96))
    change = book.plan_return(["b"])
    assert change is not None
    book.make(change)
    granted = grant(book, "a", 16)
    assert [book.sizes[e.shard] - e.position for e in granted] == [4] * 4


def test_what_a_site_has_lost_is_leased_to_it_anew() -> None:
    """It, or the coordinator, is back at an earlier time."""
    book = leases()
    held = grant(book, "a", 16)
    lost = next(e for e in held if SIZES[e.shard] == 7)
    known = [e.number for e in held if e is not lost]
    trained(book, "a", 0, (*lost.key, 3))
    trained(book, "a", 1, (*lost.key, 2))
    (again,) = grant(book, "a", 0, 40, known)
    assert (again.key, again.positions, again.number) == (lost.key, (2, 2), 41), "with a number that it has not seen"
    assert [e.number for e in book.held_by("a")] == [*known, 41]
    assert grant(book, "a", 0, 40, known) == [], "and once"


def test_nobody_holds_more_than_can_be_told() -> None:
    book = Leases([1] * 10, 1, seed=3)
    assert len(grant(book, "a", 10**6)) == MOST_HELD
    assert grant(book, "a", 10**6) == []


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
    held = grant(book, "a", 16)
    entry = next(e for e in held if SIZES[e.shard] == 7)
    trained(book, "a", 0, (*entry.key, 6))
    trained(book, "a", 1, (*entry.key, 4))
    change = book.plan_return(["a"])
    assert change is not None
    book.make(change)
    assert book.held_by("a") == []
    again = {e.key: e for e in grant(book, "b", 16 - 4)}
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
    entry = next(e for e in grant(book, "a", 16) if SIZES[e.shard] == 5)
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
    seen: dict[str, set[int]] = {"a": set(), "b": set(), "c": set()}
    numbers: dict[str, dict[int, tuple[int, int]]] = {"a": {}, "b": {}, "c": {}}
    for _ in range(120):
        site = rng.choice("abc")
        mine = local[site]
        match rng.choice(("lease", "train", "train", "contribute", "contribute", "die", "restart")):
            case "lease":
                left = sum(SIZES[key[1]] - at for key, at in mine.items())
                grant(book, site, 6 - left, max(seen[site], default=-1), numbers[site])
                for number in book.withdrawn(numbers[site]):
                    del mine[numbers[site].pop(number)]
                for entry in book.held_by(site):
                    if entry.number not in seen[site]:
                        seen[site].add(entry.number)
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
