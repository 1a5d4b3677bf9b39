"""What a site costs beside a plain training loop where both have an accelerator: speed, encoding, memory.

    python -m benchmarks.gpu [--quick | --self-check] [--sites N ...] [--seconds S] [--batch-size B] [--steps H]
                             [--device D] [--json FILE] [--markdown FILE]

One device, one model of more than 100 M parameters (byte-lm; bf16 where the device has it), trained in turn by N
processes that run a plain loop (benchmarks.plain_loop), by N sites of one real run with the defaults of run.toml
(`isthmus site run`, their coordinator beside them), and by the N loops again. Processes that share a device cost each
other time whatever they do, so `efficiency` is N sites against N loops; one loop alone is measured too. Of the loops it
is the median over windows, and of before and after the faster one; of the sites all the time from the end of the first
cycle until the first fragment is complete, with every contribution, alignment and checkpoint in it. What sites have
trained is what their own metrics say, once a second.

Then each codec's encoding time on the device, beside a copy of its memory (benchmarks.encode_device has the two ways).
`peak_bytes` is what tensors of a process took at most, `needed_bytes` what site_agent.core.memory says is the least.

`--self-check` is the same with a tiny model on the CPU, for machines without an accelerator: it ends with code 0 only
if all figures are there, the run has finished, every site ends with the coordinator's bits and the loss has fallen. Its
speeds mean nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import encode_device
from benchmarks.gpu_report import page, problems, verdict
from benchmarks.gpu_runs import Setup, loops, train_sites
from benchmarks.machine import arguments, copy_bytes_per_second, machine, report
from benchmarks.plain_loop import synchronize
from shared.codecs import warm_up
from shared.errors import ConfigError
from shared.program import command
from site_agent.training.devices import choose_device

ROOT = Path(__file__).resolve().parents[1]
LINES = 200_000
COPY_BYTES, COPIES, REPEATS = 1 << 30, 8, 7
# H = 100 as in Streaming DiLoCo (2501.18512). On one device a step is short, so even so a site contributes every few
# seconds: much more often than one between datacenters would.
FULL = Setup(
    device="",
    task={"context": 1024, "width": 1024, "layers": 10, "heads": 16},
    batch_size=16,
    lr=3e-4,
    steps=100,
    seconds=120.0,
    sites=(1, 2, 4),
    values=64 << 20,
    repeats=15,
)
QUICK = replace(FULL, seconds=25.0, sites=(2,), values=16 << 20, repeats=7)
SELF_CHECK = Setup(
    device="cpu",
    task={"context": 64, "width": 128, "layers": 5, "heads": 4},
    batch_size=4,
    lr=3e-3,
    steps=8,
    seconds=6.0,
    sites=(2,),
    values=1 << 20,
    repeats=3,
)


def measure(setup: Setup, text: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what the processes say of the device, all rows of training)."""
    about, alone = loops(setup, text, 1)
    rows = [alone]
    for count in setup.sites:
        before = alone
        if count > 1:
            _, before = loops(setup, text, count)
            rows.append(before)
        trained = train_sites(setup, text, count, before["tokens_per_second"])
        _, after = loops(setup, text, count)
        plain = max(before["median_tokens_per_second"], after["median_tokens_per_second"])
        of_loops = {
            "loop_tokens_per_second": plain,
            "efficiency": trained["tokens_per_second"] / plain,
            "alone_efficiency": trained["tokens_per_second"] / alone["median_tokens_per_second"],
            "loop_peak_bytes": before["peak_bytes"],
        }
        rows += [trained | of_loops, after | {"setting": f"{after['setting']}, again"}]
    return about, rows


# -- encoding


def encoding(setup: Setup, device: torch.device) -> list[dict[str, Any]]:
    """Each codec's rows, both ways."""
    warm_up()
    values = torch.randn(setup.values, generator=torch.Generator().manual_seed(0)).to(device)
    return [
        {"kind": "encoding", **row, "seconds_per_gigabyte": 1e9 / row["encode_bytes_per_second"]}
        for label, codec in encode_device.CODECS
        for row in encode_device.measure(label, codec, values, setup.repeats)
    ]


def device_copy(device: torch.device) -> float:
    """Bytes read plus bytes written per second by copies within the device's memory; median of several."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(REPEATS + 1):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(COPIES):
            target.copy_(source)
        synchronize(device)
        times.append((time.perf_counter() - began) / COPIES)
    return 2 * COPY_BYTES / statistics.median(times[1:])


# -- all of it


def setup_of(options: Any) -> Setup:
    """Raises ConfigError without an accelerator, unless the check is asked for."""
    setup = SELF_CHECK if options.self_check else QUICK if options.quick else FULL
    if not options.self_check:
        device = choose_device(options.device)
        if device.type == "cpu":
            raise ConfigError("there is no accelerator here; --self-check tries all of this on the CPU, for no speed")
        setup = replace(setup, device=str(device))
    if options.sites and min(options.sites) < 1:
        raise ConfigError("--sites: at least 1; give one or several numbers")
    given = {
        "sites": tuple(dict.fromkeys(options.sites or ())),
        "seconds": options.seconds,
        "batch_size": options.batch_size,
        "steps": options.steps,
    }
    return replace(setup, **{name: value for name, value in given.items() if value})


def run(setup: Setup) -> dict[str, Any]:
    """All of it: the JSON document."""
    with tempfile.TemporaryDirectory(prefix="isthmus-text-") as directory:
        text = Path(directory) / "text.txt"
        text.write_text(
            "".join(f"line {n} of a text that can be learnt from, {n * n} times.\n" for n in range(LINES)),
            encoding="utf-8",
        )
        about, rows = measure(setup, str(text))
    # Only now: while others were measured, this process had nothing on the device.
    device, copy = torch.device(setup.device), copy_bytes_per_second()
    of_device = {
        "device": about["device"],
        "device_type": device.type,
        "device_memory_bytes": about["memory_bytes"],
        "device_copy_bytes_per_second": copy if device.type == "cpu" else device_copy(device),
        "precision": about["precision"],
    }
    return {"machine": machine(copy) | of_device, "rows": rows + encoding(setup, device)}


@command
def main() -> None:
    """Prints the tables, and writes what is asked for; ends with code 1 where something was amiss."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--self-check", action="store_true", help="a tiny model on the CPU: all of it, for no speed")
    parser.add_argument("--sites", type=int, nargs="+", metavar="N", help="how many sites, one run each")
    parser.add_argument("--seconds", type=float, help="of each measurement")
    parser.add_argument("--batch-size", type=int, help="sequences of an inner step, where memory is short")
    parser.add_argument("--steps", type=int, metavar="H", help="inner steps of a cycle")
    parser.add_argument("--device", default="", help="as in [devices] device; absent: the first accelerator")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page to FILE")
    options = parser.parse_args()
    # Children run elsewhere, and are to find these packages.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    document = run(setup_of(options))
    copy, rows = document["machine"]["copy_bytes_per_second"], document["rows"]
    for kind in ("loops", "sites", "encoding"):
        report(f"{kind} on {document['machine']['device']}", copy, [r for r in rows if r["kind"] == kind], None)
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.markdown is not None:
        options.markdown.write_text(page(document), encoding="utf-8")
    if document["machine"]["device_type"] != "cpu":
        print(verdict(rows))
    amiss = problems(document)
    for problem in amiss:
        print(f"amiss: {problem}")
    print("all checks hold" if not amiss else f"{len(amiss)} of the checks do not hold")
    raise SystemExit(1 if amiss else 0)


if __name__ == "__main__":
    main()
