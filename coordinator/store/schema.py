"""The journal's tables, and the seal of each row: SQLite does not notice a bit that changed inside a row.

Every row has a digest of its values, which triggers keep; `check` reads all rows and names the first one that is not
what was written.
"""

from __future__ import annotations

import sqlite3
from typing import Any

import msgpack
import xxhash

SCHEMA_VERSION = 5

_TABLES = {
    "meta": "key TEXT PRIMARY KEY, value TEXT NOT NULL",
    "sites": """
        name TEXT PRIMARY KEY, salt BLOB, token_hash BLOB, revoked INTEGER NOT NULL DEFAULT 0, added_at REAL,
        session TEXT, enrolled INTEGER NOT NULL DEFAULT 0, active INTEGER NOT NULL DEFAULT 0""",
    "contributions": """
        seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, site TEXT NOT NULL, fragment INTEGER NOT NULL,
        base_version INTEGER NOT NULL, tokens INTEGER NOT NULL, steps INTEGER NOT NULL, blob TEXT NOT NULL,
        size INTEGER NOT NULL, norm REAL NOT NULL, accepted_at REAL NOT NULL, round INTEGER,
        pruned INTEGER NOT NULL DEFAULT 0""",
    "rounds": """
        seq INTEGER PRIMARY KEY AUTOINCREMENT, fragment INTEGER NOT NULL, version INTEGER NOT NULL,
        reason TEXT NOT NULL, rule TEXT NOT NULL, contributions TEXT NOT NULL, tokens INTEGER NOT NULL,
        closed_at REAL NOT NULL, published_at REAL, delta TEXT, delta_size INTEGER, published_digest TEXT,
        master_digest TEXT, optimizer_digest TEXT, merged_norm REAL, cosine REAL,
        pruned INTEGER NOT NULL DEFAULT 0""",
    "evaluations": """
        seq INTEGER PRIMARY KEY AUTOINCREMENT, site TEXT NOT NULL, tokens INTEGER NOT NULL, loss REAL NOT NULL,
        at REAL NOT NULL""",
    "leases": """
        key TEXT PRIMARY KEY, epoch INTEGER NOT NULL, shard INTEGER NOT NULL, number INTEGER NOT NULL, site TEXT,
        positions TEXT NOT NULL""",
}
"""The columns of each table, the key first."""

_INDEXES = """
CREATE UNIQUE INDEX versions ON rounds (fragment, version);
CREATE INDEX open_contributions ON contributions (round);
CREATE INDEX contributions_by_site ON contributions (fragment, site);
"""


def seal(*values: Any) -> str:
    """The digest of a row's values."""
    return xxhash.xxh3_64_hexdigest(msgpack.packb(values))


def prepare(db: sqlite3.Connection) -> None:
    """Makes `seal` known to a connection that writes, or that checks."""
    db.create_function("seal", -1, seal, deterministic=True)


def create(db: sqlite3.Connection) -> None:
    """Makes the tables, in one transaction."""
    db.executescript(f"BEGIN IMMEDIATE;\n{_script()}\nCOMMIT;")


def check(db: sqlite3.Connection) -> str | None:
    """Which row is not what was written; None where all are."""
    for table, columns in _TABLES.items():
        key, *_ = names = _names(columns)
        sealed = f"seal('{table}', {', '.join(names)})"
        try:
            found = db.execute(f"SELECT {key} FROM {table} WHERE seal IS NOT {sealed} LIMIT 1").fetchone()
        except sqlite3.OperationalError as error:
            if "user-defined function" not in str(error):
                raise
            return f"a row of {table} holds text that is none"
        if found is not None:
            return f"row {found[0]} of {table} is not what was written"
    return None


def _script() -> str:
    lines = []
    for table, columns in _TABLES.items():
        key, *_ = names = _names(columns)
        lines.append(f"CREATE TABLE {table} ({columns}, seal TEXT);")
        new = ", ".join(f"NEW.{name}" for name in names)
        write = f"UPDATE {table} SET seal = seal('{table}', {new}) WHERE {key} = NEW.{key};"
        lines.append(f"CREATE TRIGGER {table}_insert AFTER INSERT ON {table} BEGIN {write} END;")
        # The seal's own update is one that changes the seal.
        lines.append(
            f"CREATE TRIGGER {table}_update AFTER UPDATE ON {table} WHEN NEW.seal IS OLD.seal BEGIN {write} END;"
        )
    return "\n".join([*lines, _INDEXES, f"INSERT INTO meta (key, value) VALUES ('schema', '{SCHEMA_VERSION}');"])


def _names(columns: str) -> list[str]:
    return [column.split()[0] for column in columns.split(",")]
