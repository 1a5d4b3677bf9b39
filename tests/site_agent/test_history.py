"""The history: the deltas between the oldest kept checkpoint and now, and whether any is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.files import DISK
from site_agent.history import History


@pytest.fixture
def history(tmp_path: Path) -> History:
    kept = History(tmp_path / "versions", DISK)
    for version in (4, 5, 6, 10):
        kept.put(0, version, bytes([version]))
    kept.put(1, 5, b"another")
    return kept


def test_what_was_put_is_read(history: History) -> None:
    assert history.read(0, 6) == b"\x06"
    assert history.read(1, 5) == b"another"
    assert history.read(1, 6) is None


@pytest.mark.parametrize(
    ("after", "upto", "covered"),
    [(3, 6, True), (5, 6, True), (6, 6, True), (9, 3, True), (3, 7, False), (2, 6, False), (6, 10, False)],
)
def test_it_covers_what_has_no_gap(history: History, after: int, upto: int, covered: bool) -> None:
    assert history.covers(0, after, upto) is covered


def test_what_leads_up_to_the_oldest_checkpoint_is_forgotten(history: History) -> None:
    history.prune({0: 5})
    assert [history.read(0, version) is not None for version in (4, 5, 6, 10)] == [False, False, True, True]
    assert history.read(1, 5) is not None, "another fragment is another matter"


def test_what_is_damaged_is_dropped(history: History) -> None:
    history.drop(0, 5)
    assert not history.covers(0, 3, 6)


def test_there_may_be_none(tmp_path: Path) -> None:
    none = History(tmp_path / "versions", DISK)
    none.prune({0: 5})
    none.clear()
    assert none.covers(0, 5, 5)
    assert not none.covers(0, 4, 5)
