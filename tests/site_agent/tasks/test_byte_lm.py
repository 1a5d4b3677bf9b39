from __future__ import annotations

import json
import math
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from shared.errors import ConfigError
from shared.task import ENTRY_POINT_GROUP, Shard, build_model
from site_agent.tasks import sampling
from site_agent.tasks.byte_lm import ByteLM
from tests.support.tiny import END, SENTENCES, write_tokenizer

SMALL: dict[str, Any] = {"width": 32, "layers": 2, "heads": 2, "context": 16}


def task(**options: Any) -> ByteLM:
    return ByteLM({**SMALL, **options})


def lively(t: ByteLM, seed: int = 0) -> nn.Module:
    """A model whose weights are large enough that every part of it moves the logits."""
    model = build_model(t, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def some_bytes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


# ---- options


def test_the_task_is_registered_under_its_name() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    value = project["entry-points"][ENTRY_POINT_GROUP]["byte-lm"]
    assert EntryPoint("byte-lm", value, ENTRY_POINT_GROUP).load() is ByteLM


def test_the_default_mlp_is_8_thirds_of_the_width_in_steps_of_32() -> None:
    assert task(width=96, heads=4).settings.mlp_width() == 256
    assert task(width=128, heads=4).settings.mlp_width() == 352
    assert task(hidden=40).settings.mlp_width() == 40


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"contxt": 8}, r'\[task\] or \[data\] contxt: byte-lm has no such key; did you mean "context"\?'),
        ({"qqq": 8}, r"\[task\] or \[data\] qqq: byte-lm has no such key; its keys are paths, context, width, "),
        ({"context": 0}, r"\[task\] or \[data\] context: 0 will not do; give .* from 1"),
        ({"context": "128"}, r"\[task\] or \[data\] context: '128' will not do; give "),
        ({"layers": True}, r"\[task\] or \[data\] layers: True will not do; give "),
        ({"width": 30, "heads": 4}, r"\[task\] width: 30 cannot be cut into 4 heads .* multiple of 8"),
        ({"width": 12, "heads": 4}, r"\[task\] width: 12 cannot "),
        ({"hidden": -1}, r"\[task\] or \[data\] hidden: -1 will not do; give "),
        ({"held_out": 1.0}, r"\[task\] or \[data\] held_out: 1\.0 will not do; give .* between 0 and 1"),
        (
            {"partition": "mine"},
            r"\[task\] or \[data\] partition: 'mine' will not do; "
            r"give \"sharded\", \"contiguous\", \"local\" or \"leased\"",
        ),
        ({"paths": 3}, r"\[task\] or \[data\] paths: 3 will not do; give a file, a directory"),
        ({"paths": ["a", 3]}, r"\[task\] or \[data\] paths: \['a', 3\] will not do; give a file, a directory"),
        ({"tie_embeddings": "no"}, r"\[task\] or \[data\] tie_embeddings: 'no' will not do; give true or false"),
        ({"block_bytes": 16}, r"\[task\] block_bytes: 16 holds no window of context \+ 1 = 17 bytes; give 17 "),
        ({"eval_batches": 0}, r"\[task\] or \[data\] eval_batches: 0 will not do; give "),
    ],
)
def test_options_that_will_not_do_are_named_with_what_would(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{said}[^\n]*$"):
        task(**options)


# ---- the model


def test_the_model_is_deterministic_under_the_seed() -> None:
    first, again, other = (build_model(task(), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_the_model_is_built_without_text() -> None:
    build_model(task(paths="/no/such/file.txt"), 0)
    build_model(task(), 0)


def test_parameters_are_named_as_in_llama_for_causal_lm() -> None:
    layer = [
        *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
        *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    ]
    names = {f"model.layers.{i}.{name}" for i in range(2) for name in layer}
    names |= {"model.embed_tokens.weight", "model.norm.weight"}
    assert set(build_model(task(), 0).state_dict()) == names
    untied = build_model(task(tie_embeddings=False), 0).state_dict()
    assert set(untied) == names | {"lm_head.weight"}
    assert untied["lm_head.weight"].shape == (256, 32)


def test_initial_weights_keep_the_residual_stream_small() -> None:
    weights = build_model(task(width=128, heads=4, layers=8), 0).state_dict()
    for name, value in weights.items():
        if value.dim() == 1:
            assert torch.equal(value, torch.ones_like(value))
        else:
            residual = "o_proj" in name or "down_proj" in name
            assert float(value.std()) == pytest.approx(0.02 / 4 if residual else 0.02, rel=0.05)


def test_the_first_loss_is_that_of_a_guess() -> None:
    t = task()
    loss, _ = t.loss(build_model(t, 0), some_bytes(8, 17))
    assert float(loss.detach()) == pytest.approx(math.log(256), abs=0.1)


def test_later_bytes_cannot_change_earlier_predictions() -> None:
    model = lively(task())
    tokens = some_bytes(1, 16)
    changed = tokens.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_every_earlier_byte_can_change_the_last_prediction() -> None:
    model = lively(task())
    tokens = some_bytes(1, 16)
    with torch.no_grad():
        last = model(tokens)[0, -1]
        for i in range(16):
            changed = tokens.clone()
            changed[0, i] = (changed[0, i] + 1) % 256
            assert not torch.allclose(model(changed)[0, -1], last, atol=1e-4)


def test_attention_knows_the_order_of_bytes() -> None:
    model = lively(task(layers=1))
    with torch.no_grad():
        one, other = model(torch.tensor([[1, 2, 3]])), model(torch.tensor([[2, 1, 3]]))
    assert not torch.allclose(one[0, -1], other[0, -1], atol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_llama_written_out(tied: bool) -> None:
    """Against the published equations in float64, one position and one head at a time."""
    t = task(tie_embeddings=tied)
    model = lively(t)
    tokens = some_bytes(1, 16)
    with torch.no_grad():
        got = model(tokens)[0].double()
    expected = _llama({k: v.double() for k, v in model.state_dict().items()}, tokens[0], heads=2, layers=2)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))


def _llama(w: dict[str, Tensor], tokens: Tensor, heads: int, layers: int) -> Tensor:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight

    def turned(x: Tensor, position: int) -> Tensor:  # (D,)
        half = len(x) // 2
        out = x.clone()
        for d in range(half):
            angle = position / 10_000 ** (2 * d / len(x))
            out[d] = x[d] * math.cos(angle) - x[d + half] * math.sin(angle)
            out[d + half] = x[d + half] * math.cos(angle) + x[d] * math.sin(angle)
        return out

    x = w["model.embed_tokens.weight"][tokens]  # (T, C)
    for i in range(layers):
        p = f"model.layers.{i}."
        h = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = (h @ w[f"{p}self_attn.{n}_proj.weight"].T for n in "qkv")
        mixed = torch.zeros_like(h)
        width = h.shape[1] // heads
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            for t in range(len(tokens)):
                scores = torch.stack([turned(q[t, part], t) @ turned(k[s, part], s) for s in range(t + 1)])
                mixed[t, part] = (scores / math.sqrt(width)).softmax(0) @ v[: t + 1, part]
        x = x + mixed @ w[p + "self_attn.o_proj.weight"].T
        h = norm(x, w[p + "post_attention_layernorm.weight"])
        gate, up = (h @ w[f"{p}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    head_weight = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, w["model.norm.weight"]) @ head_weight.T


def test_the_config_describes_the_weights() -> None:
    t = task(tie_embeddings=False, hidden=48)
    files = t.hf_files()
    assert set(files) == {"config.json"}
    config = json.loads(files["config.json"])
    weights = build_model(t, 0).state_dict()
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert weights["lm_head.weight"].shape == (config["vocab_size"], config["hidden_size"])
    assert weights["model.layers.0.mlp.up_proj.weight"].shape == (config["intermediate_size"], config["hidden_size"])
    assert f"model.layers.{config['num_hidden_layers'] - 1}.input_layernorm.weight" in weights
    assert config["num_key_value_heads"] == config["num_attention_heads"] == 2
    assert config["max_position_embeddings"] == 16
    assert config["tie_word_embeddings"] is False
    assert (config["rms_norm_eps"], config["rope_theta"], config["hidden_act"]) == (1e-5, 10_000.0, "silu")


# ---- loss and learning


def test_the_loss_is_the_mean_in_nats_of_the_next_byte_and_counts_its_bytes() -> None:
    t = task()
    model = lively(t)
    batch = some_bytes(3, 17)
    loss, tokens = t.loss(model, batch)
    assert tokens == 3 * 16
    with torch.no_grad():
        log_p = F.log_softmax(model(batch[:, :-1]).double(), -1)  # (B, T, 256)
    expected = -torch.stack([log_p[b, i, batch[b, i + 1]] for b in range(3) for i in range(16)]).mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_every_parameter_receives_a_gradient() -> None:
    for tied in (True, False):
        t = task(tie_embeddings=tied)
        model = lively(t)
        t.loss(model, some_bytes(4, 17))[0].backward()  # type: ignore[no-untyped-call]
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_it_learns_a_text_that_can_be_known(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox " * 400)
    t = task(paths=str(tmp_path))
    model = build_model(t, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    stream = t.train_batches(Shard(0, 1), 16)
    for _ in range(60):
        loss, _ = t.loss(model, next(stream))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        held_out = [float(t.loss(model, batch)[0]) for batch in t.eval_batches(16)]
    assert sum(held_out) / len(held_out) < 0.5
    assert t.generate(model, "the quick brown ", 4, seed=0) == "the quick brown fox "


# ---- data


def test_the_text_is_opened_at_the_first_use() -> None:
    t = task(paths="/no/such/file.txt")
    with pytest.raises(ConfigError, match=r"/no/such/file\.txt"):
        t.train_batches(Shard(0, 1), 4)
    with pytest.raises(ConfigError, match=r"/no/such/file\.txt"):
        t.eval_batches(4)
    with pytest.raises(ConfigError, match="paths: not set"):
        task().train_batches(Shard(0, 1), 4)


def test_options_reach_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(some_bytes(64 * 100).tolist()))
    t = task(paths=str(tmp_path / "a.txt"), block_bytes=50, held_out=0.25, eval_batches=3, context=24)
    assert next(t.train_batches(Shard(1, 2), 5)).shape == (5, 25)
    assert [tuple(batch.shape) for batch in t.eval_batches(7)] == [(7, 25)] * 3
    assert len(t.text.held_out.starts) == 32
    with pytest.raises(ConfigError, match="too few for 100 shards"):
        t.train_batches(Shard(0, 100), 4)
    local = task(paths=str(tmp_path / "a.txt"), partition="local", block_bytes=50)
    assert next(local.train_batches(Shard(0, 100_000), 4)).shape == (4, 17)


# ---- samples


def test_a_sample_continues_the_prompt_and_follows_from_its_seed() -> None:
    t = task()
    model = lively(t)
    first = t.generate(model, "To be", 50, seed=1)
    assert first.startswith("To be")
    assert first == t.generate(model, "To be", 50, seed=1)
    assert first != t.generate(model, "To be", 50, seed=2)
    assert t.generate(model, "No more", 0, seed=1) == "No more"


def test_a_sample_needs_no_prompt_and_may_be_longer_than_the_context() -> None:
    t = task()
    assert t.generate(lively(t), "", 40, seed=0)
    long = "é" * 40
    assert t.generate(lively(t), long, 1, seed=0).startswith(long)


def test_a_sample_has_as_many_bytes_as_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "TOP_K", 1)
    t = task()
    model = build_model(t, 0)
    with torch.no_grad():  # a model that always says "a" under the tied head
        for parameter in model.parameters():
            parameter.zero_()
        weights = model.state_dict()
        weights["model.embed_tokens.weight"].fill_(0.5)
        weights["model.embed_tokens.weight"][ord("a")] = 1.0
        weights["model.norm.weight"].fill_(1.0)
    assert t.generate(model, "b", 7, seed=0) == "b" + 7 * "a"


def test_a_sample_leaves_the_model_as_it_was() -> None:
    t = task()
    model = lively(t)
    grad_enabled: list[bool] = []
    model.register_forward_hook(lambda *_: grad_enabled.append(torch.is_grad_enabled()))
    random_state = torch.get_rng_state()
    for mode in (True, False):
        model.train(mode)
        t.generate(model, "x", 3, seed=0)
        assert all(module.training is mode for module in model.modules())
    assert grad_enabled == 6 * [False]
    assert torch.equal(random_state, torch.get_rng_state())


# ---- with a tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("tokenizers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_tokenizer(tmp_path / "tokenizer")


def test_with_a_tokenizer_everything_counts_its_tokens(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SENTENCES[0] * 200)
    t = task(paths=str(tmp_path / "a.txt"), tokenizer=str(tokenizer))
    model = build_model(t, 0)
    assert model.state_dict()["model.embed_tokens.weight"].shape == (300, 32)
    batch = next(t.train_batches(Shard(0, 1), 4))
    assert batch.shape == (4, 17)
    assert t.tokenizer is not None
    assert t.tokenizer.decode(batch[0].tolist()) in SENTENCES[0] * 200
    loss, tokens = t.loss(model, batch)
    assert tokens == 4 * 16
    assert float(loss.detach()) == pytest.approx(math.log(300), abs=0.1)
    with pytest.raises(ConfigError, match=r"\d tokens are too few for context = 4000"):
        task(paths=str(tmp_path / "a.txt"), tokenizer=str(tokenizer), context=4000).train_batches(Shard(0, 1), 4)


def test_the_directory_of_a_tokenizer_will_do(tokenizer: Path) -> None:
    assert task(tokenizer=str(tokenizer.parent)).vocabulary == 300


def test_a_sample_with_a_tokenizer_is_text(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = task(tokenizer=str(tokenizer))
    model = lively(t)
    assert t.generate(model, "the quick", 5, seed=1).startswith("the quick")
    assert t.generate(model, "the quick", 5, seed=1) == t.generate(model, "the quick", 5, seed=1)
    assert t.generate(model, "the quick", 0, seed=1) == "the quick"
    assert t.generate(model, "", 5, seed=1)


def test_the_fingerprint_is_the_tokenizers(tokenizer: Path, tmp_path: Path) -> None:
    assert task().fingerprint() == {}
    one = task(tokenizer=str(tokenizer)).fingerprint()
    assert set(one) == {"tokenizer", "end_of_text"}
    other = write_tokenizer(tmp_path / "other", 290)
    assert task(tokenizer=str(other)).fingerprint()["tokenizer"] != one["tokenizer"]


def test_an_export_with_a_tokenizer_is_a_directory_of_transformers(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    t = task(tokenizer=str(tokenizer))
    model = lively(t)
    for name, content in t.hf_files().items():
        (tmp_path / name).write_bytes(content)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = torch.tensor([auto("the quick brown fox").input_ids])
    assert (loaded.config.eos_token_id, auto.eos_token_id, auto.eos_token) == (0, 0, END)
    with torch.no_grad():
        expected, got = model(ids), loaded(input_ids=ids).logits
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))
