"""Site tokens: random, shown once, stored as a salted hash.

A token has 256 random bits, so one round of SHA-256 under a salt is as strong as a slow hash would be for a
password, and cheap enough for every request.
"""

from __future__ import annotations

import hmac
import re
import secrets
import time
from hashlib import sha256

from coordinator.store.journal import Journal
from shared.config import SITE_NAME
from shared.errors import ConfigError


def add_token(journal: Journal, site: str) -> str:
    """A new token for `site`; an older one stops working. Raises ConfigError for a name that cannot be one."""
    if not re.fullmatch(SITE_NAME, site):
        raise ConfigError(f"{site!r} cannot be a site's name: letters a-z, digits, '.', '_' and '-', at most 64")
    token = secrets.token_urlsafe(32)
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
