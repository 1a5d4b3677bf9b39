"""Site tokens: random, shown once, stored as a salted hash. One that is there may be taken over, so that a site has the
same at each of several coordinators.

A token has 256 random bits, so one round of SHA-256 under a salt is as strong as a slow hash would be for a
password, and cheap enough for every request.
"""

from __future__ import annotations

import hmac
import re
import secrets
import time
from hashlib import sha256
from pathlib import Path

from coordinator.store.journal import Journal
from shared.errors import ConfigError
from shared.names import SITE_NAME, site_of

_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
"""What `secrets.token_urlsafe(32)` makes. Nothing else is taken over: what a person thought of can be guessed."""


def read_token(file: Path) -> str:
    """The token that another coordinator made, from a file. Raises ConfigError."""
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--token-file {file} cannot be read: {getattr(error, 'strerror', None) or error}; name a file that holds "
            "what `isthmus coordinator token add` printed"
        ) from None
    if not _TOKEN.fullmatch(token):
        raise ConfigError(f"--token-file {file} does not hold what `isthmus coordinator token add` printed")
    return token


def add_token(journal: Journal, site: str, token: str | None = None) -> str:
    """A new token for `site`, or the one that is given; an older one stops working. Raises ConfigError for a name that
    cannot be one."""
    if "~" in site:
        raise ConfigError(f"{site} would be a learner, and comes with its site's token: add one for {site_of(site)}")
    if not re.fullmatch(SITE_NAME, site):
        raise ConfigError(f"{site!r} cannot be a site's name: letters a-z, digits, '.', '_' and '-', at most 64")
    token = token or secrets.token_urlsafe(32)
    salt = secrets.token_bytes(16)
    journal.put_token(site, salt, _hash(salt, token), time.time())
    return token


def check_token(journal: Journal, site: str, token: str) -> bool:
    """Whether `token` is the site's valid one."""
    stored = journal.token(site)
    if stored is None:
        return False
    salt, expected = stored
    return hmac.compare_digest(_hash(salt, token), expected)


def _hash(salt: bytes, token: str) -> bytes:
    return sha256(salt + token.encode()).digest()
