"""A setting of `benchmarks.quality` as it runs in the world: a coordinator and its sites as processes, over HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.fleet import Fleet, coordinator_status

SITE = """
[site]
name = "{name}"
coordinator = "{url}"
state = "state-{name}"
[devices]
device = "cpu"
threads = 1
[metrics]
port = 0
"""


def train(tables: Mapping[str, Mapping[str, Any]], names: list[str]) -> dict[str, Any]:
    """Trains the run of these tables with one agent for each name: the status at its end, and `seconds`."""
    with tempfile.TemporaryDirectory(prefix="isthmus-processes-") as directory, Fleet(Path(directory)) as fleet:
        return asyncio.run(_train(fleet, tables, names))


async def _train(fleet: Fleet, tables: Mapping[str, Mapping[str, Any]], names: list[str]) -> dict[str, Any]:
    port = free_port()
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    write_toml(fleet.directory / "run.toml", tables)
    fleet.start(
        "coordinator",
        ["isthmus", "coordinator", "serve", "run.toml", "--state", "state", "--port", str(port), "--insecure"],
    )
    while await asyncio.to_thread(coordinator_status, url) is None:
        fleet.check()
        await asyncio.sleep(0.2)
    agents = []
    for name in names:
        (fleet.directory / f"{name}.toml").write_text(SITE.format(name=name, url=url), encoding="utf-8")
        agents.append(fleet.start(name, ["isthmus", "site", "run", f"{name}.toml"]))
    for agent in agents:
        await fleet.wait(agent)
    status = await asyncio.to_thread(coordinator_status, url)
    if status is None:
        raise RuntimeError("the coordinator did not answer at the end of the run")
    return {**status, "seconds": time.monotonic() - began}


def free_port() -> int:
    """A port on loopback that nobody has now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def write_toml(path: Path, tables: Mapping[str, Mapping[str, Any]]) -> None:
    """A config file of these tables."""
    lines = [line for table, keys in tables.items() for line in (f"[{table}]", *map(_assignment, keys.items()))]
    path.write_text("\n".join(lines), encoding="utf-8")


def _assignment(item: tuple[str, Any]) -> str:
    """`key = value`: JSON's numbers, texts, truth values and lists are TOML's."""
    return f"{item[0]} = {json.dumps(item[1])}"
