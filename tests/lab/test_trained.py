"""Runs that train in virtual time, with tensors."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.trained import TrainedRun
from lab.virtual import VirtualSite
from site_agent.training import encoders
from tests.support.live import run_config

TEXT = "".join(f"line {n} of a text that is long enough to be learnt from, {n * n} times.\n" for n in range(500))


@pytest.mark.parametrize("upload", ["int4", "topk2"])
def test_a_run_whose_sites_encode_in_torch_operations_ends_in_the_same_bits(
    upload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sites on accelerators do; with error feedback from round to round."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    outer = {"optimizer": "sgd"} if upload == "topk2" else {"lr": 1.0, "momentum": 0.5}
    config = run_config(
        {
            "run": {"name": "small", "tokens": 6_000, "min_sites": 2},
            "task": {"use": "byte-lm", "paths": "text.txt", "context": 16, "width": 32, "layers": 1, "heads": 2},
            "inner": {"lr": 3e-3, "steps": 8, "batch_size": 8},
            "outer": outer,
            "rounds": {"fragments": 2, "quorum": "all", "pacing": "equal-steps", "overlap_steps": 2},
            "wire": {"upload": upload},
        }
    )

    def digests() -> list[tuple[int, str]]:
        run = TrainedRun(config, tmp_path, [VirtualSite("a", 1.0, 0.3), VirtualSite("b", 1.7, 2.0)], evaluations=1)
        run.run()
        return run.digests()

    by_numba = digests()
    monkeypatch.setattr(encoders, "encoder", lambda codec, device: encoders.torch_operations(codec))
    assert digests() == by_numba
    assert min(version for version, _ in by_numba) > 2
