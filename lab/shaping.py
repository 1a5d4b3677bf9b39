"""What a long, thin link does to bytes, as arithmetic: no clock and no sockets; the time is passed in.

One `Shaper` is one direction of a link. All connections of that direction queue, first in first out,
before one bottleneck of `rate` bytes/s; what leaves it arrives half a round trip (and some jitter) later.
`lab.link` moves real bytes by these times.

What is modelled is a link under TCP, as a program above TCP sees it. A lost packet is never missing up
there: it is late by the round trip that its retransmission takes, and everything behind it in the same
connection waits for it. Left out, so that numbers can be checked by hand: slow start, congestion windows
that shrink after a loss, packet headers, and the bytes of retransmissions. A real link of the same rate is
a little slower, most of all for the first round trips of a connection.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Final, Literal, NamedTuple

from shared.errors import ConfigError

SEGMENT_BYTES: Final = 1460
"""Payload of a full TCP segment in an Ethernet frame: the unit that is lost."""

_RATES: Final = {"gbit": 125e6, "mbit": 125e3, "kbit": 125.0, "bit": 0.125, "GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}
_DURATIONS: Final = {"m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
_QUANTITY: Final = re.compile(r"(\d+(?:\.\d+)?|\.\d+) ?([A-Za-z]+)(/s)?")


def parse_rate(text: str) -> float:
    """Bytes per second of "50mbit", "1.5gbit", "800kB", "6MB/s"; multiples are of 1000, as in tc.

    Bits are spelt "bit" and bytes "B". "Mb" and "mbps" are refused: people mean bits by them, tc bytes.
    """
    match = _QUANTITY.fullmatch(text.strip())
    if match is not None:
        unit = match[2].lower() if match[2].lower().endswith("bit") else match[2]
        factor = _RATES.get("kB" if unit == "KB" else unit)
        if factor is not None and 0 < (rate := float(match[1]) * factor) < math.inf:
            return rate
    raise ConfigError(f'rate "{text}" cannot be read: write a number above 0 in kbit, mbit, gbit, kB, MB or GB: 50mbit')


def parse_duration(text: str) -> float:
    """Seconds of "250us", "80ms", "1.5s" or "2m" (minutes)."""
    match = _QUANTITY.fullmatch(text.strip())
    if match is not None and match[2] in _DURATIONS and match[3] is None:
        seconds = float(match[1]) * _DURATIONS[match[2]]
        if seconds < math.inf:
            return seconds
    raise ConfigError(f'duration "{text}" cannot be read: write a number in us, ms, s or m (minutes): 80ms')


def format_rate(rate: float) -> str:
    """The rate (bytes/s) as `parse_rate` reads it, in bits; "unlimited" when infinite."""
    if math.isinf(rate):
        return "unlimited"
    unit = next((unit for unit in ("gbit", "mbit", "kbit") if rate >= _RATES[unit]), "bit")
    return _plain(rate / _RATES[unit]) + unit


def format_duration(seconds: float) -> str:
    """The duration (seconds) as `parse_duration` reads it."""
    unit = next((unit for unit in ("s", "ms") if seconds >= _DURATIONS[unit]), "us") if seconds else "s"
    return _plain(seconds / _DURATIONS[unit]) + unit


def _plain(number: float) -> str:
    return f"{number:.6f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class LinkSettings:
    """What the link is like, in both directions.

    rate: bytes/s of payload in each direction. rtt: seconds there and back. jitter: up to so many seconds
    more, each way, evenly spread. loss: the chance of each segment to need a retransmission. cut_every:
    seconds, on average, between resets of all connections; None for never. Equal seeds give equal links.
    """

    rate: float = math.inf
    rtt: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    cut_every: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ConfigError(f"rate is {self.rate} bytes/s: a link needs a rate above 0, or none for unlimited")
        for name, seconds in (("rtt", self.rtt), ("jitter", self.jitter)):
            if not 0 <= seconds < math.inf:
                raise ConfigError(f"{name} is {seconds} seconds: use 0 or more")
        if not 0 <= self.loss < 1:
            raise ConfigError(
                f"loss is {self.loss}: use a fraction from 0 to below 1 (0.01 is one packet in a hundred)"
            )
        if self.cut_every is not None and not 0 < self.cut_every < math.inf:
            raise ConfigError(f"cut is every {self.cut_every} seconds: use a time above 0, or leave it out for no cuts")

    @cached_property
    def buffer_bytes(self) -> int:
        """What may wait before the bottleneck, and what one connection may have under way: about rate x rtt.

        Less would leave the link idle, more would hide it from the sender. The floors are 64 KiB and the
        bytes of 10 ms, so that a timer that wakes late by a millisecond costs no throughput.
        """
        if math.isinf(self.rate):
            return 16 << 20
        return max(64 << 10, math.ceil(self.rate * max(self.rtt + self.jitter, 0.010)))

    @cached_property
    def chunk_bytes(self) -> int:
        """The most that passes the bottleneck at once: 4 ms of it. Smaller is smoother, in exchange for CPU time."""
        return int(min(max(self.rate * 0.004, SEGMENT_BYTES), 64 << 10))

    def __str__(self) -> str:
        words = [format_rate(self.rate), format_duration(self.rtt)]
        if self.jitter:
            words.append(f"jitter {format_duration(self.jitter)}")
        if self.loss:
            words.append(f"loss {self.loss:.4g}")
        if self.cut_every is not None:
            words.append(f"cut {format_duration(self.cut_every)}")
        return " ".join(words)


class Passage(NamedTuple):
    """When a chunk has left the bottleneck and when it arrives, in seconds of the caller's clock."""

    leaves: float
    arrives: float


class Shaper:
    """One direction of a link: the bottleneck that all of its connections share.

    The two directions of one seed draw different numbers. A chunk draws two, whatever the settings, so
    that adding loss to a link does not change its jitter.
    """

    def __init__(self, settings: LinkSettings, direction: Literal["up", "down"]) -> None:
        self._settings = settings
        self._random = Random(f"{settings.seed}/{direction}")
        self._free_at = -math.inf  # when the bottleneck has passed all that it was given

    def room_at(self, now: float) -> float:
        """The earliest time, `now` or later, at which no more than `buffer_bytes` wait before the bottleneck."""
        return max(now, self._free_at - self._settings.buffer_bytes / self._settings.rate)

    def send(self, now: float, nbytes: int, after: float = -math.inf) -> Passage:
        """Put `nbytes` behind all that was sent before, and say when they are through.

        `after` is the arrival of the same connection's last chunk: TCP delivers in order, so this one is
        not earlier. Connections do not wait for each other's retransmissions, only for the bottleneck.
        A chunk with several lost segments is late by one round trip, as selective acknowledgement has it.
        """
        settings = self._settings
        self._free_at = leaves = max(now, self._free_at) + nbytes / settings.rate
        jitter = settings.jitter * self._random.random()
        kept = (1 - settings.loss) ** math.ceil(nbytes / SEGMENT_BYTES)
        retransmission = settings.rtt if self._random.random() >= kept else 0.0
        return Passage(leaves, max(after, leaves + settings.rtt / 2 + jitter + retransmission))


def next_cut(now: float, every: float, random: Random) -> float:
    """When connections are reset next: between half and one and a half of `every` seconds from now.

    Even on average, but never in step with anything that is periodic itself, such as a heartbeat.
    """
    return now + every * (0.5 + random.random())
