"""Several processes on one machine, one for each of its devices: torch's elastic launcher, which is what torchrun is.

It is started here only where nobody has started processes for the site yet, so that `isthmus site run` is all that a
machine with eight devices takes. On several machines it is `torchrun` on each (deploy/slurm, deploy/kubernetes).

When a process dies the launcher ends the others, and all are started again: they go on from the last local checkpoint,
and the run has gone on meanwhile.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from shared.config import SiteConfig
from shared.errors import ConfigError, FaultError, LostError, RefusedError
from site_agent.training.makes import devices_of

log = logging.getLogger(__name__)

FINAL = (ConfigError.exit_code, RefusedError.exit_code, FaultError.exit_code)
"""Exit codes that starting again does not help."""
STOPPED = (130, 143)
"""Those of processes that were told to stop: where it was not the launcher that was told, by it, after a death."""
TRIES, SOUND_SECONDS = 3, 600.0
"""So many starts in a row whose processes die within so many seconds, and it is given up."""
LEAVING_SECONDS = 10.0


def launched() -> bool:
    """Whether a launcher started this process for a site, be it as the only one."""
    return "RANK" in os.environ and ("LOCAL_RANK" in os.environ or of_several())


def of_several() -> bool:
    """Whether it is one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def processes_of(config: SiteConfig) -> int:
    """How many processes this machine has for the site, one for each device. Raises ConfigError, also where a list of
    [devices] is not as long."""
    count = len(devices_of(config.devices.device))
    for key in ("group", "throttle"):
        entries = getattr(config.devices, key)
        if isinstance(entries, list) and len(entries) != count:
            devices = f"{count} devices" if count != 1 else "one device"
            raise ConfigError(
                f"[devices] {key}: a list of {len(entries)} for {devices}; write an entry for each, in the order of "
                "device, or one value for all"
            )
    return count


def launch(config: SiteConfig, arguments: Sequence[str], *, again: bool = True) -> int:
    """`python -m isthmus ARGUMENTS` in as many processes as the site has devices here, until they are done; `again`
    where one dies. Returns the exit code of the site."""
    tries = 0
    while True:
        began = time.monotonic()
        code, stopped = _run(processes_of(config), arguments, config.site.stop_seconds)
        if code == 0 or code in FINAL or stopped:
            return code
        tries = tries + 1 if time.monotonic() - began < SOUND_SECONDS else 1
        died = f"a process of this site died ({_died(code)})"
        if not again:
            log.error("%s", died)
            return FaultError.exit_code
        if tries >= TRIES:
            log.error("%s, %d times in a row; giving up", died, tries)
            return FaultError.exit_code
        log.error("%s; starting all again from the last checkpoint", died)


def _died(code: int) -> str:
    if code > 128:
        return {137: "killed, as for want of memory"}.get(code, f"signal {code - 128}")
    return f"exit code {code}"


def _run(processes: int, arguments: Sequence[str], stop_seconds: float) -> tuple[int, bool]:
    """Once. Returns the exit code that says most, and whether they were told to stop."""
    # What became of them is said here, or by themselves. (Each of torch's loggers has a level of its own.)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # Cores are shared, and ranks meet on this machine whatever its name leads to.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    known: dict[str, Any] = {}
    if "shutdown_timeout" in {field.name for field in fields(LaunchConfig)}:  # torch before it knew leaves them 30 s
        known["shutdown_timeout"] = int(stop_seconds + LEAVING_SECONDS)
    launcher = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        **known,
    )
    try:
        elastic_launch(launcher, sys.executable)("-m", "isthmus", *arguments)
    except ChildFailedError as failed:
        codes = [failure.exitcode for failure in failed.failures.values()]
        # One that is killed by a signal has it negative.
        told = [128 - code if code < 0 else code for code in codes]
        # Who was killed says more than who lost another by it, or was stopped for it.
        most = min(
            told, key=lambda code: (code not in FINAL, code in STOPPED, code <= 128, code == LostError.exit_code)
        )
        return most, all(code in STOPPED for code in told)
    except SignalException as stopped:
        return 128 + int(stopped.sigval), True
    return 0, False
