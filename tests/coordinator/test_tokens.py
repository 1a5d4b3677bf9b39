"""Site tokens: shown once, stored as a salted hash, replaced and revoked."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from coordinator.store.journal import Journal
from coordinator.tokens import add_token, check_token, read_token
from shared.errors import ConfigError


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.sqlite")
    yield journal
    journal.close()


def test_a_token_lets_its_own_site_in_and_no_other(journal: Journal) -> None:
    token, other = add_token(journal, "eu"), add_token(journal, "us")
    assert check_token(journal, "eu", token)
    assert not check_token(journal, "us", token)
    assert not check_token(journal, "eu", other)
    assert not check_token(journal, "nobody", token)
    for wrong in ("", token[:-1], token + "x", token.upper()):
        assert not check_token(journal, "eu", wrong)


def test_a_learner_has_no_token_of_its_own(journal: Journal) -> None:
    with pytest.raises(
        ConfigError, match=r"^eu~910b would be a learner, and comes with its site's token: add one for eu$"
    ):
        add_token(journal, "eu~910b")


def test_only_a_salted_hash_is_on_disk(journal: Journal) -> None:
    tokens = [add_token(journal, "eu"), add_token(journal, "us")]
    stored = [journal.token("eu"), journal.token("us")]
    journal.close()
    written = b"".join(path.read_bytes() for path in journal.path.parent.iterdir())
    for token, row in zip(tokens, stored, strict=True):
        assert row is not None
        salt, hashed = row
        assert len(salt) == 16
        assert hashed == sha256(salt + token.encode()).digest()
        assert hashed in written
        assert token.encode() not in written
    assert stored[0][0] != stored[1][0], "each has its own salt"


def test_a_new_token_replaces_the_old_one(journal: Journal) -> None:
    old = add_token(journal, "eu")
    new = add_token(journal, "eu")
    assert old != new
    assert not check_token(journal, "eu", old)
    assert check_token(journal, "eu", new)


def test_a_revoked_token_works_no_longer_and_a_new_one_does(journal: Journal) -> None:
    token = add_token(journal, "eu")
    assert journal.revoke_token("eu")
    assert not check_token(journal, "eu", token)
    assert not journal.revoke_token("eu"), "there is none left to revoke"
    assert not journal.revoke_token("nobody")
    assert check_token(journal, "eu", add_token(journal, "eu"))


def test_a_site_that_joined_without_a_token_has_none(journal: Journal) -> None:
    journal.site_joined("eu", "session")
    assert not check_token(journal, "eu", "")
    assert not journal.revoke_token("eu")
    add_token(journal, "eu")
    (site,) = journal.sites()
    assert (site.session, site.enrolled, site.has_token, site.revoked) == ("session", False, True, False)


@pytest.mark.parametrize("name", ["", "EU", "eu west", "-eu", "eu-", "../eu", "eu\n", "é", "a" * 65])
def test_a_name_that_cannot_be_a_sites_is_refused(journal: Journal, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a site's name"):
        add_token(journal, name)
    assert journal.sites() == []


def test_a_token_that_another_coordinator_made_is_taken_over(journal: Journal, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Journal(tmp_path / "other" / "journal.sqlite")
    (tmp_path / "eu.token").write_text(add_token(other, "eu") + "\n", encoding="utf-8")
    other.close()
    token = read_token(tmp_path / "eu.token")
    assert add_token(journal, "eu", token) == token
    assert check_token(journal, "eu", token)


@pytest.mark.parametrize("content", ["", "hunter2", "x" * 42, "x" * 44, "x" * 20 + " " + "x" * 22, "ü" * 43])
def test_what_a_person_thought_of_is_no_token(tmp_path: Path, content: str) -> None:
    (tmp_path / "eu.token").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"eu\.token does not hold what `isthmus coordinator token add` printed"):
        read_token(tmp_path / "eu.token")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(tmp_path / "none")
