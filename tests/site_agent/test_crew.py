"""The processes of a site: who is who, whether the model has room, and what becomes of several groups."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shared.config import SiteConfig
from shared.errors import ConfigError, FaultError, LostError
from shared.fragments import Layout
from site_agent import crew as crew_module
from site_agent.crew import (
    Crew,
    enlist,
    follow,
    free,
    holding,
    in_words,
    needed,
    prepare,
)
from site_agent.launch import launched
from site_agent.training.makes import CPU, Found, look_at
from site_agent.training.team import ALONE
from tests.support.crews import MIXED, a_crew, accelerator, config
from tests.support.ranks import run_ranks
from tests.support.sites import LM, layout_of, lm_site

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


# -- who is who


def test_a_process_that_nobody_launched_is_alone() -> None:
    crew = enlist(config(throttle=0.5))
    assert crew.team.alone
    assert (crew.names, crew.throttle, crew.mine) == (("cpu",), 0.5, 0)
    assert not launched()


def test_one_process_under_a_launcher_is_launched_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torchrun --nproc-per-node 1` means one, however many devices there are."""
    for name, value in zip(LAUNCHER, "001", strict=True):
        monkeypatch.setenv(name, value)
    assert launched()
    assert enlist(config()).team.alone


def test_a_rank_of_pods_that_are_one_process_each_has_launched_none_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some operators of Kubernetes set RANK and WORLD_SIZE for pods, of which one may have several devices."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched()


def place(devices: dict[str, Any]) -> tuple[Any, ...]:
    crew = enlist(config(**devices))
    return crew.team.rank, crew.mine, crew.throttle, [(group.name, group.ranks) for group in crew.groups], crew.names


def test_every_process_knows_all_and_takes_its_own_of_each_list() -> None:
    groups, names = [("fast", (0, 2)), ("slow", (1,))], ("cpu", "cpu", "cpu")
    assert run_ranks(3, place, MIXED) == [
        (0, 0, 1.0, groups, names),
        (1, 1, 0.25, groups, names),
        (2, 0, 0.5, groups, names),
    ]


def test_the_cpu_is_shared_by_as_many_processes_as_are_started() -> None:
    (_, _, _, groups, _), _ = run_ranks(2, place, {})
    assert len(groups) == 1
    assert groups[0][1] == (0, 1)


def refused(devices: dict[str, Any], cards: int = 0) -> tuple[str, str]:
    """How enlisting ends, on a machine with so many accelerators."""
    if cards:
        crew_module.devices_of = lambda _: [torch.device("cuda", n) for n in range(cards)]  # type: ignore[assignment]
        crew_module.look_at = lambda _: accelerator()  # type: ignore[assignment]
    try:
        enlist(config(**devices))
    except (ConfigError, LostError) as error:
        return type(error).__name__, str(error)
    return "", ""


def test_a_list_that_is_too_short_is_told_by_the_head_with_the_rank() -> None:
    head, other = run_ranks(2, refused, {"throttle": [0.5]})
    assert head[0] == "ConfigError"
    assert "rank 1: [devices] throttle: a list of 1 has nothing for process 1" in head[1]
    assert other[0] == "LostError"


def test_more_processes_than_devices_are_refused() -> None:
    head, other = run_ranks(2, refused, {}, 1)
    assert head[0] == "ConfigError"
    assert "rank 1: [devices] device: process 1 of this machine has no device, there are 1" in head[1]
    assert other[0] == "LostError"


def test_a_device_that_is_not_here_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("here it is")
    with pytest.raises(ConfigError, match=r'\[devices\] device: "cuda" is not on this machine; found: "cpu"'):
        enlist(config(device="cuda"))


def unknown_meeting_point() -> str:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "nowhere"}
    try:
        enlist(config())
    except LostError as error:
        return str(error)
    return ""


def test_processes_that_do_not_find_each_other_say_so() -> None:
    for said in run_ranks(2, unknown_meeting_point, group=False):
        assert "the processes of this site do not find each other" in said


@pytest.mark.parametrize(
    ("found", "wanted", "precision"),
    [
        (accelerator(), "auto", "bf16"),
        (accelerator(bf16=False), "auto", "fp32"),
        (accelerator(), "fp16", "fp16"),
        (replace(look_at(torch.device("cpu")), bf16=True), "auto", "fp32"),
    ],
)
def test_precision_is_bf16_where_an_accelerator_has_it_unless_it_is_set(
    monkeypatch: pytest.MonkeyPatch, found: Found, wanted: str, precision: str
) -> None:
    selected: list[torch.device] = []
    monkeypatch.setattr(crew_module, "devices_of", lambda _: [found.device])
    monkeypatch.setattr(crew_module, "look_at", lambda _: found)
    monkeypatch.setattr(crew_module.drivers, "module", lambda _: SimpleNamespace(set_device=selected.append))
    crew = enlist(config(precision=wanted))
    assert crew.how.precision == crew.ranks[0].precision == precision
    assert selected == [found.device][: found.device.type != "cpu"]


def test_a_crew_is_described_for_people() -> None:
    one, two = a_crew({"H20": 1}), a_crew({"h20": 2, "910b": 1})
    assert one.describe() == "NVIDIA H20 (cuda:0; bf16)"
    assert two.describe() == "h20: 2 x NVIDIA h20 (cuda:0, cuda:1; bf16); 910b: NVIDIA 910b (cuda:2; bf16)"
    slow = replace(one, throttles=(0.333,))
    assert slow.describe() == "NVIDIA H20 (cuda:0; bf16; throttled to 33% of full speed)"
    far = replace(a_crew({"h20": 2}), names=("cuda:0", "cuda:0"))
    far = replace(far, ranks=(far.ranks[0], replace(far.ranks[1], host="there")))
    assert far.describe() == "2 x NVIDIA h20 (cuda:0 on 2 machines; bf16)"
    assert far.called(1) == "cuda:0 of there"


TWO: Any = SimpleNamespace(alone=False, rank=1)


def test_a_collective_that_has_lost_a_rank_says_so() -> None:
    for text in (
        "[/x/gloo/transport/tcp/pair.cc:537] Read error [::1]: Connection reset by peer",
        "NCCL error: remote",
    ):
        with pytest.raises(LostError, match="a process of this site is lost: "), in_words(TWO):
            raise RuntimeError(text)
    with pytest.raises(LostError), in_words(TWO):
        raise torch.distributed.DistBackendError("whatever it is")
    with pytest.raises(RuntimeError, match="a shape is wrong"), in_words(TWO):
        raise RuntimeError("a shape is wrong")
    with pytest.raises(RuntimeError, match="reset"), in_words(ALONE):
        raise RuntimeError("Connection reset by peer")


def test_a_device_whose_memory_has_run_out_says_what_to_do() -> None:
    says = r"^the device has too little memory: tried to; set \[devices\] recompute"
    with pytest.raises(FaultError, match=says), in_words(ALONE):
        raise torch.OutOfMemoryError("tried to\nlong story")
    with pytest.raises(FaultError, match=r"^rank 1: "), in_words(TWO):
        raise torch.OutOfMemoryError("tried to")


# -- whether there is room

SITE = lm_site()
RUN, LAYOUT = SITE.run, layout_of(SITE)


def total(crew: Crew, parallel: Any, group: int = 0, **more: Any) -> int:
    return needed(crew, RUN, LAYOUT, parallel, group, **more).total


def test_a_model_that_fits_is_whole_on_each_device() -> None:
    crew = a_crew({"h20": 2})
    enough = a_crew({"h20": 2}, free=total(crew, "ddp"))
    assert holding(enough, config(), RUN, LAYOUT, 0) == "ddp"
    assert holding(crew, config(), RUN, LAYOUT, 0) == "ddp", "nothing is known of its memory"


def test_a_model_that_fits_in_shards_only_is_sharded_among_the_group() -> None:
    crew = a_crew({"h20": 2})
    short = a_crew({"h20": 2}, free=total(crew, "ddp") - 1)
    assert total(crew, "fsdp") < total(crew, "ddp")
    assert holding(short, config(), RUN, LAYOUT, 0) == "fsdp"


def test_how_the_model_is_held_can_be_said() -> None:
    crew = a_crew({"h20": 2}, free=10**15)
    assert holding(crew, config(parallel="fsdp"), RUN, LAYOUT, 0) == "fsdp"
    short = a_crew({"h20": 2}, free=total(crew, "ddp") - 1)
    with pytest.raises(ConfigError, match="the model needs at least"):
        holding(short, config(parallel="ddp"), RUN, LAYOUT, 0)


@pytest.mark.parametrize("devices", [1, 2])
def test_too_little_memory_is_refused_with_the_sum_and_what_to_do(devices: int) -> None:
    crew = a_crew({"h20": devices}, free=10_000)
    said = r"needs at least \d\.\d MB .*weights.*cuda:0 has 0\.0 MB free: .*share the model among more devices"
    with pytest.raises(ConfigError, match=said):
        holding(crew, config(), RUN, LAYOUT, 0)


def test_the_device_with_the_least_memory_decides() -> None:
    crew = a_crew({"h20": 2}, free=10**15)
    crew = replace(crew, ranks=(crew.ranks[0], replace(crew.ranks[1], free=10_000)))
    assert free(crew, 0) == 10_000
    with pytest.raises(ConfigError, match="cuda:1 has"):
        holding(crew, config(), RUN, LAYOUT, 0)


def test_the_first_group_holds_what_is_the_learners_and_apart_each_does() -> None:
    crew = a_crew({"h20": 1, "910b": 1})
    assert total(crew, "ddp", 0) == total(crew, "ddp", 0, apart=True) == total(crew, "ddp", 1, apart=True)
    less = needed(crew, RUN, LAYOUT, "ddp", 1)
    assert (less.feedback, less.snapshots) == (0, 0)


def test_too_little_memory_is_told_before_the_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew_module, "look_at", lambda device: replace(look_at(device), free=1000))
    monkeypatch.setattr(crew_module, "build_model", lambda *_: pytest.fail("it is too late"))
    crew = enlist(config())
    with pytest.raises(ConfigError, match=r"the model needs at least 1\.1 MB .* cpu has 0\.0 MB free"):
        prepare(crew, with_task(config()), RUN, LAYOUT, {})


def with_task(made: SiteConfig) -> SiteConfig:
    return made.model_copy(update={"data": LM})


def shares(given: list[int]) -> tuple[Any, ...]:
    rank = int(os.environ["RANK"])
    crew_module.look_at = lambda device: replace(look_at(device), free=given[rank])  # type: ignore[assignment]
    crew = enlist(config())
    said = "", ""
    if given[0] < 10_000:
        try:
            prepare(crew, with_task(config()), RUN, LAYOUT, {})
        except (ConfigError, LostError) as error:
            said = type(error).__name__, str(error)
    return [each.free for each in crew.ranks], crew.called(0), *said


def test_processes_on_the_cpus_of_a_host_share_its_memory() -> None:
    free_, called, *_ = run_ranks(2, shares, [10**6, 10**6])[0]
    assert free_ == [10**6 // 2] * 2
    assert called == "cpu (its share, as one of several processes)"


def test_too_little_memory_ends_all_processes_and_the_head_says_why() -> None:
    head, other = run_ranks(2, shares, [2000, 2000])
    assert head[2] == "ConfigError"
    assert "the model needs at least" in head[3]
    assert other[2] == "LostError"


def tries_another_model(rank: int) -> tuple[str, str]:
    mine = {**LM, "width": 64} if int(os.environ["RANK"]) == rank else LM
    made = config().model_copy(update={"data": mine})
    crew = enlist(made)
    order = {"do": "prepare", "config": RUN.model_dump(mode="json"), "layout": LAYOUT.to_wire(), "fingerprint": {}}
    order["parallel"] = "auto"
    try:
        if crew.team.head:
            crew.team.tell(order)
            prepare(crew, made, RUN, Layout.from_wire(order["layout"]), {})
        else:
            follow(crew, made)
    except (ConfigError, LostError) as error:
        return type(error).__name__, str(error)
    return "", ""


def test_a_model_that_does_not_fit_the_run_at_another_rank_is_told_by_the_head() -> None:
    head, other = run_ranks(2, tries_another_model, 1)
    assert head[0] == "ConfigError"
    assert head[1].startswith("rank 1: ")
    assert other == ("LostError", "the head says why")


def test_memory_of_a_cpu_counts_as_the_hosts() -> None:
    assert enlist(config()).ranks[0].make == CPU.name
