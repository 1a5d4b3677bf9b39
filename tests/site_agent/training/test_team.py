"""How the processes of a site talk: each is told what is its own, and who fails or is lost is known to all."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from shared.errors import ConfigError, FaultError, LostError
from site_agent.training import team as module
from site_agent.training.replica import DivergedError
from site_agent.training.team import ALONE, Team
from tests.support.ranks import run_ranks

ORDER = {"do": "step", "lr": 1e-3, "more": {"how": "align", 3: [1, 2.5, None, b"raw", "Θ"]}}


def everybody() -> Team:
    return Team(dist.group.WORLD)


# ---- what the ranks do


def told() -> Any:
    team = everybody()
    head = team.head
    if head:
        team.tell(ORDER)
        team.tell({})
    heard = [ORDER, {}] if head else [team.hear(), team.hear()]
    given = dealt_out(team, [b"", b"one", b"two" * 10000])
    vector = np.arange(10, dtype=np.float32)
    vector.flags.writeable = False  # as one of a file is
    dealt = team.deal(vector if head else None, [(0, 3), (3, 3), (3, 10)])
    shared = torch.arange(4.0) if head else torch.empty(4)
    team.share(shared)
    collected = team.collect(bytes([team.rank]) * team.rank)
    said = team.everyone(team.rank, 0.1 * team.rank, float("nan") if team.rank == 1 else 2.0**53)
    all_told = team.tell_all({"rank": team.rank, "text": "é"})
    return heard, given, dealt.tolist(), shared.tolist(), collected, said, all_told, (team.rank, team.size, team.alone)


def dealt_out(team: Team, parts: list[bytes]) -> bytes:
    """What a rank takes, which it does only once the head has gone on to something else."""
    go = torch.zeros(1)
    if team.head:
        team.deal_out(ORDER, parts)
        for rank in range(1, team.size):
            dist.send(go, dst=rank, tag=1)
        return parts[0]
    dist.recv(go, src=0, tag=1)
    order = team.hear()
    assert {key: order[key] for key in ORDER} == ORDER
    return team.take(order)


def failing(who: dict[int, Exception]) -> Any:
    """What comes of it where these ranks raise that, and what is said afterwards."""
    team = everybody()

    def work() -> int:
        if team.rank in who:
            raise who[team.rank]
        return 10 * team.rank

    try:
        done: Any = team.agree(work)
    except Exception as error:
        done = (type(error).__name__, str(error))
    return done, team.everyone(team.rank)


def failings(cases: list[dict[int, Exception]]) -> list[Any]:
    return [failing(case) for case in cases]


def killed(what: Callable[[Team], Any]) -> Any:
    """Rank 1 is killed, while the others wait for it."""
    team = everybody()
    team.everyone(0.0)  # all are connected
    if team.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:  # (What is said to the one that is gone may still be on its way to nobody.)
            what(team)
    except LostError as error:
        return str(error), error.exit_code


def heard(team: Team) -> Any:
    return team.tell({"do": "tick"}) if team.head else team.hear()


def collected(team: Team) -> Any:
    return team.collect(b"x") if team.rank != 2 else team.hear()


def every(team: Team) -> Any:
    return team.everyone(1.0)


def ticking() -> list[str]:
    """What the others hear while the head waits for somebody else, who comes once there were three ticks."""
    team, said = everybody(), []
    somebody, word = dist.new_group(), torch.zeros(1)
    if team.head:
        module.TICK_SECONDS = 0.001
        with team.waiting():
            dist.broadcast(word, group=somebody, group_src=1)
        team.tell({"do": "end"})
        return []
    while said[-1:] != ["end"]:
        said.append(team.hear()["do"])
        if len(said) == 3:
            dist.broadcast(word, group=somebody, group_src=1)
    return said


# ---- tests


def test_each_rank_is_told_what_is_its_own() -> None:
    ranks = run_ranks(3, told)
    for rank, (heard, given, dealt, shared, collected, said, all_told, place) in enumerate(ranks):
        assert heard == [ORDER, {}]
        assert given == [b"", b"one", b"two" * 10000][rank]
        assert dealt == [[0.0, 1.0, 2.0], [], [3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]][rank]
        assert shared == [0.0, 1.0, 2.0, 3.0]
        assert collected == ([b"", b"\1", b"\2\2"] if rank == 0 else None)
        assert [each[0] for each in said] == [0.0, 1.0, 2.0]
        assert [each[1] for each in said] == [0.0, 0.1, 0.2]  # not rounded on the way
        assert [each[2] for each in said] == [2.0**53, pytest.approx(float("nan"), nan_ok=True), 2.0**53]
        assert all_told == [{"rank": n, "text": "é"} for n in range(3)]
        assert place == (rank, 3, False)


def test_who_is_alone_says_everything_to_itself() -> None:
    ALONE.tell(ORDER)
    vector = np.arange(4, dtype=np.float32)
    assert ALONE.deal(vector, [(0, 4)]).tolist() == vector.tolist()
    assert ALONE.share(torch.ones(2)).tolist() == [1, 1]
    assert ALONE.collect(b"x") == [b"x"]
    assert ALONE.everyone(1, 2) == [[1.0, 2.0]]
    assert ALONE.tell_all({"a": 1}) == [{"a": 1}]
    assert ALONE.agree(lambda: 3) == 3
    with ALONE.waiting():
        pass
    with pytest.raises(DivergedError, match="as it is"):
        ALONE.agree(lambda: (_ for _ in ()).throw(DivergedError("as it is")))
    assert (ALONE.head, ALONE.alone, ALONE.rank, ALONE.size) == (True, True, 0, 1)


def test_an_error_at_any_rank_is_raised_at_the_head_with_its_rank() -> None:
    cases: list[dict[int, Exception]] = [
        {},
        {0: ConfigError("no such file")},
        {1: ConfigError("no such file")},
        {2: FaultError("no memory"), 1: ValueError("three\nlines")},
        {2: DivergedError("nan")},
        {0: KeyError("mine"), 1: ConfigError("other")},
    ]
    ranks = run_ranks(3, failings, cases)
    assert [done for done, _ in ranks[0]] == [
        0,
        ("ConfigError", "no such file"),
        ("ConfigError", "rank 1: no such file"),
        ("FaultError", "rank 1: three\nlines (ValueError)"),
        ("FaultError", "rank 2: nan (DivergedError)"),
        ("KeyError", "'mine'"),
    ]
    for rank in (1, 2):
        assert [done for done, _ in ranks[rank]] == [10 * rank, *[("LostError", "the head says why")] * 5]
    # (They are still together.)
    assert all(after == [[0.0], [1.0], [2.0]] for rank in ranks for _, after in rank)


@pytest.mark.parametrize("what", [heard, collected, every])
def test_a_rank_that_is_killed_is_noticed_by_those_who_wait_for_it(what: Callable[[Team], Any]) -> None:
    # Noticed by its connection: after the group's patience, which is as long, the ranks would be out of time.
    head, _, other = run_ranks(3, killed, what, lost=(1,))
    for text, code in (head, other):
        assert text.startswith("a process of this site is lost: ")
        assert "\n" not in text
        assert code == 75


def test_those_who_wait_hear_that_the_head_is_there() -> None:
    _, said = run_ranks(2, ticking)
    assert said[:3] == ["tick"] * 3
    assert said[-1] == "end"


def test_a_rank_that_is_lost_while_the_head_waits_is_told_by_the_next_word(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = threading.Event()

    class Gone(Team):
        @property
        def alone(self) -> bool:
            return False

        def tell(self, order: Any) -> None:
            gone.set()
            raise LostError("gone")

    monkeypatch.setattr(module, "TICK_SECONDS", 0.0)
    with Gone().waiting():  # (Pytest fails where its thread does.)
        assert gone.wait(30)
