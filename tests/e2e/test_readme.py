"""The README's own commands, as a new user would run them: its configs, its order, its words."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT, free_port, get, until

README = (ROOT / "README.md").read_text(encoding="utf-8")
PORT = "8470"
TEXT = "".join(f"line {n} of a text that is long enough to be learnt from, {n * n} times.\n" for n in range(4000))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    return [line.split("#")[0].strip() for line in block.splitlines() if line.strip() and not line.startswith("#")]


def test_the_readme_says_what_make_can_do() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_readme_links_to_pages_that_are_there() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_readmes_commands_work(tmp_path: Path, free_readme_port: str) -> None:
    run_toml, site_toml = blocks("toml")
    tokens_and_serve, site, watch = blocks("sh")[1:]
    for long, short in (("tokens = 5_000_000", "tokens = 12_000"), ("tokens = 300_000", "tokens = 1_000")):
        assert long in run_toml
        run_toml = run_toml.replace(long, short)
    (tmp_path / "run.toml").write_text(run_toml)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "text.txt").write_text(TEXT)
    for name in ("eu-west", "us-east"):
        (tmp_path / f"{name}.toml").write_text(site_toml.replace("eu-west", name).replace(PORT, free_readme_port))
    *add_tokens, serve = commands(tokens_and_serve)
    for command in add_tokens:
        run(command, tmp_path, free_readme_port)
    background: list[subprocess.Popen[str]] = []
    try:
        coordinator = begin(serve, tmp_path, free_readme_port)
        background.append(coordinator)
        url = f"http://127.0.0.1:{free_readme_port}"
        until("the coordinator", lambda: coordinator.poll() is not None or get(f"{url}/v1/status"))
        check, run_site = commands(site)
        found = run(check, tmp_path, free_readme_port)
        assert all(word in found for word in ("device", "coordinator", "token", "layout", "speed")), found
        sites = [
            begin(run_site.replace("eu-west", name), tmp_path, free_readme_port) for name in ("eu-west", "us-east")
        ]
        background += sites
        for process in sites:
            output, _ = process.communicate(timeout=200)
            assert process.returncode == 0, output
        status, export, export_hf, sample = commands(watch)
        shown = run(status, tmp_path, free_readme_port)
        assert "finished" in shown, shown
        run(export, tmp_path, free_readme_port)
        run(export_hf, tmp_path, free_readme_port)
        assert (tmp_path / "weights.safetensors").stat().st_size > 100_000
        assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
        text = run(sample, tmp_path, free_readme_port)
        assert text.startswith("HAMLET")
        assert len(text) > 100
        coordinator.send_signal(signal.SIGTERM)
        assert coordinator.wait(60) == 0
    finally:
        for process in background:
            process.kill()
            process.communicate()


@pytest.fixture
def free_readme_port() -> str:
    return str(free_port())


def arguments(command: str, port: str) -> list[str]:
    program, *rest = shlex.split(command.replace(PORT, port))
    assert program == "isthmus"
    return [sys.executable, "-m", "isthmus", *rest]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def run(command: str, directory: Path, port: str) -> str:
    """The command's output; a `> file` at its end is done as a shell would."""
    command, _, target = command.partition(" > ")
    done = subprocess.run(
        arguments(command, port), cwd=directory, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if target:
        (directory / target).write_text(done.stdout)
    return done.stdout


def begin(command: str, directory: Path, port: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments(command, port),
        cwd=directory,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
