"""How fast a contribution is encoded where its weights are: on the first accelerator, else on the CPU.

One fragment of `params` normal values in chunks, from the pseudo-gradient on the device to raw sections on the host,
with error feedback. Two ways: `site_agent.training.encoders` on the device, and what it stands in for: fp32 to the
host, the numba codecs on all cores, and what was lost back again (on the CPU nothing is copied, and only this way is
in use). Bytes per second are of fp32; medians.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import arguments, copy_bytes_per_second, report
from shared.codecs import Codec, codec_named, grid, warm_up
from shared.fragments import CHUNK_ELEMENTS, Chunk
from site_agent.training import encoders
from site_agent.training.devices import choose_device, describe

CODECS: list[tuple[str, Codec]] = [
    *((name, codec_named(name)) for name in ("fp32", "bf16", "fp16", "int8", "int4", "e3m0", "topk2-128")),
    ("int4, step 1 σ", grid("int4", 1.0)),
]


def measure(label: str, codec: Codec, values: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Both ways' rows."""
    chunks = [Chunk(at, min(at + CHUNK_ELEMENTS, len(values))) for at in range(0, len(values), CHUNK_ELEMENTS)]
    x, device = values.clone(), values.device
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:

        def by_host() -> None:
            host = x.cpu()
            parts = [host.numpy()[chunk.start : chunk.stop] for chunk in chunks]
            list(pool.map(lambda part: codec.encode(part, part, -1.0), parts))
            x.copy_(host)

        encode = encoders.encoder(codec, device) or encoders.torch_operations(codec)
        ways: dict[str, Callable[[], object]] = {
            "on the device": lambda: encode(codec, x, chunks),
            "numba on the host": by_host,
        }
        return [
            {
                "setting": f"{describe(device)}, {way}",
                "upload": label,
                "params": len(values),
                "seconds": (seconds := _median(work, lambda: x.copy_(values), device, repeats)),
                "encode_bytes_per_second": 4 * len(values) / seconds,
            }
            for way, work in ways.items()
        ]


def _median(work: Callable[[], object], before: Callable[[], object], device: torch.device, repeats: int) -> float:
    def settle() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    times = []
    for _ in range(repeats + 1):
        before()
        settle()
        began = time.perf_counter()
        work()
        settle()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main() -> None:
    """Prints the table, and with --json writes the rows."""
    options = arguments(__doc__ or "").parse_args()
    parameters, repeats = (16 << 20, 7) if options.quick else (64 << 20, 15)
    warm_up()
    device = choose_device("")
    values = torch.randn(parameters, generator=torch.Generator().manual_seed(0)).to(device)
    copy = copy_bytes_per_second()
    rows = [row for label, codec in CODECS for row in measure(label, codec, values, repeats)]
    report(f"encoding on {describe(device)}, medians of {repeats}", copy, rows, options.json)


if __name__ == "__main__":
    main()
