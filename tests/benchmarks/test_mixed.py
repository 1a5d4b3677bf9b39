"""The benchmark of mixed sites: its figures are what it says, and it fails where ranks differ from one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import mixed, same
from benchmarks.machine import busy_ticks
from benchmarks.mixed import Round, rows_of
from benchmarks.mixed_rank import Head
from benchmarks.processes import write_toml
from benchmarks.ranks import Ranks
from benchmarks.same import compared, distance
from shared.config import load_site
from shared.errors import FaultError
from site_agent.crew import enlist

TEXT = "".join(f"line {n} of a text that is long enough to be learnt from, {n * n} times.\n" for n in range(2000))
RUN = {
    "run": {"name": "mixed", "tokens": 10**9},
    "task": {"use": "byte-lm", "context": 16, "width": 16, "layers": 1, "heads": 2},
    "inner": {"lr": 1e-2, "batch_size": 4, "clip_norm": 0.0},
    "rounds": {"fragments": 2},
}
JUDGED = {"efficiency": 0.9, "exchange_seconds": 0.02, "mode": "average"}


def window(speed: float) -> dict[str, Any]:
    parts = {"step_seconds": 1.0, "group_seconds": [0.7, 0.8], "waiting": 0.1, "exchange": 0.05, "optimizer": 0.01}
    return {"tokens": 10 * speed, "seconds": 10.0, "shares": [12, 4], **parts}


def round_of(fast: float, slow: float, fast_busy: float, slow_busy: float, averaged: float) -> Round:
    return Round(*map(window, (fast, slow, fast_busy, slow_busy, averaged)))


def test_efficiency_is_over_the_speeds_of_the_same_round() -> None:
    # The machine gets slower from round to round: what is compared was measured under the same load.
    rounds = [round_of(*(speed / by for speed in (600, 200, 480, 160, 680))) for by in (1, 2, 4)]
    alone, apart, averaging = rows_of("1 : 3", 1000, JUDGED, rounds)
    assert [row["mode"] for row in (alone, apart, averaging)] == ["each alone", "apart, at once", "averaging"]
    assert (alone["fast"], alone["slow"], alone["tokens_per_second"], alone["efficiency"]) == (300, 100, 400, 1)
    assert (apart["efficiency"], apart["efficiency_busy"]) == (pytest.approx(0.8), 1)
    assert (averaging["tokens_per_second"], averaging["efficiency"]) == (340, pytest.approx(0.85))
    assert averaging["efficiency_busy"] == pytest.approx(340 / 320)


def test_a_step_of_both_is_told_beside_what_was_judged_before() -> None:
    alone, _, averaging = rows_of("1 : 3", 1000, JUDGED, [round_of(300, 100, 240, 80, 340)])
    assert alone.keys() == averaging.keys()
    assert alone["shares"] is None
    assert averaging["shares"] == "12 + 4"
    assert (averaging["fast_seconds"], averaging["slow_seconds"], averaging["exchange_bytes"]) == (0.7, 0.8, 4000)
    assert (averaging["predicted_efficiency"], averaging["judged"]) == (0.9, "average")


def test_a_distance_is_in_roundings_of_each_tensors_largest_element() -> None:
    large, small = torch.tensor([1024.0, 1.0]), torch.tensor([0.5, -0.25])
    off = {"large": torch.tensor([1024.0, 1.0 + 2.0**-12]), "small": small}
    assert distance({"large": large, "small": small}, {"large": large, "small": small}) == 0
    assert distance(off, {"large": large, "small": small}) == pytest.approx(4)
    assert distance({"small": small.double() + 2.0**-24}, {"small": small}) == pytest.approx(2)


@pytest.mark.parametrize("ours", [{}, {"w": torch.tensor([float("nan")])}, {"w": torch.tensor([float("inf")])}])
def test_what_is_missing_or_not_finite_is_infinitely_far(ours: dict[str, torch.Tensor]) -> None:
    assert distance(ours, {"w": torch.tensor([1.0])}) == float("inf")


def test_equal_is_within_the_bound() -> None:
    told = [
        compared("", 1, difference, bound)["equal"] for difference, bound in ((4.0, 16.0), (16.1, 16.0), (0, 0), (1, 0))
    ]
    assert told == ["yes", "no", "yes", "no"]


def test_busy_is_all_but_idle_and_waiting_for_disks() -> None:
    assert busy_ticks("cpu  1 20 300 4000 50000 600000 7000000 80000000 9 9\ncpu0 1 1 1 1 1 1 1 1 0 0\n") == 87600321


@pytest.mark.parametrize("codec", same.CODECS)
def test_every_codec_can_be_prepared(codec: str, head: Head) -> None:
    run = same.upload_run(RUN, codec)
    head.prepare(run)
    first = head.contributions(1)["digests"]
    head.prepare(run)
    assert head.contributions(1)["digests"] == first
    assert len(set(first)) == 4
    assert set(head.ensemble.trainer.residuals) == {0, 1}  # the second ones had it, too


@pytest.fixture
def head(tmp_path: Path) -> Head:
    """One process as its own site."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    site = {"name": "one", "coordinator": "http://127.0.0.1", "state": "state"}
    write_toml(
        tmp_path / "site.toml",
        {"site": site, "devices": {"device": "cpu"}, "data": {"paths": str(tmp_path / "text.txt")}},
    )
    config = load_site(tmp_path / "site.toml")
    return Head(enlist(config), config)


def test_gradients_are_those_of_fp64_to_rounding(head: Head, tmp_path: Path) -> None:
    rounded, exact = tmp_path / "rounded", tmp_path / "exact"
    head.prepare(RUN)
    head.gradients(2, str(rounded), [])
    head.prepare(RUN)
    head.exact(2, str(exact))
    one, other = same.load_file(rounded), same.load_file(exact)
    assert 0 < distance(one, other) < 100
    assert any(not torch.equal(one[name], one[name.replace("0.", "1.", 1)]) for name in one if name.startswith("0."))


def test_a_window_is_whole_steps_and_its_parts_are_within_them(head: Head) -> None:
    head.prepare(RUN)
    found = head.train(0.0, 3)
    assert found["tokens"] == 3 * 4 * 16
    assert found["shares"] == [4]
    assert 0 < found["optimizer"] + found["waiting"] + found["exchange"] < found["step_seconds"]
    assert found["step_seconds"] == pytest.approx(found["seconds"] / 3)


def test_a_rank_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    with (
        pytest.raises(FaultError, match="no_such_order"),
        Ranks(tmp_path / "one", {"device": ["cpu"]}, tmp_path) as ranks,
    ):
        ranks.ask("no_such_order")


@pytest.mark.parametrize(("difference", "fails"), [(0, False), (1, True)])
def test_the_benchmark_fails_where_ranks_are_not_equal_to_one_process(
    difference: float, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = [{**row, "others_cores": 0.0} for row in rows_of("1 : 3", 1000, JUDGED, [round_of(3, 1, 3, 1, 3)])]
    monkeypatch.setattr(same, "gradients", lambda *_: [compared("gradients", 1000, 1.0, 2.0)])
    monkeypatch.setattr(same, "contributions", lambda *_: [compared("int4", 1000, difference, 0)])
    monkeypatch.setattr(mixed, "measure", lambda *_: speeds)
    monkeypatch.setattr(mixed, "shakespeare", lambda directory: directory)
    monkeypatch.setattr(mixed, "copy_bytes_per_second", lambda: 1e9)
    monkeypatch.setattr(sys, "argv", ["mixed", "--quick", "--json", str(tmp_path / "rows.json")])
    if fails:
        with pytest.raises(SystemExit, match="int4"):
            mixed.main()
    else:
        mixed.main()
    written = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert len(written["rows"]) == 3 * len(mixed.QUICK_CASES) + 2
