from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shared.config import InnerTable, RunConfig, RunTable, TaskTable
from shared.errors import ConfigError
from shared.fragments import Layout, TensorSpec, build_layout
from site_agent.training import ensemble as ensemble_module
from site_agent.training import trainer as trainer_module
from site_agent.training.ensemble import Ensemble
from site_agent.training.trainer import Trainer, evaluate, load_flat

CPU = torch.device("cpu")


class Scalars(nn.Module):
    """A matrix, a vector and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        self.b = nn.Parameter(torch.tensor([5.0, 6.0, 7.0]))
        self.s = nn.Parameter(torch.tensor(8.0))


class Sum:
    """loss = x · Σ of all weights, so that every gradient is the batch's x."""

    def __init__(self) -> None:
        self.modes: list[bool] = []

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        self.modes.append(model.training)
        x = batch["x"][0] if isinstance(batch, dict) else batch
        return x * sum(p.sum() for p in model.parameters()), 8


def run_of(**inner: Any) -> RunConfig:
    return RunConfig(run=RunTable(name="r", tokens=10), task=TaskTable(use="sum"), inner=InnerTable(**inner))


def layout_of(model: nn.Module, fragments: int = 2) -> Layout:
    return build_layout([TensorSpec(n, tuple(p.shape)) for n, p in model.named_parameters()], fragments, "balanced")


def trainer(throttle: float = 1.0, **inner: Any) -> Ensemble:
    model = Scalars()
    settings = {"optimizer": "sgd", "lr": 0.5, "clip_norm": 0.0, "weight_decay": 0.0, **inner}
    return Ensemble(Trainer(Sum(), model, layout_of(model), run_of(**settings), CPU, throttle))


def stream(*values: float) -> Iterator[Tensor]:
    return itertools.cycle([torch.tensor(value) for value in values])


def weights(t: Ensemble) -> dict[str, Any]:
    return {name: p.detach().tolist() for name, p in t.trainer.parameters.items()}


# ---- fragments as flat vectors


def test_a_fragment_reads_as_one_flat_vector_in_the_order_of_names() -> None:
    t = trainer()
    assert [[tensor.name for tensor in fragment.tensors] for fragment in t.trainer.layout.fragments] == [
        ["w"],
        ["b", "s"],
    ]
    assert t.trainer.read(0).tolist() == [1, 2, 3, 4]
    assert t.trainer.read(1).tolist() == [5, 6, 7, 8]
    assert t.trainer.read(1).dtype == torch.float32


def test_what_is_written_is_read_back_bit_for_bit() -> None:
    t = trainer()
    flat = np.array([0.1, -0.0, 1e-45, -3e38], np.float32)
    t.trainer.write(1, torch.from_numpy(flat))
    assert t.trainer.read(1).numpy().tobytes() == flat.tobytes()
    assert t.trainer.read(0).tolist() == [1, 2, 3, 4]
    assert weights(t)["s"] == float(np.float32(-3e38))


def test_what_was_read_does_not_move_with_the_weights() -> None:
    t = trainer()
    before = t.trainer.read(0)
    t.step(stream(1.0), 0.5)
    assert before.tolist() == [1, 2, 3, 4]
    flat = torch.zeros(4)
    t.trainer.write(0, flat)
    flat += 1
    assert t.trainer.read(0).tolist() == [0, 0, 0, 0]


def test_a_model_in_half_precision_is_read_as_fp32() -> None:
    model = nn.Linear(2, 2, bias=False).to(torch.bfloat16)
    t = Ensemble(Trainer(Sum(), model, layout_of(model, 1), run_of(), CPU))
    flat = torch.tensor([1.5, -2.0, 0.25, 3.0])
    t.trainer.write(0, flat)
    assert t.trainer.read(0).dtype == torch.float32
    assert t.trainer.read(0).tolist() == flat.tolist()


def test_a_model_of_another_layout_is_refused_by_name() -> None:
    layout = layout_of(Scalars())
    with pytest.raises(ConfigError, match=r"lacks the run's tensor b"):
        Trainer(Sum(), nn.Linear(2, 2, bias=False), layout, run_of(), CPU)
    other = Scalars()
    other.b = nn.Parameter(torch.zeros(4))
    with pytest.raises(ConfigError, match=r"tensor b is \[4\] in this task and \[3\] in the run"):
        Trainer(Sum(), other, layout, run_of(), CPU)


# ---- an inner step


def test_an_sgd_step_is_the_one_on_paper() -> None:
    t = trainer()
    loss, tokens, seconds = t.step(stream(2.0), 0.25)
    assert loss == 2.0 * 36
    assert tokens == 8
    assert seconds >= 0
    assert weights(t) == {"w": [[0.5, 1.5], [2.5, 3.5]], "b": [4.5, 5.5, 6.5], "s": 7.5}
    t.step(stream(-4.0), 0.125)
    assert weights(t)["s"] == 8.0


def test_weight_decay_shrinks_the_matrix_only() -> None:
    t = trainer(weight_decay=0.5)
    t.step(stream(0.0), 0.5)
    assert weights(t) == {"w": [[0.75, 1.5], [2.25, 3.0]], "b": [5, 6, 7], "s": 8}


def test_the_gradient_is_clipped_to_the_norm_of_the_config() -> None:
    clipped = trainer(clip_norm=1.0)
    clipped.step(stream(10.0), 1.0)  # norm 10 · √8, so each gradient becomes 1/√8
    assert weights(clipped)["s"] == pytest.approx(8 - 8**-0.5, abs=1e-6)
    small = trainer(clip_norm=1.0)
    small.step(stream(0.25), 1.0)  # norm 0.71: as it is
    assert weights(small)["s"] == 7.75


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(bad: float, clip_norm: float, optimizer: str) -> None:
    t = trainer(clip_norm=clip_norm, optimizer=optimizer)
    before = weights(t)
    batches = stream(bad, bad, 0.5)
    for _ in range(2):
        _, tokens, _ = t.step(batches, 0.5)
        assert tokens == 8
    assert t.skipped_steps == 2
    assert weights(t) == before
    t.step(batches, 0.5)
    assert t.skipped_steps == 2
    assert weights(t) != before
    assert all(torch.isfinite(t.trainer.read(p)).all() for p in range(2))


def test_gradients_do_not_add_up_over_steps() -> None:
    t = trainer()
    for _ in range(3):
        t.step(stream(1.0), 0.5)
    assert weights(t)["s"] == 8 - 3 * 0.5


def test_batches_of_any_form_reach_the_task() -> None:
    class Batch(dict[str, Any]):
        pass

    t = trainer()
    t.step(iter([{"x": [torch.tensor(2.0)], "note": "kept"}]), 0.5)  # type: ignore[arg-type]
    assert weights(t)["s"] == 7.0


def test_training_runs_in_training_mode() -> None:
    t = trainer()
    t.trainer.model.eval()
    t.step(stream(1.0), 0.5)
    assert t.trainer.task.modes == [True]


def clocked(monkeypatch: pytest.MonkeyPatch, slept: list[float] | None = None) -> None:
    """Each look of a trainer at the clock is a second after the one before. (Others look at the clock as well.)"""
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)), sleep=([] if slept is None else slept).append)
    for module in (ensemble_module, trainer_module):
        monkeypatch.setattr(module, "time", clock)


def test_a_throttled_site_sleeps_until_its_share_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    clocked(monkeypatch, slept)
    trainer(throttle=0.25).step(stream(1.0), 0.5)
    assert slept == [6.0]  # a step of 2 s at a quarter of the speed takes 8 s
    trainer().step(stream(1.0), 0.5)
    assert slept == [6.0]


# ---- state


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_trainer_goes_on_from_its_state_as_if_nothing_had_been(optimizer: str) -> None:
    t, restored = trainer(optimizer=optimizer), trainer(optimizer=optimizer)
    t.step(stream(2.0), 0.25)
    restored.load_state(*t.state())
    for each in (t, restored):
        each.step(stream(-1.0), 0.25)
    assert weights(t) == weights(restored)


def test_weights_are_kept_where_the_optimizer_has_been_changed(caplog: pytest.LogCaptureFixture) -> None:
    t, restored = trainer(optimizer="adamw"), trainer(optimizer="muon")
    t.step(stream(2.0), 0.25)
    restored.load_state(*t.state())
    assert weights(t) == weights(restored)
    assert list(restored.trainer.optimizer.state()) == []
    assert "w was trained by AdamW, and is by Muon" in caplog.text


# ---- calibration


def test_calibration_leaves_a_fresh_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer(optimizer="adamw")
    batches = stream(1.0, float("nan"))
    assert t.calibrate(batches, 4, 1e9) >= 0
    assert list(t.trainer.optimizer.state()) == []
    assert t.skipped_steps == 0
    assert all(p.grad is None for p in t.trainer.parameters.values())
    # the first step after it is the first step of a new trainer
    fresh = trainer(optimizer="adamw")
    for p in range(2):
        t.trainer.write(p, fresh.trainer.read(p))
    t.step(stream(0.5), 0.1)
    fresh.step(stream(0.5), 0.1)
    assert weights(t) == weights(fresh)


def test_calibration_takes_the_steps_it_is_given_and_one_to_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked(monkeypatch)
    t = trainer()
    assert t.calibrate(stream(1.0), 3, 1e9) == 4.0  # five readings of the clock a step: four ticks from first to last
    assert len(t.trainer.task.modes) == 4


def test_calibration_ends_when_its_time_is_over_after_one_step_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked(monkeypatch)
    t = trainer()
    t.calibrate(stream(1.0), 100, 10.0)
    assert len(t.trainer.task.modes) == 1 + 3  # 4 + 4 + 4 ≥ 10
    t.calibrate(stream(1.0), 100, 0.0)
    assert len(t.trainer.task.modes) == 4 + 2


# ---- evaluation of published weights


def test_evaluation_is_weighted_by_tokens_and_leaves_the_mode() -> None:
    class Weighted:
        def loss(self, model: nn.Module, batch: tuple[float, int]) -> tuple[Tensor, int]:
            assert not model.training
            assert not torch.is_grad_enabled()
            return torch.tensor(batch[0]), batch[1]

    model = Scalars()
    assert evaluate(Weighted(), model, [(1.0, 1), (3.0, 2)], CPU) == pytest.approx(7 / 3)
    assert model.training
    assert evaluate(Weighted(), model, [], CPU) is None
    model.eval()
    evaluate(Weighted(), model, [(1.0, 1)], CPU)
    assert not model.training


def test_published_weights_are_loaded_into_any_model_of_the_layout() -> None:
    model, layout = Scalars(), layout_of(Scalars())
    load_flat(model, layout, [np.arange(4, dtype=np.float32), np.arange(4, 8, dtype=np.float32)])
    assert model.w.tolist() == [[0, 1], [2, 3]]
    assert model.b.tolist() == [4, 5, 6]
    assert float(model.s.detach()) == 7
    with pytest.raises(ConfigError, match="lacks the run's tensor"):
        load_flat(nn.Linear(2, 2), layout, [])


# ---- sequences without a token, and memory


class Masked:
    """Loss (Σ of all weights) · x over n tokens; of none it is not a number."""

    def __init__(self) -> None:
        self.most = 10**9

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        if len(batch) > self.most:
            raise torch.OutOfMemoryError("no room")
        tokens = int((batch > 0).sum())
        total = sum((p.sum() for p in model.parameters()), torch.zeros(()))
        return (total * batch.sum() / tokens if tokens else total * 0.0 + float("nan")), tokens


def masked(micro_batch: int = 0, **inner: Any) -> Ensemble:
    model = Scalars()
    settings = {"optimizer": "sgd", "lr": 0.5, "clip_norm": 0.0, "weight_decay": 0.0, "batch_size": 4, **inner}
    return Ensemble(Trainer(Masked(), model, layout_of(model), run_of(**settings), CPU), micro_batch)


def test_a_pass_without_tokens_is_worth_nothing_and_spoils_nothing() -> None:
    whole, cut = masked(), masked(micro_batch=1)
    batch = torch.tensor([1.0, 0.0, 3.0, 0.0])
    for t in (whole, cut):
        loss, tokens, _ = t.step(iter([batch]), 0.5)  # type: ignore[arg-type]
        assert (loss, tokens) == (72.0, 2)
        assert t.skipped_steps == 0
        assert weights(t)["s"] == 7.0
        assert t.evaluate([np.ones(4, np.float32)] * 2, [batch, torch.zeros(2)]) == 16.0
    assert evaluate(Masked(), Scalars(), [torch.zeros(2), batch], CPU) == 72.0


def test_a_step_without_any_token_is_skipped() -> None:
    t = masked()
    loss, tokens, _ = t.step(iter([torch.zeros(4)]), 0.5)  # type: ignore[arg-type]
    assert (loss, tokens, t.skipped_steps) == (0.0, 0, 1)
    assert weights(t)["s"] == 8.0


def test_memory_is_tried_with_the_optimizer_s_state_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert masked().trainer.fits(torch.ones(10**6)), "trying tells nothing of a CPU"
    monkeypatch.setattr(Trainer, "tries", True)
    t = masked(optimizer="adamw")
    states: list[int] = []
    loss = t.trainer.task.loss

    def noting(*args: Any) -> Any:
        states.append(len(list(t.trainer.optimizer.state())))
        return loss(*args)

    t.trainer.task.loss = noting
    before = weights(t)
    assert t.trainer.fits(torch.ones(4))
    assert states[0] == 0
    assert states[-1] > 0
    t.trainer.task.most = 3
    assert not t.trainer.fits(torch.ones(4))
    assert t.trainer.fits(torch.ones(3))
    assert weights(t) == before
    assert list(t.trainer.optimizer.state()) == []
    assert all(p.grad is None for p in t.trainer.parameters.values())
