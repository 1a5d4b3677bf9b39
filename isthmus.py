"""The `isthmus` command: one entry to the coordinator, the site agent, and what a person runs without a fleet."""

from __future__ import annotations

import typer

import coordinator.cli
import lab.cli
import site_agent.cli

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(coordinator.cli.app, name="coordinator")
app.add_typer(site_agent.cli.app, name="site")
lab.cli.add_commands(app)


def main() -> None:
    """Runs the command line."""
    app(prog_name="isthmus")


if __name__ == "__main__":
    main()
