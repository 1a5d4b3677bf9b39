from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from shared.errors import ConfigError
from shared.task import ENTRY_POINT_GROUP, Shard, build_model
from site_agent.tasks.hf_causal_lm import HFCausalLM
from site_agent.training.trainer import evaluate
from tests.support.tiny import GPT2, LLAMA, MIXTRAL, SENTENCES, build, write_config, write_tokenizer

pytest.importorskip("transformers")
REPOSITORY = Path(__file__).parents[3]
CONFIGS = {"llama": LLAMA, "gpt2": GPT2, "mixtral": MIXTRAL}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "model")
    return write_config(tmp_path / "model", LLAMA)


def task(model: Path, **options: Any) -> HFCausalLM:
    return HFCausalLM({"model": str(model), "context": 16, **options})


def some_tokens(*shape: int) -> Tensor:
    return torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(0))


# ---- options


def test_the_task_is_registered_under_its_name() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    value = project["entry-points"][ENTRY_POINT_GROUP]["hf-causal-lm"]
    assert EntryPoint("hf-causal-lm", value, ENTRY_POINT_GROUP).load() is HFCausalLM


def test_to_import_the_tasks_imports_none_of_the_libraries() -> None:
    code = (
        "import sys, site_agent.tasks.hf_causal_lm, site_agent.tasks.byte_lm\n"
        "print({'transformers', 'datasets', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": None}, r"\[task\] or \[data\] model: None will not do; give a directory that has a config\.json"),
        ({"modell": "x"}, r'\[task\] or \[data\] modell: hf-causal-lm has no such key; did you mean "model"\?'),
        ({"context": 0}, r"\[task\] or \[data\] context: 0 will not do; give tokens .* from 1"),
        ({"token_dtype": "int8"}, r"token_dtype: 'int8' will not do; give \"uint16\" or \"uint32\""),
        ({"attention": "fast"}, r"attention: 'fast' will not do; give \"sdpa\", \"eager\" or \"flash_attention_2\""),
        ({"block_tokens": 16}, r"\[task\] block_tokens: 16 holds no window of context \+ 1 = 17 tokens; give 17 "),
    ],
)
def test_options_that_will_not_do_are_named_with_what_would(
    tmp_path: Path, options: Mapping[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        HFCausalLM({"model": str(tmp_path), "context": 16, **options})


def test_a_task_without_a_model_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"^\[task\] model: hf-causal-lm needs it; give a directory"):
        HFCausalLM({})


# ---- the model


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("file", [False, True])
def test_the_model_is_transformers_own_under_the_seed(tmp_path: Path, kind: str, file: bool) -> None:
    directory = write_config(tmp_path, CONFIGS[kind])
    t = task(directory / "config.json" if file else directory)
    first, again, other = (dict(build_model(t, seed).named_parameters()) for seed in (1, 1, 2))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        reference = dict(build(CONFIGS[kind]).named_parameters())
    assert first.keys() == reference.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], reference[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert {parameter.dtype for parameter in first.values()} == {torch.float32}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_model_can_be_built_without_memory_for_it(tmp_path: Path, kind: str) -> None:
    t = task(write_config(tmp_path, CONFIGS[kind]))
    with torch.device("meta"):
        model = t.build_model()
    shapes = {name: parameter.shape for name, parameter in build_model(t, 0).named_parameters()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_attention_is_the_one_that_was_asked_for(model_dir: Path) -> None:
    assert build_model(task(model_dir), 0).config._attn_implementation == "sdpa"
    eager = build_model(task(model_dir, attention="eager"), 0)
    assert eager.config._attn_implementation == "eager"
    assert eager.config.use_cache is False
    with pytest.raises(ConfigError, match=r"cannot be built with attention = 'flash_attention_2': .*lash"):
        build_model(task(model_dir, attention="flash_attention_2"), 0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_loss_is_the_mean_in_nats_of_the_next_token(tmp_path: Path, kind: str, attention: str) -> None:
    t = task(write_config(tmp_path, CONFIGS[kind]), attention=attention)
    model = build_model(t, 0).eval()
    batch = some_tokens(3, 17)
    with torch.no_grad():
        loss, tokens = t.loss(model, batch)
        log_p = F.log_softmax(model(input_ids=batch).logits.double(), -1)  # (B, T+1, V)
    assert tokens == 3 * 16
    expected = -log_p[:, :-1].gather(2, batch[:, 1:, None]).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_later_tokens_cannot_change_earlier_predictions(tmp_path: Path, kind: str) -> None:
    model = build_model(task(write_config(tmp_path, CONFIGS[kind])), 0).eval()
    tokens = some_tokens(1, 16)
    changed = tokens.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 300
    with torch.no_grad():
        before, after = model(input_ids=tokens).logits, model(input_ids=changed).logits
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-6)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-6)


def test_a_router_is_balanced_while_it_trains_where_the_config_asks_for_it(tmp_path: Path) -> None:
    plain = task(write_config(tmp_path / "plain", MIXTRAL))
    asks = task(write_config(tmp_path / "asks", MIXTRAL, output_router_logits=True, router_aux_loss_coef=0.5))
    model, batch = build_model(asks, 0), some_tokens(2, 17)
    without = float(plain.loss(build_model(plain, 0), batch)[0].detach())
    auxiliary = float(model(input_ids=batch[:, :-1]).aux_loss.detach())
    assert auxiliary > 1
    assert float(asks.loss(model, batch)[0].detach()) == pytest.approx(without + 0.5 * auxiliary, rel=1e-5)
    assert float(asks.loss(model.eval(), batch)[0].detach()) == pytest.approx(without, rel=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_receives_a_gradient(tmp_path: Path, kind: str) -> None:
    t = task(write_config(tmp_path, CONFIGS[kind]))
    model = build_model(t, 0)
    t.loss(model, some_tokens(8, 17))[0].backward()  # type: ignore[no-untyped-call]
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


# ---- what does not go together


def test_a_model_that_is_not_there_is_told_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^\[task\] model: no file .*config\.json; name a directory .*hf download"):
        build_model(task(tmp_path), 0)
    with pytest.raises(ConfigError, match=r"no file .*/org/name; name a directory"):
        build_model(task(tmp_path / "org" / "name"), 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"config\.json cannot be read"),
        ("[]", r"config\.json has no model_type"),
        ('{"vocab_size": 3}', r"config\.json has no model_type"),
        ('{"model_type": "nonesuch"}', r"transformers does not take .* \(model_type 'nonesuch'\): "),
        (
            '{"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.OwnLM"}}',
            r"transformers does not take .* \(model_type 'own'\): .*custom code",
        ),
        ('{"model_type": "vit"}', r"config\.json cannot be built"),
    ],
)
def test_a_config_that_cannot_be_used_is_told(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "code.py").write_text("raise SystemExit('run')")
    with pytest.raises(ConfigError, match=said) as refused:
        build_model(task(tmp_path), 0)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_a_context_past_the_models_positions_is_refused(tmp_path: Path, config: Mapping[str, Any]) -> None:
    directory = write_config(tmp_path, config)
    build_model(task(directory, context=32), 0)
    with pytest.raises(ConfigError, match=r"context: 33 tokens are more than the 32 positions of .*; give 32 or fewer"):
        build_model(task(directory, context=33), 0)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    build_model(task(write_config(tmp_path, LLAMA, vocab_size=301)), 0)
    with pytest.raises(ConfigError, match=r"tokenizer\.json has ids up to 299, and .* a vocab_size of 299; name "):
        build_model(task(write_config(tmp_path, LLAMA, vocab_size=299)), 0)


def test_without_the_library_it_says_what_to_install(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r'transformers cannot be imported .*pip install "isthmus\[hf\]"'):
        build_model(task(model_dir), 0)


# ---- weights of a directory


@pytest.mark.parametrize("kind", CONFIGS)
def test_pretrained_weights_are_read_whatever_they_are_called(tmp_path: Path, kind: str) -> None:
    directory = write_config(tmp_path, CONFIGS[kind])
    model = build(CONFIGS[kind])
    model.save_pretrained(directory)
    found = dict(task(directory).pretrained(directory).named_parameters())
    assert all(torch.equal(found[name], value) for name, value in model.named_parameters())


def test_weights_that_do_not_fit_are_told(tmp_path: Path) -> None:
    build(LLAMA).save_pretrained(tmp_path / "llama")
    deeper = task(write_config(tmp_path / "deeper", LLAMA, num_hidden_layers=3))
    with pytest.raises(ConfigError, match=r"\[run\] init: .*llama does not fit .* no weights for model\.layers\.2"):
        deeper.pretrained(tmp_path / "llama")
    wider = task(write_config(tmp_path / "wider", LLAMA, intermediate_size=64))
    with pytest.raises(ConfigError, match=r"\[run\] init: .*llama does not fit the task: "):
        wider.pretrained(tmp_path / "llama")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    t = task(write_config(tmp_path, LLAMA))
    torch.save(build_model(t, 0).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"\[run\] init: "):
        t.pretrained(tmp_path)


# ---- data


def test_it_learns_a_text_that_can_be_known(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SENTENCES[0] * 400)
    t = task(model_dir, paths=str(tmp_path / "a.txt"))
    model = build_model(t, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    stream = t.train_batches(Shard(0, 1), 8)
    for _ in range(60):
        loss, _ = t.loss(model, next(stream))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    held_out = evaluate(t, model, t.eval_batches(8), torch.device("cpu"))
    assert held_out is not None
    assert held_out < 0.5
    assert t.generate(model, "the quick brown", 4, seed=0) in SENTENCES[0]


def test_options_reach_the_data(model_dir: Path, tmp_path: Path) -> None:
    np.arange(6400, dtype=np.uint32).__mod__(300).tofile(tmp_path / "a.bin")
    t = task(
        model_dir, paths=str(tmp_path / "a.bin"), token_dtype="uint32", block_tokens=50, held_out=0.25, eval_batches=3
    )
    assert next(t.train_batches(Shard(1, 2), 5)).shape == (5, 17)
    assert [tuple(batch.shape) for batch in t.eval_batches(7)] == [(7, 17)] * 3
    assert t.manifest() is None
    leased = task(model_dir, paths=str(tmp_path / "a.bin"), token_dtype="uint32", partition="leased", block_tokens=50)
    manifest = leased.manifest()
    assert manifest is not None
    assert leased.leased_batch([(0, 0), (1, manifest.sizes[1] - 1)]).shape == (2, 17)
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": SENTENCES[0] * 400}) + "\n")
    rows = task(model_dir, paths=str(tmp_path / "b.jsonl"), text_key="body", cache=str(tmp_path / "tokens"))
    next(rows.train_batches(Shard(0, 1), 1))
    assert list((tmp_path / "tokens").glob("*/*.npy"))


def test_data_that_is_tokenised_needs_no_tokenizer(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(1000) % 300)
    t = task(write_config(tmp_path / "model", LLAMA), paths=str(tmp_path / "a.npy"))
    assert next(t.train_batches(Shard(0, 1), 2)).shape == (2, 17)
    with pytest.raises(ConfigError, match=r"tokenizer: not set, .*; name one to sample text"):
        t.generate(build_model(t, 0), "x", 1, seed=0)


def test_ids_beyond_the_models_vocabulary_are_told_before_a_device_sees_them(tmp_path: Path) -> None:
    tokens = np.arange(1_000_000) % 300
    tokens[20_000:40_000] = 300  # between the samples that are looked at when it is opened
    np.save(tmp_path / "a.npy", tokens)
    t = task(write_config(tmp_path / "model", LLAMA), paths=str(tmp_path / "a.npy"))
    stream = t.train_batches(Shard(0, 1), 50_000)
    with pytest.raises(ConfigError, match=r"a\.npy has token id 300, outside the model's vocabulary of 300"):
        next(stream)


# ---- what becomes of it


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_export_is_a_directory_of_transformers(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, out = write_config(tmp_path / "in", CONFIGS[kind], torch_dtype="bfloat16"), tmp_path / "out"
    write_tokenizer(source)
    (source / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    t = task(source)
    model = build_model(t, 0)
    out.mkdir()
    for name, content in t.hf_files().items():
        (out / name).write_bytes(content)
    save_file({name: p.detach() for name, p in model.named_parameters()}, out / "model.safetensors", {"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert loaded.dtype == torch.float32
    assert loaded.generation_config.temperature == 0.5
    tokens = some_tokens(2, 16)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)
    text = "the quick brown é fox"
    assert t.tokenizer is not None
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == t.tokenizer.encode([text])[0]
    assert json.loads((out / "config.json").read_text())["architectures"] == [type(model).__name__]


def test_a_sample_continues_the_prompt_and_leaves_the_model_as_it_was(model_dir: Path) -> None:
    t = task(model_dir)
    model = build_model(t, 0)
    first = t.generate(model, "to be", 20, seed=1)
    assert first.startswith("to be")
    assert first == t.generate(model, "to be", 20, seed=1) != t.generate(model, "to be", 20, seed=2)
    assert t.generate(model, "", 3, seed=0)
    assert all(module.training for module in model.modules())


def test_a_sample_is_drawn_without_dropout(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    t = task(write_config(tmp_path, GPT2, resid_pdrop=0.5, embd_pdrop=0.5))
    model = build_model(t, 0).train()
    assert t.generate(model, "to be", 20, seed=1) == t.generate(model, "to be", 20, seed=1)


def test_the_fingerprint_is_of_what_the_model_computes(model_dir: Path, tmp_path: Path) -> None:
    fingerprint = task(model_dir).fingerprint()
    assert set(fingerprint) == {"model", "tokenizer", "end_of_text"}
    assert all(isinstance(value, str) for value in fingerprint.values())
    for change in ({"_name_or_path": "x"}, {"transformers_version": "9"}, {"torch_dtype": "bfloat16"}):
        assert task(write_config(model_dir, LLAMA, **change)).fingerprint() == fingerprint
    (model_dir / "config.json").write_text(json.dumps(dict(reversed(LLAMA.items())), indent=1))
    assert task(model_dir).fingerprint() == fingerprint
    other = task(write_config(model_dir, LLAMA, rope_theta=5e5)).fingerprint()
    assert other["model"] != fingerprint["model"]
    assert other["tokenizer"] == fingerprint["tokenizer"]
    write_tokenizer(tmp_path / "other", 290)
    named = task(write_config(model_dir, LLAMA), tokenizer=str(tmp_path / "other")).fingerprint()
    assert named["model"] == fingerprint["model"]
    assert named["tokenizer"] != fingerprint["tokenizer"]


def test_a_sequence_counts_its_context(model_dir: Path) -> None:
    assert task(model_dir).sequence_tokens() == 16
