"""What the last rounds were made of, for `status` and the page: who took part, how stale, with what weight."""

from __future__ import annotations

from collections import deque
from typing import Any

from coordinator.store.journal import Journal, StoredRound

ROUNDS = 24


class History:
    """The last published rounds as JSON objects, newest first."""

    def __init__(self, journal: Journal) -> None:
        self._rounds = deque(
            (_document(journal, round_) for round_ in reversed(journal.newest_rounds(ROUNDS))), maxlen=ROUNDS
        )

    def read(self, journal: Journal, fragment: int, version: int) -> dict[str, Any] | None:
        """The document of a round that was just published; for a thread that may wait for the disk."""
        round_ = journal.round(fragment, version)
        return None if round_ is None else _document(journal, round_)

    def add(self, document: dict[str, Any] | None) -> None:
        if document is not None:
            self._rounds.append(document)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return list(reversed(self._rounds))


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
