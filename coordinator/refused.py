"""A refusal on its way to the client."""

from __future__ import annotations

from shared.protocol import Code


class Refused(Exception):
    """A request that is answered with a problem document; `version` is the newest that the site should know."""

    def __init__(self, code: Code, detail: str, version: int | None = None) -> None:
        super().__init__(detail)
        self.code, self.detail, self.version = code, detail, version
