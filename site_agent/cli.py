"""`isthmus site …`: run, check."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from shared.config import load_site
from shared.program import command, set_up_logging

app = typer.Typer(no_args_is_help=True, help="The agent that trains in one datacenter.")

SiteArgument = Annotated[Path, typer.Argument(metavar="SITE.toml", help="The site's config.")]


@app.command()
@command
def run(site: SiteArgument) -> None:
    """Join a run and train until it is finished."""
    config = load_site(site)
    set_up_logging()
    from site_agent.agent import train
    from site_agent.learner import Stopped

    try:
        train(config)
    except Stopped as stopped:
        # What a shell makes of a process that ended by this signal; the leave before it was clean.
        raise SystemExit(128 + stopped.signal if stopped.signal != signal.SIGINT else 130) from None


@app.command()
@command
def check(site: SiteArgument) -> None:
    """Say what would happen: device, speed, link, token, layout. Trains nothing and joins nothing for good."""
    from site_agent.check import check as check_site

    check_site(load_site(site))
