"""What every codec promises."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from shared.codecs import kernels
from shared.codecs.kernels import F32, U8
from shared.errors import FormatError

NOTHING = np.empty(0, dtype=np.float32)

_FLAWS = {
    kernels.NOT_FINITE: "a {} is NaN or infinite",
    kernels.NEGATIVE: "a {} is negative",
    kernels.LEVELS_CROSS: "its low {} is above the high one",
    kernels.OUT_OF_ORDER: "its indices are not in order",
    kernels.OUT_OF_RANGE: "an index is beyond its block",
    kernels.BAD_MODE: "a block's indices are coded in a way that is not known here",
    kernels.WRONG_LENGTH: "its indices do not end where it does",
}


class Codec(ABC):
    """Raw bytes of a chunk, and the values that they stand for."""

    name: str

    @abstractmethod
    def size(self, elements: int) -> int:
        """The most raw bytes that a chunk of `elements` can take."""

    def least(self, elements: int) -> int:
        """The fewest that it can take; for most codecs the same."""
        return self.size(elements)

    @abstractmethod
    def encode(self, x: F32, target: F32 | None = None, sign: float = 1.0) -> U8:
        """fp32 (n,) to raw bytes; `target` += sign · decoded in the same pass, where one is given.

        With `x` itself as target and sign −1 it leaves in `x` what the codec lost. Raises ValueError on NaN, infinity,
        or what is too large; `target` is of no use then.
        """

    @abstractmethod
    def accumulate(self, raw: U8, weight: float, acc: F32) -> None:
        """acc += weight · decoded, in place; acc is fp32 (n,), raw what `screen` has found sound."""

    @abstractmethod
    def screen(self, raw: U8, elements: int) -> float:
        """Σ decoded², in double precision. Raises FormatError where `raw` could decode to anything but finite values
        that training can survive (`kernels.LARGEST_VALUE`)."""

    def decode(self, raw: U8, elements: int) -> F32:
        """Raw bytes to fp32 (elements,)."""
        out = np.zeros(elements, dtype=np.float32)
        self.accumulate(raw, 1.0, out)
        return out

    def require_sound(self, flaw: int) -> None:
        """Raises ValueError where an encoding kernel found a flaw."""
        if flaw == kernels.TOO_LARGE:
            raise ValueError(f"a value to encode is too large for {self.name}")
        if flaw != kernels.SOUND:
            raise ValueError("a value to encode is NaN or infinite")


def refuse_flaw(flaw: int, what: str, found: float, reach: float = 1.0) -> None:
    """Raises FormatError where a screening kernel found a flaw; `what` it is that has values. Where it is too large,
    `found` is what it is, and `reach` how many times larger the largest value is that it can make."""
    if flaw == kernels.TOO_LARGE:
        values = f" and makes values of up to {found * reach:.9g}" if reach != 1.0 else ""
        raise FormatError(
            f"a {what} of {found:.9g} is absurd{values}: "
            f"no training survives a change of a weight by more than {kernels.LARGEST_VALUE:.9g}"
        )
    if flaw != kernels.SOUND:
        raise FormatError(_FLAWS[flaw].format(what))
