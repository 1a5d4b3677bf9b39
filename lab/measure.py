"""Small measurements that the demo stands on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from coordinator.export import read_states
from coordinator.store.state_dir import StateDir
from shared.config import RunConfig
from shared.fragments import TensorSpec, build_layout, digest_flat
from shared.task import Shard, build_model, load_task
from site_agent import checkpoint
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
        trainer = Trainer(task, model, layout, config.inner, torch.device("cpu"))
        stream = task.train_batches(Shard(0, 1), sites * config.inner.batch_size)
        _, tokens, _ = trainer.step(stream, config.inner.lr)
        return tokens / trainer.calibrate(stream, CALIBRATION_STEPS, CALIBRATION_SECONDS)
    finally:
        torch.set_num_threads(before)


def anchors_identical(coordinator: Path, sites: list[Path]) -> bool:
    """Whether every site's anchors, as its last local checkpoint holds them, have the digest that the coordinator's
    journal has for the same version, and where that is the last one, its very bits."""
    stored = read_states(coordinator)
    store = StateDir(coordinator, read_only=True)
    try:
        for site in sites:
            saved = checkpoint.load_newest(site, stored.run_id, stored.run_id)
            if saved is None:
                return False
            tensors, manifest = saved
            for p, (state, (version, *_)) in enumerate(zip(stored.states, manifest["anchors"], strict=True)):
                anchor, round_ = tensors[f"anchor.{p}"].numpy(), store.journal.round(p, version)
                published = round_.published_digest if round_ is not None else None
                if version == 0:
                    published = store.initial_digest(p)
                if digest_flat(anchor, state.fragment.chunks()) != published:
                    return False
                newest = state.published.view(np.uint32)
                if version == state.version and not np.array_equal(anchor.view(np.uint32), newest):
                    return False
    finally:
        store.close()
    return True
