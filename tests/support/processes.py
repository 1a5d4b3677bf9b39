"""Real programs as child processes, for what only a real process can show."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 120.0
ROOT = Path(__file__).parents[2]


def start(arguments: list[str], directory: Path, log: Path) -> subprocess.Popen[bytes]:
    """`python -m isthmus ARGUMENTS…` in `directory`, its output in `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "isthmus", *arguments],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
            # What a shell starts in the background ignores SIGINT, and so would everything below it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def get(url: str) -> Any:
    """The JSON document at `url`; None where nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)
    except (urllib.error.URLError, OSError, ValueError):
        return None


def until(what: str, true: Callable[[], Any]) -> Any:
    """Asks until the answer is true, and returns it; fails after a long time."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        if answer := true():
            return answer
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come about in {PATIENCE_SECONDS:.0f} s")


def processes_in(directory: Path) -> list[int]:
    """The processes whose working directory is below `directory`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                where = (entry / "cwd").resolve()
            except OSError:
                continue
            if where.is_relative_to(directory):
                found.append(int(entry.name))
    return found
