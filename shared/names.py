"""The names of those who take part: sites, and the learners of a site whose devices differ too much to train as one.

A learner takes part by itself, with its site's token: it is named SITE~NAME, such as `eu-west~910b`. A site's own name
has no '~', so whose learner it is shows in its name alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

SITE_NAME = r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$"
PARTICIPANT_NAME = r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?(~[a-z0-9._-]{1,32})?$"
"""A site, or a learner of one."""
LONGEST_NAME = 64 + 1 + 32
MOST_LEARNERS = 32
"""Of one site in one run: whoever has a token must not be able to grow without bound what is kept for each name."""


def site_of(name: str) -> str:
    """The site that a participant belongs to: itself, or the one whose learner it is."""
    return name.partition("~")[0]


def by_site(values: Mapping[str, T]) -> dict[str, list[T]]:
    """The values of participants, by the site that they belong to."""
    found: dict[str, list[T]] = {}
    for name, value in values.items():
        found.setdefault(site_of(name), []).append(value)
    return found
