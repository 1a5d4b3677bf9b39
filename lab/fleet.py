"""Child processes that cannot outlive their parent: started apart from the terminal, stopped gently, then not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from shared.errors import FaultError
from shared.program import signal_when_parent_ends

STOP_SECONDS = 10.0
LOOPBACK = "127.0.0.1,localhost,::1"


class Child:
    """One process; its output is in `log`."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.process, self.log = name, process, log

    def last_words(self, lines: int = 5) -> str:
        """The end of its output."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:])


class Fleet:
    """Starts `isthmus` programs as children. Leaving the context stops those that are still running."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.children: list[Child] = []

    def start(self, name: str, arguments: list[str], env: dict[str, str] | None = None) -> Child:
        """Runs `python -m ARGUMENTS…` in the fleet's directory."""
        log = self.directory / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Loopback is never reached through a proxy, whatever the machine uses for the rest.
                env={**os.environ, "NO_PROXY": LOOPBACK, "no_proxy": LOOPBACK, **(env or {})},
                start_new_session=True,
                # In the child, before it becomes the program.
                preexec_fn=partial(signal_when_parent_ends, signal.SIGKILL),
            )
        child = Child(name, process, log)
        self.children.append(child)
        return child

    def check(self) -> None:
        """Raises FaultError where a child has failed, with its last words."""
        for child in self.children:
            if child.process.poll() not in (None, 0):
                raise FaultError(f"{child.name} ended with code {child.process.returncode}:\n{child.last_words()}")

    async def wait(self, child: Child) -> None:
        """Until the child has ended well. Raises FaultError where any has not."""
        while child.process.poll() is None:
            self.check()
            await asyncio.sleep(0.1)
        self.check()

    def stop(self, child: Child) -> None:
        """SIGTERM, and SIGKILL for what does not listen."""
        if child.process.poll() is None:
            child.process.terminate()
            try:
                child.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in reversed(self.children):
            with contextlib.suppress(ProcessLookupError):
                child.process.terminate()
        for child in reversed(self.children):
            self.stop(child)


def coordinator_status(url: str) -> dict[str, Any] | None:
    """The status document of the coordinator at `url` on this machine; None where it does not answer (yet)."""
    # Loopback is never reached through a proxy.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/v1/status", timeout=5) as answer:
            document: dict[str, Any] = json.load(answer)
    except (urllib.error.URLError, OSError, ValueError):
        return None
    return document
