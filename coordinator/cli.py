"""`isthmus coordinator …`: serve, status, export, verify, restore, token."""

from __future__ import annotations

import asyncio
import http.client
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from shared.config import load_run
from shared.errors import ConfigError, FaultError
from shared.program import command, set_up_logging

app = typer.Typer(no_args_is_help=True, help="The daemon that merges contributions and publishes versions.")
token_app = typer.Typer(no_args_is_help=True, help="Who may join: one token for each site.")
app.add_typer(token_app, name="token")

StateOption = Annotated[Path, typer.Option("--state", help="The coordinator's state directory.")]


@app.command()
@command
def serve(
    run: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run's config.")],
    state: StateOption,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8470,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate file for HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key file.")] = None,
    client_ca: Annotated[Path | None, typer.Option(help="Only let in clients with a certificate of this CA.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No tokens; loopback only.")] = False,
    shard: Annotated[int | None, typer.Option(help="Which of the run's coordinators this is, from 0.")] = None,
) -> None:
    """Coordinate a run until stopped."""
    from coordinator.daemon import Listen, serve

    set_up_logging()
    config = load_run(run)
    listen = Listen(host, port, tls_cert, tls_key, client_ca, insecure)
    asyncio.run(serve(config, state, run.resolve().parent, listen, shard))


@app.command()
@command
def status(
    url: Annotated[str, typer.Option(help="The coordinator's address.")] = "http://127.0.0.1:8470",
    as_json: Annotated[bool, typer.Option("--json", help="Print the document as JSON.")] = False,
) -> None:
    """Show how a run stands."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url} does not begin with http:// or https://; write it with one of the two")
    document = _get(url.rstrip("/") + "/v1/status")
    if as_json:
        print(json.dumps(document, indent=1))
    else:
        _show(document)


@app.command()
@command
def export(
    state_dir: Annotated[Path, typer.Argument(metavar="STATE_DIR", help="The coordinator's state directory.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A file; with --format hf a directory.")],
    form: Annotated[Literal["safetensors", "hf"], typer.Option("--format", help="What to write.")] = "safetensors",
    published: Annotated[bool, typer.Option("--published", help="What the sites hold, not the masters.")] = False,
    others: Annotated[
        list[Path] | None, typer.Option("--with", help="The state directory of another coordinator of the run.")
    ] = None,
) -> None:
    """Write the weights to files that other programs load."""
    from coordinator.export import export as export_weights

    print(export_weights([state_dir, *(others or [])], out, form, published=published))


@app.command()
@command
def verify(
    state_dir: Annotated[Path, typer.Argument(metavar="STATE_DIR", help="The coordinator's state directory.")],
) -> None:
    """Execute the journal again and compare every digest; exit code 4 where anything is not as recorded."""
    from coordinator.verify import verify as verify_state

    found = verify_state(state_dir)
    print(found)
    for fault in found.faults:
        print(f"isthmus: {fault}", file=sys.stderr)
    if found.faults:
        raise SystemExit(FaultError.exit_code)


@app.command()
@command
def restore(
    url: Annotated[
        str,
        typer.Argument(metavar="URL", help="What mirror names in the run's config, or the directory of one run in it."),
    ],
    state_dir: Annotated[Path, typer.Argument(metavar="STATE_DIR", help="A directory that is empty or not there.")],
) -> None:
    """Make a state directory from a run's mirror, as on a new machine."""
    from coordinator.store.mirror import restore as restore_state
    from coordinator.verify import verify as verify_state

    set_up_logging()
    print(restore_state(url, state_dir, lambda path: verify_state(path).faults))


@token_app.command()
@command
def add(
    site: Annotated[str, typer.Argument(metavar="SITE")],
    state: StateOption,
    token_file: Annotated[
        Path | None, typer.Option(help="Take over the token in this file, which another coordinator made.")
    ] = None,
) -> None:
    """Print a new token for SITE, once; an older one of that site stops working."""
    from coordinator.store.state_dir import StateDir
    from coordinator.tokens import add_token, read_token

    known = read_token(token_file) if token_file is not None else None
    store = StateDir(state)
    try:
        token = add_token(store.journal, site, known)
    finally:
        store.close()
    if known is None:
        print(token)


@token_app.command("list")
@command
def list_(state: StateOption) -> None:
    """List the sites that have a token."""
    from coordinator.store.state_dir import StateDir

    store = StateDir(state, read_only=True)
    try:
        for site in store.journal.sites():
            if site.has_token:
                print(f"{site.name}\t{'revoked' if site.revoked else 'valid'}")
    finally:
        store.close()


@token_app.command()
@command
def revoke(site: Annotated[str, typer.Argument(metavar="SITE")], state: StateOption) -> None:
    """Take SITE's token away; it works no longer from the next request on."""
    from coordinator.store.state_dir import StateDir

    StateDir(state, read_only=True).close()
    store = StateDir(state)
    try:
        if not store.journal.revoke_token(site):
            raise ConfigError(f"site {site} has no valid token in {state}; see: isthmus coordinator token list")
    finally:
        store.close()


def _get(url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            document = json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()
        raise FaultError(
            f"{url} answers {error.code} {error.reason}; name the coordinator's address with --url"
        ) from None
    except (urllib.error.URLError, http.client.HTTPException, ValueError, OSError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise FaultError(f"no coordinator answers at {url}: {reason}; name its address with --url") from None
    if not isinstance(document, dict) or not {"run", "sites", "fragments", "tokens_budget"} <= document.keys():
        raise FaultError(f"what answers at {url} is not a coordinator; name its address with --url")
    return document


def _table(left: list[str], right: list[str]) -> Table:
    """A table with text columns, then columns of numbers."""
    table = Table(*left)
    for heading in right:
        table.add_column(heading, justify="right")
    return table


def _show(status: dict[str, Any]) -> None:
    console = Console()
    loss = "–" if status["eval_loss"] is None else f"{status['eval_loss']:.4f}"
    console.print(f"run [bold]{status['run']}[/]: {status['state']}")
    console.print(
        f"{status['tokens']:,} of {status['tokens_budget']:,} tokens, {status['outer_steps']} outer steps, "
        f"eval loss {loss}"
    )
    sites = _table(["site", "state"], ["steps", "tokens", "s/step", "pace", "training", "loss"])
    for site in status["sites"]:
        train_loss = "–" if site["loss"] is None else f"{site['loss']:.4f}"
        sites.add_row(
            site["name"],
            "stalled" if site["stalled"] else site["state"],
            f"{site['steps']:,}",
            f"{site['tokens']:,}",
            f"{site['step_seconds']:.3f}" if site["step_seconds"] else "–",
            "–" if site["pace"] is None else f"{site['pace']:g}",
            f"{site['training_share']:.1%}",
            train_loss,
        )
    fragments = _table([], ["fragment", "version", "tokens", "parameters"])
    fragments.add_column("in the open round")
    for fragment in status["fragments"]:
        fragments.add_row(
            str(fragment["fragment"]),
            str(fragment["version"]),
            f"{fragment['tokens']:,}",
            f"{fragment['parameters']:,}",
            ", ".join(fragment["contributions"]),
        )
    rounds = _table(["round", "closed by", "site: weight, staleness, norm"], ["share", "cosine", "merged norm"])
    for round_ in status.get("rounds", [])[:8]:
        members = [
            f"{c['site']}: {c['weight']:.2f}, {c['staleness']}, {c['norm']:.3g}" for c in round_["contributions"]
        ]
        rounds.add_row(
            f"{round_['fragment']}/{round_['version']}",
            round_["reason"],
            "\n".join(members),
            f"{round_['share']:.2f}",
            "–" if round_["cosine"] is None else f"{round_['cosine']:+.2f}",
            "–" if round_["merged_norm"] is None else f"{round_['merged_norm']:.3g}",
        )
    console.print(sites, fragments, rounds)
