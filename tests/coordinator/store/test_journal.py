"""The journal: durable rows, found again by whoever opens it, or one sentence that says what is broken."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.core.rounds import Contribution
from coordinator.outer.optimizers import OuterRule
from coordinator.outer.step import Digests, Stepped
from coordinator.store.journal import Journal, StoredRound
from shared.errors import CorruptError

RULE = OuterRule("nesterov", 0.7, 0.9, "int8", 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    journal = Journal(path)
    yield journal
    journal.close()


def contribution(site: str, base: int = 0, fragment: int = 0) -> Contribution:
    return Contribution(f"{site}-{fragment}-{base}", site, fragment, base, tokens=10, steps=5)


def blob(sent: Contribution) -> str:
    return f"blob-{sent.id}"


def accept(journal: Journal, *sent: Contribution) -> None:
    for each in sent:
        journal.accept(each, blob(each), 100, 1.5, at=1.0)


def stepped(version: int) -> Stepped:
    return Stepped(version, (b"delta",), 5, Digests(f"p{version}", f"m{version}", f"o{version}"), 10, 1.0, 0.5)


def merge(journal: Journal, version: int, *sent: Contribution) -> None:
    journal.close_round(0, version, "complete", [(each, 1 / len(sent)) for each in sent], RULE, at=2.0)
    journal.publish(0, stepped(version), f"delta-{version}", at=3.0)


def reopened(journal: Journal) -> Journal:
    journal.close()
    return Journal(journal.path, read_only=True)


# ---- what was written is found again


def test_a_reopened_journal_has_everything(journal: Journal) -> None:
    a, b, late = contribution("a"), contribution("b"), contribution("a", base=1)
    journal.set_meta(run="r", config="{}")
    journal.site_joined("a", "session-1")
    journal.enrol("a")
    journal.site_active("a", True)
    accept(journal, b, a)
    journal.close_round(0, 1, "quorum", [(a, 0.25), (b, 0.75)], RULE, at=2.0)
    journal.publish(0, stepped(1), "delta-1", at=3.0)
    accept(journal, late)
    journal.evaluate("a", 20, 3.25, at=4.0)
    found = reopened(journal)
    assert (found.meta("run"), found.meta("config"), found.meta("nothing")) == ("r", "{}", None)
    (site,) = found.sites()
    assert (site.name, site.session, site.enrolled, site.active, site.has_token) == (
        "a",
        "session-1",
        True,
        True,
        False,
    )
    assert found.round(0, 1) == StoredRound(
        0,
        1,
        "quorum",
        RULE,
        ((a.id, 0.25), (b.id, 0.75)),
        20,
        2.0,
        3.0,
        "delta-1",
        5,
        Digests("p1", "m1", "o1"),
        1.0,
        0.5,
    )
    assert found.rounds(0, after=0) == [found.round(0, 1)]
    assert found.rounds(0, after=1) == found.rounds(1, after=0) == []
    assert [(s.contribution, s.merged) for s in found.contributions()] == [(late, False)]
    everything = [(b, True), (late, False)]
    assert [(s.contribution, s.merged) for s in found.contributions(newest_of_each=True)] == everything
    stored = found.contribution(a.id)
    assert stored is not None
    assert (stored.contribution, stored.blob, stored.size, stored.norm, stored.merged) == (a, blob(a), 100, 1.5, True)
    assert found.contribution("unknown") is None
    assert found.evaluations() == [(20, 3.25)]
    found.close()


def test_a_reader_beside_the_writer_sees_each_row_once_its_write_has_returned(journal: Journal) -> None:
    reader = Journal(journal.path, read_only=True)
    accept(journal, contribution("a"))
    assert [s.contribution.site for s in reader.contributions()] == ["a"]
    with pytest.raises(OSError, match="readonly"):
        reader.set_meta(run="x")
    reader.close()


def test_a_round_that_is_closed_and_not_published_has_no_digests_yet(journal: Journal) -> None:
    accept(journal, contribution("a"))
    journal.close_round(0, 1, "complete", [(contribution("a"), 1.0)], RULE, at=2.0)
    (round_,) = journal.rounds(0, after=0)
    assert (round_.published_at, round_.delta, round_.published_digest) == (None, None, None)
    assert journal.contributions() == [], "it belongs to the round from now on"


def test_weights_come_back_as_the_same_bits(journal: Journal) -> None:
    accept(journal, contribution("a"))
    weight = 0.1 + 0.2
    journal.close_round(0, 1, "complete", [(contribution("a"), weight)], RULE, at=2.0)
    found = journal.round(0, 1)
    assert found is not None
    assert found.members[0][1].hex() == weight.hex()


def test_a_write_that_fails_leaves_nothing_behind(journal: Journal) -> None:
    accept(journal, contribution("a"))
    journal.close_round(0, 1, "complete", [(contribution("a"), 1.0)], RULE, at=2.0)
    accept(journal, contribution("b"))
    with pytest.raises(CorruptError):  # version 1 is there already
        journal.close_round(0, 1, "complete", [(contribution("b"), 1.0)], RULE, at=2.0)
    assert [s.contribution.site for s in journal.contributions()] == ["b"]
    journal.set_meta(run="r")
    assert journal.meta("run") == "r", "and the next write works"


def test_a_commit_that_the_disk_refuses_is_an_oserror_and_leaves_nothing(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(name: str) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "_commit", full)
        with pytest.raises(OSError, match="disk is full"):
            accept(journal, contribution("a"))
    assert journal.contributions() == []
    accept(journal, contribution("a"))
    assert len(journal.contributions()) == 1


def test_a_join_under_a_new_session_leaves_the_site_in_the_rounds(journal: Journal) -> None:
    """It was restarted, and is waited for: whether it takes part is a fact of its own."""
    for session, active in (("one", False), ("two", True)):
        journal.site_joined("a", session)
        (site,) = journal.sites()
        assert (site.session, site.active) == (session, active)
        journal.site_active("a", True)


def test_a_start_and_who_takes_part_in_it_are_one_fact(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    for site in ("a", "b", "c"):
        journal.site_joined(site, f"{site}-1")

    def full(name: str) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "_commit", full)
        with pytest.raises(OSError, match="full"):
            journal.start_run(["a", "b"])
    assert journal.meta("started") is None
    assert not any(site.active for site in journal.sites())
    journal.start_run(["a", "b"])
    assert journal.meta("started") == "1"
    assert [(site.name, site.active) for site in journal.sites()] == [("a", True), ("b", True), ("c", False)]


# ---- retention


def test_prune_names_what_no_checkpoint_and_no_site_needs(journal: Journal) -> None:
    sent = [contribution("a", base) for base in range(4)]
    for version, each in enumerate(sent, start=1):
        accept(journal, each)
        merge(journal, version, each)
    assert journal.prune(0, checkpoint=2, oldest_delta=4, oldest_row=0) == [
        *(blob(each) for each in sent[:2]),
        "delta-1",
        "delta-2",
        "delta-3",
    ]
    assert journal.prune(0, checkpoint=2, oldest_delta=4, oldest_row=0) == [], "each once"
    assert journal.prune(0, checkpoint=3, oldest_delta=4, oldest_row=0) == [blob(sent[2])]
    assert len(journal.rounds(0, after=0)) == 4, "the rows stay"


def test_prune_leaves_open_contributions_other_fragments_and_unpublished_rounds(journal: Journal) -> None:
    first, waiting, elsewhere = contribution("a"), contribution("b"), contribution("a", fragment=1)
    accept(journal, first, waiting, elsewhere)
    journal.close_round(0, 1, "complete", [(first, 1.0)], RULE, at=2.0)
    journal.close_round(1, 1, "complete", [(elsewhere, 1.0)], RULE, at=2.0)
    assert journal.prune(0, checkpoint=0, oldest_delta=9, oldest_row=0) == []
    journal.publish(0, stepped(1), "delta-1", at=3.0)
    assert journal.prune(0, checkpoint=1, oldest_delta=1, oldest_row=0) == [blob(first)]


def test_rows_of_old_rounds_go_and_each_sites_newest_contribution_stays(journal: Journal) -> None:
    """Site b took part in the first round alone; a in all five."""
    away = contribution("b")
    accept(journal, away)
    for version in range(1, 6):
        sent = contribution("a", base=version - 1)
        accept(journal, sent)
        merge(journal, version, sent, *([away] if version == 1 else []))
    journal.prune(0, checkpoint=4, oldest_delta=5, oldest_row=3)
    assert [round_.version for round_ in journal.rounds(0, after=0)] == [3, 4, 5]
    assert [journal.contribution(f"a-0-{base}") is None for base in range(5)] == [True, True, False, False, False]
    newest = journal.contributions(newest_of_each=True)
    assert [(each.contribution.site, each.merged) for each in newest] == [("b", True), ("a", True)]
    journal.prune(0, checkpoint=4, oldest_delta=5, oldest_row=9)
    assert [round_.version for round_ in journal.rounds(0, after=0)] == [4, 5], "a checkpoint's own round is its record"
    journal.prune(0, checkpoint=4, oldest_delta=1, oldest_row=9)
    assert journal.needed_blobs() == {blob(contribution("a", base=4)), "delta-5"}


# ---- a journal that cannot be read


def one_sentence(error: BaseException, path: Path) -> None:
    text = str(error)
    assert str(path) in text
    assert "\n" not in text
    assert "Traceback" not in text


@pytest.mark.parametrize("content", [b"not a database, " * 500, b"SQLite format 3\x00" + bytes(5000), b"\x00" * 4096])
@pytest.mark.parametrize("read_only", [True, False])
def test_a_file_that_is_no_journal_is_told_and_left_alone(path: Path, content: bytes, read_only: bool) -> None:
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=r"is corrupt \(.*\); restore .* from its mirror or a backup") as caught:
        Journal(path, read_only=read_only)
    one_sentence(caught.value, path)
    assert path.read_bytes() == content


def damage_a_page(journal: Journal) -> None:
    for n in range(300):
        accept(journal, contribution(f"site{n}"))
    journal.close()
    data = bytearray(journal.path.read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    journal.path.write_bytes(bytes(data))


def test_a_damaged_page_is_found_when_the_journal_is_opened(journal: Journal) -> None:
    damage_a_page(journal)
    with pytest.raises(CorruptError, match=r"journal\.sqlite is corrupt"):
        Journal(journal.path)


def test_a_damaged_page_is_told_in_one_sentence(journal: Journal) -> None:
    damage_a_page(journal)
    with pytest.raises(CorruptError) as caught:
        Journal(journal.path)
    one_sentence(caught.value, journal.path)


def test_a_journal_of_another_schema_is_refused(journal: Journal, path: Path) -> None:
    journal.set_meta(schema="9")
    journal.close()
    for read_only in (True, False):
        with pytest.raises(CorruptError, match="has schema 9; this version reads 5") as caught:
            Journal(path, read_only=read_only)
        one_sentence(caught.value, path)


def test_a_journal_that_is_not_there_is_not_made_by_a_reader(path: Path) -> None:
    with pytest.raises(OSError, match=r"journal\.sqlite: unable to open"):
        Journal(path, read_only=True)
    assert not path.exists()
