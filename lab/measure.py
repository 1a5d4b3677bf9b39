"""Small measurements that the demo stands on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from coordinator.export import stored_run
from coordinator.outer.step import OuterState
from coordinator.store.state_dir import StateDir
from shared.config import RunConfig
from shared.fragments import TensorSpec, build_layout, digest_flat
from shared.task import Shard, build_model, load_task
from site_agent import checkpoint
from site_agent.training.ensemble import Ensemble
from site_agent.training.trainer import Trainer

CALIBRATION_STEPS, CALIBRATION_SECONDS = 20, 3.0


def training_speed(config: RunConfig, sites: int, threads: int) -> float:
    """Tokens per second of a plain training loop on `threads` threads, a step being one batch of every site: what the
    data-parallel half will reach, and about what the sites reach together on the same cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        task = load_task(config.task.use, config.task.options())
        model = build_model(task, config.run.seed)
        layout = build_layout([TensorSpec(n, tuple(p.shape)) for n, p in model.named_parameters()], 1, "balanced")
        trainer = Ensemble(Trainer(task, model, layout, config, torch.device("cpu")))
        stream = task.train_batches(Shard(0, 1), sites * config.inner.batch_size)
        _, tokens, _ = trainer.step(stream, config.inner.lr)
        return tokens / trainer.calibrate(stream, CALIBRATION_STEPS, CALIBRATION_SECONDS)
    finally:
        torch.set_num_threads(before)


def anchors_identical(coordinator: Path, sites: list[Path]) -> bool:
    """Whether every site's anchors, as its last local checkpoint holds them, have the digest that the coordinator's
    journal has for the same version, and where that is the last one, its very bits."""
    store = StateDir(coordinator, read_only=True)
    try:
        held = [checkpoint.load_newest(site, store.run_id, store.run_id) for site in sites]
        with stored_run([coordinator]) as stored:
            return all(
                saved is not None and _is_published(store, p, state, saved)
                for p, state in enumerate(stored.states)
                for saved in held
            )
    finally:
        store.close()


def _is_published(store: StateDir, p: int, state: OuterState, saved: tuple[dict[str, Any], dict[str, Any]]) -> bool:
    """Whether a site's anchor of fragment `p` is a version that was published."""
    tensors, manifest = saved
    version: int = manifest["anchors"][p][0]
    anchor, round_ = tensors[f"anchor.{p}"].numpy(), store.journal.round(p, version)
    published = round_.published_digest if round_ is not None else None
    if version == 0:
        published = store.initial_digest(p)
    if digest_flat(anchor, state.fragment.chunks()) != published:
        return False
    return version != state.version or bool(np.array_equal(anchor.view(np.uint32), state.published.view(np.uint32)))
