"""What all commands have in common: one-sentence errors, exit codes, and a log that reads well."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

from shared.errors import FaultError, IsthmusError, LostError

P = ParamSpec("P")
R = TypeVar("R")
_PR_SET_PDEATHSIG = 1
DATES = "%Y-%m-%d %H:%M:%S"


def command(function: Callable[P, R]) -> Callable[P, R]:
    """A typer command that ends in one sentence on stderr and its exit code, never in a traceback."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except LostError as error:
            # Of several processes, one speaks.
            if os.environ.get("RANK", "0") != "0":
                raise SystemExit(error.exit_code) from None
            fail(str(error), error.exit_code)
        except IsthmusError as error:
            fail(str(error), error.exit_code)
        except OSError as error:
            fail(f"{error}; see to the disk or the network and try again", FaultError.exit_code)
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    return run


def signal_when_parent_ends(number: signal.Signals) -> None:
    """The kernel sends this process a signal when its parent is gone, however that went; where the kernel is Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def fail(sentence: str, exit_code: int) -> NoReturn:
    """Prints the sentence and ends the program."""
    print(f"isthmus: {sentence}", file=sys.stderr)
    raise SystemExit(exit_code)


def name_in_log(name: str) -> None:
    """From here on log lines say whose they are: several have the same stderr."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname).1s {name} %(name)s: %(message)s", DATES))


def set_up_logging() -> None:
    """Log lines on stderr; the level comes from ISTHMUS_LOG (debug, info, warning)."""
    level = os.environ.get("ISTHMUS_LOG", "info").upper()
    logging.basicConfig(
        level=getattr(logging, level, logging.INFO),
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
        datefmt=DATES,
        stream=sys.stderr,
    )
