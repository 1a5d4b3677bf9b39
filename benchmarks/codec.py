"""How fast every codec encodes and decodes, how many bytes it needs, and what it loses.

Each codec sees one fragment of `params` elements in chunks, on all cores, by what production calls: encoding with error
feedback (what is lost is left in place of what was encoded), and decoding into a weighted sum. The values are normal
ones, and (with `--text`, or where the corpus can be had) a real pseudo-gradient: what H inner steps of a byte-level
model changed. Bytes per second are of fp32 on the decoded side; `bound_fraction` is what must cross the memory bus over
the copy bandwidth, over the seconds of decoding: the section read once, the sum read and written once.

`mse` is the mean squared error relative to the mean square (so of N(0,1) it is the plain one), once, without feedback.
`bytes_up_per_param` is after zstd at level 1, `raw_bytes_per_param` before.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import arguments, copy_bytes_per_second, report
from lab.corpus import shakespeare
from shared.codecs import Codec, codec_named, grid, warm_up
from shared.codecs.kernels import F32
from shared.config import InnerTable
from shared.fragments import Chunk, Fragment, TensorSpec
from shared.parallel import over_chunks
from shared.task import Shard, build_model, load_task
from shared.wire import encode_sections, pack_sections
from site_agent.training.optimizers import build_optimizer

CODECS: list[tuple[str, Codec]] = [
    *((name, codec_named(name)) for name in ("fp32", "bf16", "fp16", "int8", "int4", "e3m0")),
    *((f"int4, step {step:g} σ", grid("int4", step)) for step in (0.5, 1.0, 1.5)),
    *((f"topk2, k = {k}", codec_named(f"topk2-{k}")) for k in (64, 128, 256)),
]
ZSTD_LEVEL = 1
STEPS = 16


def measure(label: str, codec: Codec, values: F32, setting: str, copy: float, repeats: int) -> dict[str, Any]:
    """One row: medians over `repeats` passes over `values`."""
    fragment = Fragment(0, (TensorSpec("values", values.shape),))
    chunks = fragment.chunks()
    sections = encode_sections(codec, fragment.chunks(), values)
    packed = pack_sections(fragment, sections, ZSTD_LEVEL)
    summed, left = np.zeros_like(values), values.copy()

    def accumulate(section: int, chunk: Chunk) -> None:
        codec.accumulate(sections[section], 0.25, summed[chunk.start : chunk.stop])

    encoding = _median(
        lambda: encode_sections(codec, fragment.chunks(), left, left), repeats, lambda: np.copyto(left, values)
    )
    decoding = _median(lambda: over_chunks(chunks, accumulate), repeats)
    squeezing = _median(lambda: pack_sections(fragment, sections, ZSTD_LEVEL), repeats)
    raw = sum(section.size for section in sections)
    lost = 0.0
    for section, chunk in zip(sections, chunks, strict=True):
        decoded = codec.decode(section, chunk.size).astype(np.float64)
        lost += float(np.sum((decoded - values[chunk.start : chunk.stop]) ** 2))
    return {
        "setting": setting,
        "upload": label,
        "params": values.size,
        "encode_bytes_per_second": 4 * values.size / encoding,
        "decode_bytes_per_second": 4 * values.size / decoding,
        "zstd_bytes_per_second": raw / squeezing,
        "seconds": decoding,
        "bytes_moved": raw + 8 * values.size,
        "bound_fraction": (raw + 8 * values.size) / copy / decoding,
        "raw_bytes_per_param": raw / values.size,
        "bytes_up_per_param": min(raw, sum(map(len, packed))) / values.size,
        "mse": lost / float(np.sum(values.astype(np.float64) ** 2)),
    }


def _median(work: Callable[[], object], repeats: int, before: Callable[[], None] = lambda: None) -> float:
    times = []
    for _ in range(repeats):
        before()
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def pseudo_gradient(text: Path, parameters: int) -> F32:
    """What STEPS inner steps of a byte-level model on `text` changed, well after its start; repeated to `parameters`
    elements, so that every codec has enough to do."""
    options = {"paths": str(text), "context": 64, "width": 192, "layers": 4, "heads": 4}
    task, inner = load_task("byte-lm", options, Path()), InnerTable(lr=3e-3, batch_size=8)
    model = build_model(task, 0)
    optimizer, stream = build_optimizer(inner, model), task.train_batches(Shard(0, 4, 0), inner.batch_size)

    def train(steps: int) -> list[torch.Tensor]:
        for _ in range(steps):
            loss, _ = task.loss(model, next(stream))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), inner.clip_norm)
            optimizer.step()
        return [parameter.detach().clone().reshape(-1) for parameter in model.parameters()]

    before, after = train(8 * STEPS), train(STEPS)
    delta = torch.cat([a - b for a, b in zip(before, after, strict=True)]).numpy()
    return np.resize(delta, parameters)


def _inputs(parameters: int) -> Sequence[tuple[str, F32]]:
    normal = np.random.default_rng(0).standard_normal(parameters, dtype=np.float32)
    with tempfile.TemporaryDirectory() as directory:
        return [("normal", normal), ("pseudo-gradient", pseudo_gradient(shakespeare(Path(directory)), parameters))]


def main() -> None:
    """Prints the tables, and with --json writes the rows."""
    options = arguments(__doc__ or "").parse_args()
    parameters, repeats = (16 << 20, 7) if options.quick else (64 << 20, 15)
    warm_up()
    inputs = _inputs(parameters)
    copy = copy_bytes_per_second()
    rows = [
        measure(label, codec, values, setting, copy, repeats) for setting, values in inputs for label, codec in CODECS
    ]
    report(f"every codec, medians of {repeats}", copy, rows, options.json)


if __name__ == "__main__":
    main()
