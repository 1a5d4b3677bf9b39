"""What `isthmus site check` prints, line by line; with several processes for real in tests/e2e/test_ranks.py."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shared.errors import ConfigError
from site_agent import check as check_module
from site_agent import crew as crew_module
from site_agent import survey as survey_module
from site_agent.agent import Agent
from site_agent.check import check
from site_agent.core.mixture import Verdict
from site_agent.crew import needed
from site_agent.survey import Survey
from site_agent.training.forms import Computing
from site_agent.training.makes import look_at
from tests.support.crews import a_crew
from tests.support.live import live, run_config, site_config
from tests.support.sites import layout_of, lm_site

SITE = lm_site()
RUN, LAYOUT = SITE.run, layout_of(SITE)
SMALL = {"context": 16, "width": 32, "layers": 1, "heads": 2}


crew_of = partial(a_crew, how=Computing("bf16"))


class Said:
    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __call__(self, what: str, text: str) -> None:
        self.lines.append((what, text))


@pytest.fixture
def said() -> Said:
    return Said()


def config(state: Path | str = "state", **devices: Any) -> Any:
    return site_config("eu", "http://127.0.0.1:1", Path("/nowhere"), site={"state": str(state)}, devices=devices)


def test_a_site_of_one_device_reads_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("a line of text\n" * 2000, encoding="utf-8")
    run = {
        "run": {"name": "checked", "tokens": 10**6},
        "task": {"use": "byte-lm", "paths": str(tmp_path / "text.txt"), **SMALL},
        "inner": {"batch_size": 8, "steps": 4},
        "rounds": {"fragments": 2},
    }
    with live(run_config(run), tmp_path / "state") as served:
        check(site_config("eu", served.url, tmp_path, devices={"micro_batch": 4, "throttle": 0.5, "recompute": True}))
        assert served.coordinator.core.members.live == {}
    lines = capsys.readouterr().out.splitlines()
    for line, pattern in zip(
        lines,
        (
            r"devices     \S.* \(cpu; fp32; throttled to 50% of full speed\)",
            r"            \[devices\] recompute",
            r"coordinator http://127\.0\.0\.1:\d+, round trip \S+ ms, download \S+ MB/s",
            r"token       none is set, and none asked for, for site eu in run checked\.\w+",
            r"layout      fits: [\d,]+ parameters in 2 fragments",
            r"memory      at least \S+ MB on each device without activations \(weights .*\); \S+ GB were free",
            r"speed       \S+ s an inner step of 8 sequences \(\S+ sequences/s\), "
            r"passes of at most 4 on a device \(\[devices\] micro_batch\)",
            r"upload      at most \S+ MB each 4 steps \(\S+ s at full pace\)",
        ),
        strict=True,
    ):
        assert re.fullmatch(pattern, line), (pattern, line)


def test_too_little_memory_is_told_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew_module, "look_at", lambda device: replace(look_at(device), free=10**5))
    run = {"run": {"name": "large", "tokens": 10}, "task": {"use": "byte-lm", **SMALL}, "rounds": {"fragments": 2}}
    with live(run_config(run), tmp_path / "state") as served:
        site = site_config("eu", served.url, tmp_path)
        for work in (partial(check, site), Agent(site).run):
            with pytest.raises(ConfigError, match=r"the model needs at least \S+ MB .*, cpu has 0\.1 MB free: .* or "):
                work()
        assert served.coordinator.core.tokens == 0


@pytest.mark.parametrize(
    ("device", "why"),
    [(["cuda:0", "cuda:1"], "[devices] device does not name it"), ("", "no process was started for it")],
)
def test_devices_that_are_not_used_are_told_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, said: Said, device: Any, why: str
) -> None:
    """Also one that is like those that are used."""
    monkeypatch.setattr(check_module, "devices_of", lambda _: [torch.device("cuda", n) for n in range(3)])
    monkeypatch.setattr(check_module, "make_of", lambda _: SimpleNamespace(title=lambda _: "NVIDIA H20"))
    monkeypatch.setattr(check_module, "environment", lambda _: {"NCCL_SOCKET_IFNAME": "ib0"})
    check_module._devices(said, crew_of({"H20": 2}), config(device=device))
    assert said.lines == [
        ("devices", "2 x NVIDIA H20 (cuda:0, cuda:1; bf16)"),
        ("", f"not used: cuda:2 (NVIDIA H20): {why}"),
        ("", "NCCL_SOCKET_IFNAME=ib0"),
    ]


def found(mode: Any, **more: Any) -> Survey:
    return Survey(0.5, (12.0, 6.0), 0.01, Verdict(mode, 17.0, 18.0, "they keep 94%"), None, **more)


def test_several_groups_are_told_with_both_numbers_and_the_reason(said: Said) -> None:
    crew = crew_of({"h20": 1, "a100": 1})
    check_module._groups(said, crew, config(), found("average"), "average", "as measured here")
    check_module._groups(said, crew, config(), found("average"), "learners", '[devices] mixed = "learners"')
    assert said.lines == [
        ("groups", "one learner, gradients are averaged (as measured here)"),
        ("", "averaged 17 sequences/s, apart 18: they keep 94%"),
        ("groups", 'a learner each: eu~h20, eu~a100 ([devices] mixed = "learners")'),
        ("", "averaged 17 sequences/s, apart 18: they keep 94%"),
        ("", '[devices] mixed = "average" would serve better, by what was measured here'),
    ]


def test_what_was_decided_before_is_what_a_check_says(tmp_path: Path) -> None:
    (tmp_path / "mixed.json").write_text(json.dumps({"mode": "learners", "groups": ["h20", "a100"]}))
    known = check_module.stated(crew_of({"h20": 1, "a100": 1}), config(tmp_path))
    assert known == ("learners", f"as was decided before, in {tmp_path / 'mixed.json'}")


def test_how_each_group_holds_the_model_is_told(said: Said) -> None:
    crew = crew_of({"h20": 2, "a100": 1})
    crew = crew_of({"h20": 2, "a100": 1}, free=needed(crew, RUN, LAYOUT, "ddp", 0).total - 1)
    crew = replace(crew, ranks=(*crew.ranks[:2], replace(crew.ranks[2], free=10**10)))
    check_module._memory(said, crew, config(), RUN, LAYOUT, apart=False)
    assert [what for what, _ in said.lines] == ["memory", ""]
    assert re.match(r"h20: the model in shards \(fsdp\), at least \S+ MB .*; 0\.0 GB were free", said.lines[0][1])
    assert re.match(r"a100: at least \S+ MB .*; 10\.0 GB were free", said.lines[1][1])
    check_module._memory(said, crew_of({"h20": 2}), config(), RUN, LAYOUT, apart=False)
    assert re.match(r"the whole model on each device \(ddp\), at least", said.lines[2][1])


def test_learners_have_a_step_each(said: Said) -> None:
    crew = crew_of({"h20": 1, "a100": 1})
    check_module._speed(said, crew, config(), RUN, found("learners"), 2, "learners")
    assert said.lines == [
        ("speed", "h20: 12 sequences/s, 0.6667 s an inner step of 8, passes of at most 2 on a device "
         "(what there is memory for)"),
        ("", "a100: 6 sequences/s, 1.3333 s an inner step of 8, passes of at most 2 on a device "
         "(what there is memory for)"),
        ("exchange", "0.0100 s a step to sum the groups' gradients"),
    ]  # fmt: skip


def test_a_group_without_room_for_a_learner_of_its_own_averages() -> None:
    """Of groups that average only the first one holds error feedback and snapshots."""
    crew = crew_of({"h20": 1, "a100": 1})
    enough = needed(crew, RUN, LAYOUT, "ddp", 0).total
    apart = Verdict("learners", 17.0, 20.0, "they keep 60%")
    roomy = crew_of({"h20": 1, "a100": 1}, free=enough)
    assert survey_module._with_room(roomy, config(), RUN, LAYOUT, apart) is apart
    tight = replace(roomy, ranks=(roomy.ranks[0], replace(roomy.ranks[1], free=enough - 1)))
    verdict = survey_module._with_room(tight, config(), RUN, LAYOUT, apart)
    assert verdict.mode == "average"
    assert re.match("they keep 60%; but as a learner of its own a100 has too little memory: .* needs", verdict.why)
