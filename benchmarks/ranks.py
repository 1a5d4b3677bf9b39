"""The processes of a site, which train as they are told; `benchmarks.mixed_rank` is what each of them is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from benchmarks.processes import free_port, write_toml
from shared.errors import FaultError

LAST_WORDS = 5
END_SECONDS = 20.0


class Ranks:
    """A site with these `[devices]`, a process for each of its `device` list, in a directory of its own: one thread of
    torch each, Gloo over loopback. `paths` is the text. Leaving the context ends them."""

    def __init__(self, directory: Path, devices: Mapping[str, Any], paths: Path) -> None:
        directory.mkdir()
        self._log = directory / "log"
        tables = {
            "site": {"name": directory.name, "coordinator": "http://127.0.0.1", "state": "state"},
            "devices": {**devices, "threads": 1},
            "data": {"paths": str(paths)},
        }
        write_toml(directory / "site.toml", tables)
        size, port = len(devices["device"]), free_port()
        self._processes = [self._start(directory, rank, size, port) for rank in range(size)]

    def _start(self, directory: Path, rank: int, size: int, port: int) -> subprocess.Popen[str]:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in places.items()}}
        if sys.platform == "linux":
            env["GLOO_SOCKET_IFNAME"] = "lo"
        root = str(Path(__file__).resolve().parents[1])
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.mixed_rank"],
                cwd=directory,
                stdin=subprocess.DEVNULL if rank else subprocess.PIPE,
                stdout=log if rank else subprocess.PIPE,
                stderr=log,
                env=env,
                text=True,
            )

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """Has an order of `mixed_rank.Head` carried out. Raises FaultError where a process fails."""
        self.tell(do, **more)
        return self.answer()

    def tell(self, do: str, **more: Any) -> None:
        """The same without waiting for the `answer`."""
        print(json.dumps({"do": do, **more}), file=_pipe(self._processes[0].stdin), flush=True)

    def answer(self) -> dict[str, Any]:
        line = _pipe(self._processes[0].stdout).readline()
        if not line:
            last = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_WORDS:]
            raise FaultError("a rank failed:\n" + "\n".join(last))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _pipe(self._processes[0].stdin).close()
        for process in self._processes:
            try:
                process.wait(0.0 if kind else END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        _pipe(self._processes[0].stdout).close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise AssertionError("a pipe was asked for")
    return pipe
