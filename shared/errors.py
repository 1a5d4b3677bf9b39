"""The exception tree. Every message is one sentence for the person who must act: what, where, what to do.

IsthmusError            exit code 1: should not reach a user
├── ConfigError         exit code 2: bad usage, bad file, impossible setting
├── RefusedError        exit code 3: the coordinator said no, with a stable `code`
├── FaultError          exit code 4: gave up on faults (network, disk)
│   ├── CorruptError    exit code 4: a file's bytes are not what its digest says
│   └── LostError       exit code 75: another process of the same site is gone
└── FormatError         a message or container that is malformed; its sender is at fault
"""

from __future__ import annotations


class IsthmusError(Exception):
    """Base of all errors that Isthmus raises on purpose."""

    exit_code = 1


class ConfigError(IsthmusError):
    """A file, key or argument that cannot be used, named with what would do."""

    exit_code = 2


class RefusedError(IsthmusError):
    """The coordinator refused a request; `code` is stable and `detail` says why."""

    exit_code = 3

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{detail} ({code})")
        self.code = code
        self.detail = detail


class FaultError(IsthmusError):
    """A fault that lasted longer than the patience it was given."""

    exit_code = 4


class CorruptError(FaultError):
    """Bytes on disk that do not match their digest or their journal."""


class LostError(FaultError):
    """Another process of this site is gone; it, or the launcher, says why. Its exit code is for the launcher, which
    starts all of them again."""

    exit_code = 75


class FormatError(IsthmusError):
    """A wire container or message that breaks its own format; nothing of it is used."""
