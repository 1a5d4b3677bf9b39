"""Which devices of a site train together, under which names, and whether as one learner."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.names import PARTICIPANT_NAME
from site_agent.core.mixture import SLUG, Group, Rank, groups_of, judge, slug_of


def rank(device: str, make: str = "cuda", host: str = "h") -> Rank:
    return Rank(host, make, device, 1 << 30, "bf16")


def valid(name: str) -> bool:
    return re.search(PARTICIPANT_NAME, f"eu-west~{name}") is not None


# ---- groups


def test_equal_devices_are_a_group_wherever_they_are() -> None:
    ranks = [rank("NVIDIA H20"), rank("910B", "npu"), rank("NVIDIA H20", host="other"), rank("NVIDIA A100")]
    assert groups_of(ranks) == [
        Group("cuda-nvidia-h20", (0, 2)),
        Group("npu-910b", (1,)),
        Group("cuda-nvidia-a100", (3,)),
    ]


def test_a_name_sets_ranks_apart_and_holds_others_of_their_make_together() -> None:
    ranks = [rank("H20"), rank("H20"), rank("H100"), rank("910B", "npu")]
    groups = groups_of(ranks, ["", "fast", "fast", "fast"])
    # (Another make has no collectives in common, whatever it is called.)
    assert groups == [Group("cuda-h20", (0,)), Group("fast", (1, 2)), Group("fast-2", (3,))]


def test_names_that_come_to_the_same_are_told_apart_and_not_taken_for_another_device() -> None:
    ranks = [rank("Gpu 9"), rank("gpu-9"), rank("GPU_9"), rank("gpu 10")]
    assert [group.name for group in groups_of(ranks)] == ["cuda-gpu-9", "cuda-gpu-9-2", "cuda-gpu-9-3", "cuda-gpu-10"]
    long = [rank("x" * 40 + tail) for tail in "abc"]
    names = [group.name for group in groups_of(long)]
    assert names == ["cuda-" + "x" * 27, "cuda-" + "x" * 25 + "-2", "cuda-" + "x" * 25 + "-3"]
    words = groups_of([rank("x" * 24 + " yy" + tail) for tail in "ab"])
    assert words[1].name == "cuda-" + "x" * 24 + "-2"


@given(st.lists(st.text(max_size=50), min_size=1, max_size=40))
def test_every_rank_is_in_one_group_whose_name_is_a_learner_s_and_its_own(devices: list[str]) -> None:
    groups = groups_of([rank(device) for device in devices])
    assert sorted(n for group in groups for n in group.ranks) == list(range(len(devices)))
    assert len({group.name for group in groups}) == len(groups) == len(set(devices))
    assert all(valid(group.name) and len(group.name) <= SLUG for group in groups)


@given(st.text(max_size=80))
def test_any_device_s_name_makes_a_slug(device: str) -> None:
    assert valid(slug_of(device))


def test_slugs_are_what_people_would_write() -> None:
    assert slug_of("NVIDIA H20-3e (96 GB)") == "nvidia-h20-3e-96-gb"
    assert slug_of("昇腾") == "device"


# ---- the verdict

TWO = [Group("fast", (0, 1)), Group("slow", (2,))]


def test_groups_average_where_they_keep_most_of_their_speed() -> None:
    verdict = judge(32, TWO, [30.0, 10.0], 0.05)
    assert verdict.mode == "average"
    assert verdict.apart == 40.0
    assert verdict.together == pytest.approx(32 / 0.85)
    assert "keep 94% of their speed" in verdict.why
    assert "0.05 s of 0.85 s" in verdict.why
    assert "one more learner costs" in verdict.why


def test_groups_are_learners_where_the_exchange_takes_too_long() -> None:
    verdict = judge(32, TWO, [30.0, 10.0], 0.5)
    assert verdict.mode == "learners"
    assert "keep 62% of their speed" in verdict.why


def test_groups_are_learners_where_the_batch_is_too_coarse_to_share() -> None:
    verdict = judge(3, TWO, [3.0, 2.0], 0.0)  # 2 and 1 sequences: 0.67 s, where 0.6 would do
    assert verdict.mode == "average"
    assert judge(4, TWO, [1.0, 2.9], 0.0).mode == "average"
    assert judge(2, TWO, [1.0, 1.5], 0.0).mode == "learners"  # one each: the faster waits


def test_a_group_for_which_nothing_is_left_is_named() -> None:
    verdict = judge(2, TWO, [100.0, 1.0], 0.0)
    assert verdict.mode == "learners"
    assert verdict.why == "a batch of 2 sequences leaves nothing for slow"
