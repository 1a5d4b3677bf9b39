"""The `isthmus` command: one entry to the coordinator, the site agent, and what a person runs without a fleet."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Annotated

import typer

import coordinator.cli
import lab.cli
import site_agent.cli

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(coordinator.cli.app, name="coordinator")
app.add_typer(site_agent.cli.app, name="site")
lab.cli.add_commands(app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"isthmus {version('isthmus')}")
        raise typer.Exit


@app.callback()
def _options(
    show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


def main() -> None:
    """Runs the command line."""
    # torch would load every maker's package with itself, and fail with the first that is broken: a coordinator needs
    # none of them, and a site loads them one by one (site_agent.training.makes).
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    app(prog_name="isthmus")


if __name__ == "__main__":
    main()
