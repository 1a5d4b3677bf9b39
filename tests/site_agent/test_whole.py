"""The whole run from what its coordinators say: whose word holds, and in whose numbers."""

from __future__ import annotations

from typing import Any

import pytest

from shared.protocol import AwaitedRound, FragmentVersion, Joined, Orders, ShardMessage
from site_agent.whole import whole_joined, whole_orders


def orders(**changed: Any) -> Orders:
    facts: dict[str, Any] = {
        "started": True,
        "finished": True,
        "peers": 1.0,
        "pace": 8.0,
        "shard": ShardMessage(index=0, count=2, seed=0),
        "tokens": 5,
        "evaluate": False,
        "awaited": [],
        "closing": [],
        "data": None,
    }
    return Orders(**{**facts, **changed})


def rounds(*where: tuple[int, int]) -> list[AwaitedRound]:
    return [AwaitedRound(fragment=p, version=version) for p, version in where]


def joined(run: str, layout: list[list[tuple[str, list[int]]]], versions: list[int]) -> Joined:
    at = [FragmentVersion(version=v, digest="0" * 32, tokens=0, contributed=-1) for v in versions]
    return Joined(
        run=run,
        lineage=run,
        session="s",
        config={},
        layout=layout,
        fragments=at,
        lease_seconds=30.0,
        orders=orders(),
        shard=0,
        fingerprint={},
    )


def test_what_one_coordinator_says_is_as_it_said_it() -> None:
    said = joined("r", [[("a", [1])], [("b", [2])]], [3, 4])
    assert whole_joined([said]) == said
    told = orders(awaited=rounds((1, 3)), closing=rounds((0, 4)), evaluate=True)
    assert whole_orders([told]) == told


@pytest.mark.parametrize("what", ["started", "finished"])
def test_training_starts_and_ends_once_all_say_so(what: str) -> None:
    no_yes = (False, True)
    said = [[getattr(whole_orders([orders(**{what: a}), orders(**{what: b})]), what) for b in no_yes] for a in no_yes]
    assert said == [[False, False], [False, True]]


def test_the_first_one_orders_and_each_speaks_for_its_own_rounds() -> None:
    first = orders(pace=8.0, tokens=5, evaluate=False, awaited=rounds((1, 7)), closing=rounds((0, 2)))
    second = orders(pace=3.0, tokens=9, evaluate=True, peers=4.0, awaited=rounds((0, 1)), closing=rounds((2, 6)))
    whole = whole_orders([first, second])
    assert (whole.pace, whole.tokens, whole.evaluate, whole.peers) == (8.0, 5, False, 1.0)
    assert whole.awaited == rounds((2, 7), (1, 1))
    assert whole.closing == rounds((0, 2), (5, 6))


def test_fragments_are_dealt_in_turn_and_the_run_goes_by_all_ids() -> None:
    whole = whole_joined([joined("r.0", [[("a", [1])], [("c", [3])]], [1, 3]), joined("r.1", [[("b", [2])]], [2])])
    assert (whole.run, whole.lineage) == ("r.0+r.1", "r.0+r.1")
    assert whole.layout == [[("a", [1])], [("b", [2])], [("c", [3])]]
    assert [each.version for each in whole.fragments] == [1, 2, 3]
