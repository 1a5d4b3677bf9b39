"""What the last rounds were made of, for `status` and the page: who took part, how stale, with what weight.

Read from the journal when somebody asks, so that no merge waits for it.
"""

from __future__ import annotations

from typing import Any

from coordinator.store.journal import Journal, StoredRound

ROUNDS = 24


class History:
    """The last published rounds as JSON objects, newest first. `read` is for one thread at a time, which may wait for
    the disk; what it has read it keeps."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._known: dict[tuple[int, int], dict[str, Any]] = {}

    def read(self) -> list[dict[str, Any]]:
        """Raises OSError."""
        rounds = {(round_.fragment, round_.version): round_ for round_ in self.journal.newest_rounds(ROUNDS)}
        self._known = {key: self._known.get(key) or _document(self.journal, round_) for key, round_ in rounds.items()}
        return list(self._known.values())


def _document(journal: Journal, round_: StoredRound) -> dict[str, Any]:
    members = [(journal.contribution(id_), weight) for id_, weight in round_.members]
    return {
        "fragment": round_.fragment,
        "version": round_.version,
        "reason": round_.reason,
        "closed_at": round_.closed_at,
        "published_at": round_.published_at,
        "tokens": round_.tokens,
        "share": round_.rule.share,
        "merged_norm": round_.merged_norm,
        "cosine": round_.cosine,
        "contributions": [
            {
                "site": stored.contribution.site,
                "staleness": round_.version - 1 - stored.contribution.base_version,
                "weight": weight,
                "tokens": stored.contribution.tokens,
                "steps": stored.contribution.steps,
                "norm": stored.norm,
            }
            for stored, weight in members
            if stored is not None
        ],
    }
