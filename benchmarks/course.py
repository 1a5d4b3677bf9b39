"""A run of real processes that can be disturbed: killed, stopped, cut off, and started again."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import SITE, free_port, write_toml
from lab.fleet import Child, Fleet, coordinator_status

LINK = ("--rate", "20mbit", "--rtt", "80ms")


class Course:
    """A coordinator and `sites`, all of it in the fleet's directory; those in `links` behind an emulated link with
    these options of `isthmus link`."""

    def __init__(
        self,
        fleet: Fleet,
        tables: Mapping[str, Mapping[str, Any]],
        sites: Sequence[str],
        links: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.fleet, self.sites, self._links = fleet, list(sites), dict(links or {})
        self.port = free_port()
        self._ports = {site: free_port() if site in self._links else self.port for site in sites}
        self._children: dict[str, Child] = {}
        self._starts = 0
        write_toml(fleet.directory / "run.toml", tables)
        for site in sites:
            url = f"http://127.0.0.1:{self._ports[site]}"
            (fleet.directory / f"{site}.toml").write_text(SITE.format(name=site, url=url), encoding="utf-8")

    @property
    def state(self) -> Path:
        return self.fleet.directory / "state"

    def append_to(self, site: str, text: str) -> None:
        """More of a site's config."""
        with (self.fleet.directory / f"{site}.toml").open("a", encoding="utf-8") as file:
            file.write(text)

    def start(self, name: str) -> None:
        """Starts "coordinator", "link-SITE" or a site."""
        match name.removeprefix("link-"):
            case "coordinator":
                serve = ["coordinator", "serve", "run.toml", "--state", "state", "--port", str(self.port)]
                arguments = [*serve, "--insecure"]
            case site if site != name:
                listen, to = f"127.0.0.1:{self._ports[site]}", f"127.0.0.1:{self.port}"
                arguments = ["link", "--listen", listen, "--to", to, *self._links[site]]
            case site:
                arguments = ["site", "run", f"{site}.toml"]
        self._starts += 1
        self._children[name] = self.fleet.start(f"{name}.{self._starts:04d}", ["isthmus", *arguments])

    async def start_all(self) -> None:
        self.start("coordinator")
        await self.status()
        for site in self.sites:
            self.start_site(site)

    def start_site(self, site: str) -> None:
        """The site, and its link where it has one."""
        if site in self._links:
            self.start(f"link-{site}")
        self.start(site)

    def process(self, name: str) -> int:
        """Its process id."""
        return self._children[name].process.pid

    def runs(self, name: str) -> bool:
        return self._children[name].process.poll() is None

    def kill(self, name: str) -> None:
        """SIGKILL."""
        child = self._children[name]
        if child.process.poll() is None:
            child.process.kill()
        child.process.wait()
        self.fleet.children.remove(child)

    def send(self, name: str, number: signal.Signals) -> None:
        if self.runs(name):
            os.kill(self._children[name].process.pid, number)

    async def status(self) -> dict[str, Any]:
        """The coordinator's status, as soon as it answers."""
        while True:
            status = await asyncio.to_thread(coordinator_status, f"http://127.0.0.1:{self.port}")
            if status is not None:
                return status
            await asyncio.sleep(0.02)

    async def reaches(self, *states: str) -> dict[str, Any]:
        """The status, once the run is in one of the states."""
        while True:
            status = await self.status()
            if status["state"] in states:
                return status
            await asyncio.sleep(0.2)

    async def finish(self) -> dict[str, Any]:
        """Until the run is finished and every site has left; the status then. Raises FaultError where a site failed."""
        await self.reaches("finished")
        for site in self.sites:
            if self.runs(site):
                await self.fleet.wait(self._children[site])
        return await self.status()

    def log(self, name: str) -> str:
        """All that the lives of this program said."""
        logs = sorted(self.fleet.directory.glob(f"{name}.[0-9]*.log"))
        return "".join(log.read_text(encoding="utf-8", errors="replace") for log in logs)


def reported_steps(status: Mapping[str, Any], site: str) -> int:
    """The inner steps that the site has last reported."""
    return next((each["steps"] for each in status["sites"] if each["name"] == site), 0)


async def until_trains(course: Course, site: str) -> float:
    """Seconds until the site reports another step, or the run is finished."""
    began, before = time.monotonic(), reported_steps(await course.status(), site)
    while True:
        status = await course.status()
        if status["state"] == "finished" or reported_steps(status, site) != before:
            return time.monotonic() - began
        await asyncio.sleep(0.05)
