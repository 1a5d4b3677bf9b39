"""The journal: one SQLite file (WAL, synchronous FULL) that the state is a fold of.

Each method is one transaction, durable when it returns. Contributions are rows in order of acceptance; a
round row fixes, before the merge begins, exactly which contributions it holds, in which order, with which
weights, and under which outer rule; after the merge it gets the digests that a replay must reproduce.
Tensor bytes live in blobs, never here.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from coordinator.core.leases import Change, Dealt, Entry
from coordinator.core.rounds import Contribution
from coordinator.outer.optimizers import OuterRule
from coordinator.outer.step import Digests, Stepped
from coordinator.store import schema
from shared.errors import ConfigError, CorruptError
from shared.files import DISK, Disk

RESTORE = "restore the state directory from its mirror or a backup"
_CONTRIBUTIONS = "SELECT c.*, r.version AS version FROM contributions c LEFT JOIN rounds r ON c.round = r.seq"


@dataclass(frozen=True)
class StoredContribution:
    """A contribution's row: what the core knows, and where its bytes are. `version` is that of its round, where that is
    closed and still known."""

    contribution: Contribution
    blob: str
    size: int
    norm: float
    merged: bool
    version: int | None


@dataclass(frozen=True)
class StoredRound:
    """A round's row. What comes after the merge is None until it is published."""

    fragment: int
    version: int
    reason: str
    rule: OuterRule
    members: tuple[tuple[str, float], ...]
    tokens: int
    closed_at: float
    published_at: float | None
    delta: str | None
    delta_size: int | None
    digests: Digests | None
    merged_norm: float | None
    cosine: float | None

    @property
    def published_digest(self) -> str | None:
        return None if self.digests is None else self.digests.published


@dataclass(frozen=True)
class SiteRow:
    name: str
    session: str | None
    enrolled: bool
    active: bool
    revoked: bool
    has_token: bool
    added_at: float | None


class Journal:
    """One connection to the journal. Two threads may use it, in turn: one waits for the other."""

    def __init__(self, path: Path, *, read_only: bool = False, disk: Disk = DISK, checked: bool = False) -> None:
        """Opens (and, unless `read_only`, creates) the journal, and reads through it, unless another connection has
        `checked` it just now. Raises CorruptError."""
        self.path, self._disk = path, disk
        # SQLite has a lock of its own, but who waits for that one holds Python's, which a seal needs.
        self._turn = threading.RLock()
        uri = f"{path.resolve().as_uri()}{'?mode=ro' if read_only else ''}"
        with self._reading():
            self._db = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None, timeout=30)
            try:
                self._db.row_factory = sqlite3.Row
                if not checked:
                    self._prepare(read_only)
            except BaseException:
                self._db.close()
                raise

    def reader(self) -> Journal:
        """Another connection, for another thread, that reads only."""
        return Journal(self.path, read_only=True, checked=True)

    def _prepare(self, read_only: bool) -> None:
        if not read_only:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
        schema.prepare(self._db)
        self.check_integrity()
        fresh = self._one("SELECT 1 FROM sqlite_master WHERE name = 'meta'") is None
        if fresh and read_only:
            raise ConfigError(f"journal {self.path} is empty: no run was started here yet")
        if fresh:
            schema.create(self._db)
            return
        if (known := self.meta("schema")) != str(schema.SCHEMA_VERSION):
            # Before anything else is read or made: another version's journal stays as it is.
            raise CorruptError(f"journal {self.path} has schema {known}; this version reads {schema.SCHEMA_VERSION}")
        self.check_rows()

    def check_integrity(self) -> None:
        """Reads the whole file, indexes included. Raises CorruptError."""
        with self._reading():
            found = self._db.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(str(found))

    def check_rows(self) -> None:
        """Compares every row with its seal. Raises CorruptError naming the first one that differs."""
        with self._reading():
            if (fault := schema.check(self._db)) is not None:
                raise sqlite3.DatabaseError(fault)

    def close(self) -> None:
        self._db.close()

    # -- facts about the run

    def meta(self, key: str) -> str | None:
        row = self._one("SELECT value FROM meta WHERE key = ?", key)
        return None if row is None else str(row["value"])

    def set_meta(self, **values: str) -> None:
        with self._transaction("meta"):
            for key, value in values.items():
                self._put_meta(key, value)

    # -- sites

    def put_token(self, site: str, salt: bytes, token_hash: bytes, at: float) -> None:
        with self._transaction("token"):
            self._db.execute(
                "INSERT INTO sites (name, salt, token_hash, added_at) VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE"
                " SET salt = excluded.salt, token_hash = excluded.token_hash, added_at = excluded.added_at,"
                " revoked = 0",
                (site, salt, token_hash, at),
            )

    def revoke_token(self, site: str) -> bool:
        """Whether there was a token to revoke."""
        with self._transaction("token"):
            done = self._db.execute(
                "UPDATE sites SET revoked = 1 WHERE name = ? AND token_hash IS NOT NULL AND NOT revoked", (site,)
            )
        return done.rowcount > 0

    def token(self, site: str) -> tuple[bytes, bytes] | None:
        """(salt, hash) of the site's valid token."""
        row = self._one("SELECT salt, token_hash FROM sites WHERE name = ? AND NOT revoked", site)
        return None if row is None or row["token_hash"] is None else (row["salt"], row["token_hash"])

    def sites(self) -> list[SiteRow]:
        with self._reading():
            rows = self._db.execute("SELECT * FROM sites ORDER BY name").fetchall()
        return [
            SiteRow(
                row["name"],
                row["session"],
                bool(row["enrolled"]),
                bool(row["active"]),
                bool(row["revoked"]),
                row["token_hash"] is not None,
                row["added_at"],
            )
            for row in rows
        ]

    def site_joined(self, site: str, session: str) -> None:
        with self._transaction("join"):
            self._db.execute(
                "INSERT INTO sites (name, session) VALUES (?, ?)"
                " ON CONFLICT (name) DO UPDATE SET session = excluded.session",
                (site, session),
            )

    def enrol(self, site: str) -> None:
        """The site has a part of the data from now on."""
        with self._transaction("enrol"):
            self._db.execute("UPDATE sites SET enrolled = 1 WHERE name = ?", (site,))

    def forget_sessions(self) -> None:
        """Every agent has to join again, and so learns of a changed config."""
        with self._transaction("sessions"):
            self._db.execute("UPDATE sites SET session = NULL, active = 0")

    def start_run(self, sites: Sequence[str]) -> None:
        """Training begins with these sites; one fact, so that no recovery finds a start that nobody took part in."""
        with self._transaction("start"):
            self._put_meta("started", "1")
            named = [(site,) for site in sites]
            self._db.executemany("UPDATE sites SET active = 1, enrolled = 1 WHERE name = ?", named)

    def site_active(self, site: str, active: bool) -> None:
        with self._transaction("active"):
            self._db.execute("UPDATE sites SET active = ? WHERE name = ?", (int(active), site))

    # -- contributions and rounds

    def accept(
        self,
        contribution: Contribution,
        blob: str,
        size: int,
        norm: float,
        at: float,
        trained: Change | None = None,
    ) -> None:
        """The acknowledgement's truth: once this returns, the contribution cannot be lost, nor that the data behind it
        is `trained`."""
        with self._transaction("accept"):
            self._db.execute(
                "INSERT INTO contributions"
                " (id, site, fragment, base_version, tokens, steps, blob, size, norm, accepted_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*asdict(contribution).values(), blob, size, norm, at),
            )
            if trained is not None:
                self._write_leases(trained)

    def close_round(
        self,
        fragment: int,
        version: int,
        reason: str,
        members: Sequence[tuple[Contribution, float]],
        rule: OuterRule,
        at: float,
    ) -> None:
        """Fixes what the merge of this round will do, before it begins."""
        with self._transaction("close"):
            cursor = self._db.execute(
                "INSERT INTO rounds (fragment, version, reason, rule, contributions, tokens, closed_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    fragment,
                    version,
                    reason,
                    json.dumps(asdict(rule)),
                    json.dumps([[contribution.id, weight] for contribution, weight in members]),
                    sum(contribution.tokens for contribution, _ in members),
                    at,
                ),
            )
            self._db.executemany(
                "UPDATE contributions SET round = ? WHERE id = ?",
                [(cursor.lastrowid, contribution.id) for contribution, _ in members],
            )

    def publish(self, fragment: int, stepped: Stepped, delta: str, at: float) -> None:
        """The merge is done and its delta is on disk: the version exists from now on."""
        with self._transaction("publish"):
            self._db.execute(
                "UPDATE rounds SET published_at = ?, delta = ?, delta_size = ?, published_digest = ?,"
                " master_digest = ?, optimizer_digest = ?, merged_norm = ?, cosine = ?"
                " WHERE fragment = ? AND version = ?",
                (
                    at,
                    delta,
                    stepped.delta_size,
                    *astuple(stepped.digests),
                    stepped.merged_norm,
                    stepped.cosine,
                    fragment,
                    stepped.version,
                ),
            )

    def contribution(self, id_: str) -> StoredContribution | None:
        row = self._one(_CONTRIBUTIONS + " WHERE c.id = ?", id_)
        return None if row is None else _contribution(row)

    def acceptances(self) -> list[tuple[str, float]]:
        """(site, wall-clock time) of every contribution that the journal knows, in order of acceptance."""
        with self._reading():
            rows = self._db.execute("SELECT site, accepted_at FROM contributions ORDER BY seq").fetchall()
        return [(row["site"], row["accepted_at"]) for row in rows]

    def contributions(self, *, newest_of_each: bool = False) -> list[StoredContribution]:
        """In order of acceptance: those that no round holds, and with `newest_of_each` the last one of each
        site and fragment besides."""
        newest = "OR c.seq IN (SELECT MAX(seq) FROM contributions GROUP BY site, fragment)" if newest_of_each else ""
        with self._reading():
            rows = self._db.execute(f"{_CONTRIBUTIONS} WHERE c.round IS NULL {newest} ORDER BY c.seq").fetchall()
        return [_contribution(row) for row in rows]

    def rounds(self, fragment: int, after: int) -> list[StoredRound]:
        """The fragment's rounds of versions above `after`, in order."""
        with self._reading():
            rows = self._db.execute(
                "SELECT * FROM rounds WHERE fragment = ? AND version > ? ORDER BY version", (fragment, after)
            ).fetchall()
        return [_round(row) for row in rows]

    def newest_rounds(self, count: int) -> list[StoredRound]:
        """The last published rounds of the run, newest first."""
        with self._reading():
            rows = self._db.execute(
                "SELECT * FROM rounds WHERE published_at IS NOT NULL ORDER BY seq DESC LIMIT ?", (count,)
            ).fetchall()
        return [_round(row) for row in rows]

    def round(self, fragment: int, version: int) -> StoredRound | None:
        row = self._one("SELECT * FROM rounds WHERE fragment = ? AND version = ?", fragment, version)
        return None if row is None else _round(row)

    # -- leases of data

    def manifest(self) -> tuple[str, list[int]] | None:
        """The digest and the shards' sizes of the data that is leased; None where none is."""
        known = self.meta("manifest")
        if known is None:
            return None
        digest, sizes = json.loads(known)
        return digest, sizes

    def put_manifest(self, digest: str, sizes: Sequence[int]) -> None:
        self.set_meta(manifest=json.dumps([digest, list(sizes)]), dealt=json.dumps(astuple(Dealt())))

    def lease(self, change: Change) -> None:
        """Shards are leased, or came back."""
        with self._transaction("lease"):
            self._write_leases(change)

    def leases(self) -> tuple[list[Entry], Dealt]:
        """The entries, and how far the shards are dealt out."""
        with self._reading():
            rows = self._db.execute("SELECT * FROM leases ORDER BY epoch, shard").fetchall()
        entries = [
            Entry(row["epoch"], row["shard"], row["number"], row["site"], tuple(json.loads(row["positions"])))
            for row in rows
        ]
        epoch, shards, next_number, returned = json.loads(self.meta("dealt") or json.dumps(astuple(Dealt())))
        return entries, Dealt(epoch, shards, next_number, tuple(returned))

    def _write_leases(self, change: Change) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO leases (key, epoch, shard, number, site, positions) VALUES (?, ?, ?, ?, ?, ?)",
            [
                (f"{e.epoch}/{e.shard}", e.epoch, e.shard, e.number, e.site, json.dumps(e.positions))
                for e in change.entries
            ],
        )
        done = [(f"{epoch}/{shard}",) for epoch, shard in change.done]
        self._db.executemany("DELETE FROM leases WHERE key = ?", done)
        if change.dealt is not None:
            self._put_meta("dealt", json.dumps(astuple(change.dealt)))

    # -- evaluations

    def evaluate(self, site: str, tokens: int, loss: float, at: float) -> None:
        with self._transaction("evaluate"):
            self._db.execute(
                "INSERT INTO evaluations (site, tokens, loss, at) VALUES (?, ?, ?, ?)", (site, tokens, loss, at)
            )

    def evaluations(self) -> list[tuple[int, float]]:
        """(merged tokens, loss) in order."""
        with self._reading():
            rows = self._db.execute("SELECT tokens, loss FROM evaluations ORDER BY seq").fetchall()
        return [(row["tokens"], row["loss"]) for row in rows]

    # -- retention

    def prune(self, fragment: int, checkpoint: int, oldest_delta: int, oldest_row: int) -> list[str]:
        """Marks as pruned, and names, the blobs that are no longer needed: of contributions merged at or before the
        version `checkpoint`, and of deltas before `oldest_delta`. The caller then removes the files. Drops the rows of
        rounds before `oldest_row` and `checkpoint` whose blobs are pruned, and of what they merged, but for each
        site's newest contribution: by that one a site that was away is known."""
        with self._transaction("prune"):
            merged = (
                "SELECT c.blob FROM contributions c JOIN rounds r ON c.round = r.seq"
                " WHERE r.fragment = ? AND r.version <= ? AND NOT c.pruned"
            )
            blobs = [row["blob"] for row in self._db.execute(merged, (fragment, checkpoint))]
            self._db.execute(
                "UPDATE contributions SET pruned = 1 WHERE round IN"
                " (SELECT seq FROM rounds WHERE fragment = ? AND version <= ?)",
                (fragment, checkpoint),
            )
            old = "fragment = ? AND version < ? AND NOT pruned AND published_at IS NOT NULL"
            deltas = [
                row["delta"]
                for row in self._db.execute(f"SELECT delta FROM rounds WHERE {old}", (fragment, oldest_delta))
            ]
            self._db.execute(f"UPDATE rounds SET pruned = 1 WHERE {old}", (fragment, oldest_delta))
            gone = "fragment = ? AND version < ? AND pruned"
            oldest = min(oldest_row, checkpoint)
            self._db.execute(
                f"DELETE FROM contributions WHERE round IN (SELECT seq FROM rounds WHERE {gone}) AND seq NOT IN"
                " (SELECT MAX(seq) FROM contributions WHERE fragment = ? GROUP BY site)",
                (fragment, oldest, fragment),
            )
            self._db.execute(f"DELETE FROM rounds WHERE {gone}", (fragment, oldest))
        return blobs + deltas

    def needed_blobs(self) -> set[str]:
        """The digests of all blobs that are not pruned."""
        with self._reading():
            rows = self._db.execute(
                "SELECT blob FROM contributions WHERE NOT pruned"
                " UNION SELECT delta FROM rounds WHERE NOT pruned AND delta IS NOT NULL"
            ).fetchall()
        return {row["blob"] for row in rows}

    def contribution_blobs(self, fragment: int, after: int) -> list[str]:
        """The blobs of the fragment's contributions that no version up to `after` holds, in order of acceptance."""
        with self._reading():
            rows = self._db.execute(
                "SELECT c.blob FROM contributions c LEFT JOIN rounds r ON c.round = r.seq"
                " WHERE c.fragment = ? AND (r.seq IS NULL OR r.version > ?) ORDER BY c.seq",
                (fragment, after),
            ).fetchall()
        return [row["blob"] for row in rows]

    # -- mirrors

    def back_up(self, path: Path) -> None:
        """A copy of the journal as it is now, in one file; others may write meanwhile. Raises OSError."""
        try:
            # Connections of its own: nobody who writes waits for it.
            source = sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro", uri=True)
            target = sqlite3.connect(path)
            try:
                source.backup(target)
                target.execute("PRAGMA journal_mode = DELETE")
            finally:
                source.close()
                target.close()
        except sqlite3.Error as error:
            raise OSError(f"journal {self.path} cannot be copied: {error}") from error

    def restored(self, run: str, lineage: str, checkpoints: Mapping[int, int]) -> None:
        """This journal came from a mirror: the run has another name from now on, its agents have to join again, and of
        its blobs there are the contributions after the `checkpoints` (fragment: version), and no deltas."""
        with self._transaction("restored"):
            for key, value in {"run": run, "lineage": lineage}.items():
                self._put_meta(key, value)
            self._db.execute("UPDATE sites SET session = NULL, active = 0")
            for fragment, version in checkpoints.items():
                self._db.execute(
                    "UPDATE contributions SET pruned = 1 WHERE round IN"
                    " (SELECT seq FROM rounds WHERE fragment = ? AND version <= ?)",
                    (fragment, version),
                )
            self._db.execute("UPDATE rounds SET pruned = 1 WHERE published_at IS NOT NULL")

    # -- plumbing

    def _put_meta(self, key: str, value: str) -> None:
        """Within a transaction."""
        self._db.execute(
            "INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            (key, value),
        )

    def _one(self, statement: str, *parameters: object) -> sqlite3.Row | None:
        with self._reading():
            row: sqlite3.Row | None = self._db.execute(statement, parameters).fetchone()
        return row

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with self._turn:
                yield
        except sqlite3.OperationalError as error:
            if "decode" not in str(error):
                raise OSError(f"journal {self.path}: {error}") from error
            raise CorruptError(f"journal {self.path} is corrupt ({error}); {RESTORE}") from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise CorruptError(f"journal {self.path} is corrupt ({reason}); {RESTORE}") from error

    @contextmanager
    def _transaction(self, name: str) -> Iterator[None]:
        """One durable transaction; `name` says which, for those who watch. Raises OSError where the disk refuses."""
        with self._reading():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._commit(name)
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _commit(self, name: str) -> None:
        self._disk.commit(name, lambda: self._db.execute("COMMIT"))


def _contribution(row: sqlite3.Row) -> StoredContribution:
    fields = (row[key] for key in ("id", "site", "fragment", "base_version", "tokens", "steps"))
    return StoredContribution(
        Contribution(*fields),
        row["blob"],
        row["size"],
        row["norm"],
        merged=row["round"] is not None,
        version=row["version"],
    )


def _round(row: sqlite3.Row) -> StoredRound:
    return StoredRound(
        fragment=row["fragment"],
        version=row["version"],
        reason=row["reason"],
        rule=OuterRule(**json.loads(row["rule"])),
        members=tuple((id_, weight) for id_, weight in json.loads(row["contributions"])),
        tokens=row["tokens"],
        closed_at=row["closed_at"],
        published_at=row["published_at"],
        delta=row["delta"],
        delta_size=row["delta_size"],
        digests=(
            None
            if row["published_at"] is None
            else Digests(row["published_digest"], row["master_digest"], row["optimizer_digest"])
        ),
        merged_norm=row["merged_norm"],
        cosine=row["cosine"],
    )
