"""`isthmus demo`, `link`, `sample` and `simulate`: what a person runs without a fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shared.program import command


@command
def demo(
    sites: Annotated[int, typer.Option(min=1, max=8, help="How many sites.")] = 3,
    minutes: Annotated[float, typer.Option(min=0.2, max=60, help="About how long to train at the sites.")] = 1.0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The coordinator's port; 0: any free one.")] = 0,
) -> None:
    """Train one model at several sites of unequal speed over emulated slow links, and compare with data-parallel."""
    from lab.demo import run_demo

    run_demo(sites, minutes, json, port)


@command
def link(
    listen: Annotated[str, typer.Option(help="HOST:PORT to listen on.")],
    to: Annotated[str, typer.Option(help="HOST:PORT to relay to.")],
    rate: Annotated[str, typer.Option(help="Bandwidth of each direction, as 50mbit.")] = "50mbit",
    rtt: Annotated[str, typer.Option(help="Round-trip time, as 80ms.")] = "80ms",
    jitter: Annotated[str, typer.Option(help="Random extra delay, up to this.")] = "0ms",
    loss: Annotated[float, typer.Option(min=0, max=0.5, help="Share of lost segments, 0 to 0.5.")] = 0.0,
    cut: Annotated[str, typer.Option(help="Cut all connections this often, as 60s; empty: never.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of jitter, loss and cuts.")] = 0,
) -> None:
    """Emulate a slow, long link: a TCP relay with a rate, a delay, loss and cuts."""
    from lab.link import LinkSettings, run_link
    from lab.shaping import parse_duration, parse_rate

    settings = LinkSettings(
        rate=parse_rate(rate),
        rtt=parse_duration(rtt),
        jitter=parse_duration(jitter),
        loss=loss,
        cut_every=parse_duration(cut) if cut else None,
        seed=seed,
    )
    run_link(listen, to, settings)


@command
def sample(
    state_dir: Annotated[Path, typer.Argument(metavar="STATE_DIR", help="The coordinator's state directory.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, max=100_000, help="How many tokens to add.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    others: Annotated[
        list[Path] | None, typer.Option("--with", help="The state directory of another coordinator of the run.")
    ] = None,
) -> None:
    """Continue a text with the weights of a run."""
    from lab.sample import sample as sample_text

    print(sample_text([state_dir, *(others or [])], prompt, tokens, seed))


@command
def simulate(
    schedules: Annotated[int, typer.Option(min=1, max=10_000_000, help="How many seeded schedules.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="The first one; the others follow.")] = 0,
    jobs: Annotated[int, typer.Option(min=0, help="Processes; 0: one for each core.")] = 0,
    trace: Annotated[bool, typer.Option(help="Say everything that happens. For a schedule or two.")] = False,
) -> None:
    """Run the coordinator and its sites through imagined faults, in virtual time, and check what must always hold."""
    from lab.simulator.simulate import run_simulation

    run_simulation(range(seed, seed + schedules), jobs, trace)


def add_commands(app: typer.Typer) -> None:
    """Adds these commands to the top level of `app`."""
    for function in (demo, link, sample, simulate):
        app.command()(function)
