"""Version 0 of a run: the task's weights or those of files, made one fragment at a time."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from coordinator.initial import initial_weights
from coordinator.service import Coordinator
from shared.config import RunConfig, parse
from shared.errors import ConfigError
from shared.fragments import F32
from tests.support.tiny import GPT2, LLAMA, MIXTRAL, build, write_config

TASK = """
import torch
from torch import nn

BUILT = []  # the devices of the parameters of each model


class Two:
    def __init__(self, options):
        self.value = options.get("value", 1.0)
        self.reads = options.get("reads", False)

    def fingerprint(self):
        return {"table": str(self.value)}

    def build_model(self):
        model = nn.Module()
        model.table = nn.Embedding(5, 4)
        model.head = nn.Parameter(torch.full((3,), self.value))
        BUILT.append({parameter.device.type for parameter in model.parameters()})
        if self.reads:
            model.head.sum().item()
        return model

    def train_batches(self, shard, batch_size):
        raise NotImplementedError

    def loss(self, model, batch):
        raise NotImplementedError
"""
TABLE, HEAD = torch.arange(20.0).reshape(5, 4), torch.tensor([1.5, -2.0, 0.25])


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "two.py").write_text(TASK)
    return tmp_path


def config(init: str = "", **task: Any) -> RunConfig:
    tables = {
        "run": {"name": "initial", "tokens": 10, "init": init},
        "task": {"use": "two.py:Two", **task},
        "rounds": {"fragments": 2},
    }
    return parse(RunConfig, tables, "run.toml")


def named(config: RunConfig, base: Path) -> dict[str, F32]:
    initial = initial_weights(config, base)
    arrays: dict[str, F32] = {}
    for fragment in initial.layout.fragments:
        arrays |= fragment.unflatten(initial.weights(fragment))
    assert initial.embeddings == ["table.weight"]
    return arrays


def test_without_files_they_are_the_models_under_the_seed(here: Path) -> None:
    first, again = named(config(), here), named(config(), here)
    assert first["table.weight"].tobytes() == again["table.weight"].tobytes()
    assert first["head"].tolist() == [1.0] * 3


def test_they_come_with_what_the_task_says_of_itself(here: Path) -> None:
    assert initial_weights(config(value=2.0), here).fingerprint == {"table": "2.0"}


def write(path: Path, dtype: torch.dtype = torch.float32, **tensors: Tensor) -> None:
    save_file({name.replace("_", "."): tensor.to(dtype) for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_come_from_a_file_whatever_precision_it_has(here: Path, dtype: torch.dtype) -> None:
    write(here / "w.safetensors", dtype, table_weight=TABLE, head=HEAD, something=torch.ones(2))
    found = named(config("w.safetensors"), here)
    assert found.keys() == {"table.weight", "head"}
    assert found["table.weight"].dtype == np.float32
    assert found["table.weight"].tolist() == TABLE.tolist()
    assert found["head"].tolist() == HEAD.tolist()


def built(config: RunConfig, base: Path) -> list[set[str]]:
    """The devices of the models that the task built for these weights."""
    found = named(config, base)
    assert found["head"].tolist() == (HEAD.tolist() if config.run.init else [1.0] * 3)
    devices: list[set[str]] = sys.modules["isthmus_task_two"].BUILT
    return devices


def test_a_model_whose_weights_come_from_files_takes_no_memory(here: Path) -> None:
    write(here / "w.safetensors", table_weight=TABLE, head=HEAD)
    assert built(config("w.safetensors"), here) == [{"meta"}]
    assert built(config(), here) == [{"cpu"}]


def test_a_task_that_needs_values_to_build_its_model_is_given_some(
    here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write(here / "w.safetensors", table_weight=TABLE, head=HEAD)
    assert built(config("w.safetensors", reads=True), here) == [{"meta"}, {"cpu"}]
    assert [message[:61] for message in caplog.messages] == [
        "the model is built whole, though its weights come from files:"
    ]


def test_they_come_from_several_files(here: Path) -> None:
    (here / "w").mkdir()
    write(here / "w" / "1.safetensors", table_weight=TABLE)
    write(here / "w" / "2.safetensors", head=HEAD)
    assert named(config("w"), here)["head"].tolist() == HEAD.tolist()


def test_a_tensor_that_lacks_or_has_another_shape_is_named(here: Path) -> None:
    write(here / "w.safetensors", table_weight=TABLE)
    with pytest.raises(ConfigError, match=r"w.safetensors does not fit the task: .*tensor head"):
        named(config("w.safetensors"), here)
    write(here / "w.safetensors", table_weight=TABLE, head=HEAD[:2])
    with pytest.raises(ConfigError, match="tensor head is"):
        named(config("w.safetensors"), here)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name_and_leave_nothing(here: Path, value: float) -> None:
    """Found when the fragments before it are on disk already."""
    with pytest.raises(ConfigError, match="initial tensor head holds NaN or infinity"):
        asyncio.run(Coordinator.open(config(value=value), here / "state", here))
    assert not (here / "state").exists()


HF = f"{Path(__file__).parents[2] / 'site_agent' / 'tasks' / 'hf_causal_lm.py'}:HFCausalLM"
TIED = {**LLAMA, "tie_word_embeddings": True}


def from_directory(init: str, model: Mapping[str, Any], base: Path) -> dict[str, F32]:
    write_config(base / "task", model)
    tables = {
        "run": {"name": "initial", "tokens": 10, "init": init},
        "task": {"use": HF, "model": "task", "context": 16},
        "rounds": {"fragments": 2},
    }
    initial = initial_weights(parse(RunConfig, tables, "run.toml"), base)
    arrays: dict[str, F32] = {}
    for fragment in initial.layout.fragments:
        arrays |= fragment.unflatten(initial.weights(fragment))
    return arrays


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("kind", [LLAMA, TIED, GPT2, MIXTRAL], ids=["llama", "tied", "gpt2", "mixtral"])
def test_they_come_from_what_save_pretrained_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Mapping[str, Any], shard: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("transformers")
    model = build(kind)
    model.save_pretrained(tmp_path / "weights", max_shard_size=shard)
    assert len(list((tmp_path / "weights").glob("*.safetensors"))) > (shard == "20KB")
    found = from_directory("weights", kind, tmp_path)
    wanted = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    assert found.keys() == wanted.keys()
    assert all(found[name].tobytes() == value.tobytes() for name, value in wanted.items())


def test_a_directory_of_another_model_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("transformers")
    build(LLAMA).save_pretrained(tmp_path / "weights")
    with pytest.raises(ConfigError, match=r"\[run\] init: .*does not fit the task: it has no weights for"):
        from_directory("weights", {**LLAMA, "num_hidden_layers": 3}, tmp_path)
    with pytest.raises(ConfigError, match=r"\[run\] init: .*: tensor .* is \[32, 48\] there and \[32, 64\] in"):
        from_directory("weights", {**LLAMA, "intermediate_size": 64}, tmp_path)
    assert "are left out" not in caplog.text
    from_directory("weights", {**LLAMA, "num_hidden_layers": 1}, tmp_path)
    assert "9 tensors are not the model's and are left out, the first is model.layers.1." in caplog.text


def test_a_directory_without_safetensors_is_told(here: Path) -> None:
    (here / "pickled").mkdir()
    (here / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ConfigError, match=r"\[run\] init: .*pickled holds no safetensors file, and others are not"):
        named(config("pickled"), here)
