"""`isthmus site …`: run, check."""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from shared.config import SiteConfig, load_site
from shared.errors import ConfigError, LostError
from shared.program import command, set_up_logging

app = typer.Typer(no_args_is_help=True, help="The agent that trains in one datacenter.")

P = ParamSpec("P")
SAYING_SECONDS = 2.0
"""What a process that has nothing to say leaves to the one that has: its end makes the launcher end all of them."""


def _ended(function: Callable[P, None]) -> Callable[P, None]:
    """A command that lets go of the process groups of a site of several processes, whose threads would abort its end;
    where it ends with an exit code, at once, because the others may not be there to answer."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if "RANK" not in os.environ:  # it is alone; and torch, which takes seconds, may not have been needed
            function(*args, **kwargs)
            return
        from site_agent.crew import disband
        from site_agent.launch import launched

        try:
            function(*args, **kwargs)
        except SystemExit as ended:
            if not launched():
                raise
            if ended.code == LostError.exit_code and os.environ["RANK"] != "0":
                time.sleep(SAYING_SECONDS)
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code if isinstance(ended.code, int) else 1)
        disband()

    return run


SiteArgument = Annotated[Path, typer.Argument(metavar="SITE.toml", help="The site's config.")]


@app.command()
@_ended
@command
def run(site: SiteArgument) -> None:
    """Join a run and train until it is finished."""
    config = _config(site)
    set_up_logging()
    _in_all_processes(config, ["site", "run", str(site)])
    from site_agent.agent import train
    from site_agent.learner import Stopped

    try:
        train(config)
    except Stopped as stopped:
        # What a shell makes of a process that ended by this signal; the leave before it was clean.
        raise SystemExit(128 + stopped.signal if stopped.signal != signal.SIGINT else 130) from None


@app.command()
@_ended
@command
def check(site: SiteArgument) -> None:
    """Say what would happen: devices, memory, speed, link, token, layout. Trains nothing and joins nothing for good."""
    config = _config(site)
    _in_all_processes(config, ["site", "check", str(site)], again=False)
    from site_agent.check import check as check_site

    check_site(config)


def _config(site: Path) -> SiteConfig:
    """The site's config. Where several processes of this machine read the same file, the first one says what is wrong
    with it."""
    try:
        return load_site(site)
    except ConfigError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise LostError("the first process of this machine says why") from None
        raise


def _in_all_processes(config: SiteConfig, arguments: list[str], *, again: bool = True) -> None:
    """Does it in a process for each device of this machine, and ends this one, unless there is one device or somebody
    has started the processes already."""
    from site_agent.launch import launch, launched, processes_of

    if not launched() and processes_of(config) > 1:
        raise SystemExit(launch(config, arguments, again=again))
