"""The files in docker/ that nothing else reads between two runs of docker/verify.sh."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.config import load_run, load_site
from site_agent.tasks.byte_lm import ByteLM

DOCKER = Path(__file__).parents[2] / "docker"
SITES = sorted((DOCKER / "sites").glob("*.toml"))


def shared_lines(image: str) -> str:
    text = (DOCKER / f"{image}.Dockerfile").read_text(encoding="utf-8")
    return text[text.index("FROM ") : text.index("VOLUME ")]


def test_both_images_share_their_layers() -> None:
    assert shared_lines("coordinator") == shared_lines("site")


def test_the_example_run_is_valid_and_waits_for_both_sites() -> None:
    config = load_run(DOCKER / "run.toml")
    ByteLM(config.task.options())
    assert config.run.min_sites == len(SITES)


@pytest.mark.parametrize("path", SITES, ids=lambda path: path.stem)
def test_the_example_sites_are_valid_and_scraped(path: Path) -> None:
    config = load_site(path)
    assert config.site.name == path.stem
    assert config.metrics.host == "0.0.0.0"
    target = f'"{path.stem}:{config.metrics.port}"'
    assert target in (DOCKER / "prometheus.yml").read_text(encoding="utf-8")
