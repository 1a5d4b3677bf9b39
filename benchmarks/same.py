"""Whether several processes of a site come to what one comes to: the second half of `benchmarks.mixed`.

*Gradients* of two groups on one global batch against one process's. They are sums in another order, so they differ by
rounding; how much that is, the gradient in fp64 says: they may be no further from one process's than that one is from
it. *Contributions* of two processes that share the model (FSDP2) against those of one process that takes the batch in
as many passes as they: after real steps, with error feedback, they must be the same bytes. (One pass over the whole
batch is another order of sums, as it is on one device.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.ranks import Ranks
from shared.config import UploadCodec

ROUNDING = 2.0**-24
"""Of fp32: the most by which one operation's result is off, relative to itself."""
BATCHES, STEPS = 3, 2
CODECS: tuple[str, ...] = get_args(UploadCodec)
Tables = Mapping[str, Mapping[str, Any]]


def gradients(directory: Path, text: Path, tables: Tables, shares: Sequence[int]) -> list[dict[str, Any]]:
    """A row: the gradients of groups with these shares of the batch."""
    run = _with(tables, inner={"clip_norm": 0.0})  # the fp64 gradient has been clipped by nobody
    two_devices = {"device": ["cpu", "cpu"], "group": ["fast", "slow"]}
    files = {name: directory / f"{name}.safetensors" for name in ("one", "two", "exact")}
    with ExitStack() as stack:
        one = stack.enter_context(Ranks(directory / "one", {"device": ["cpu"]}, text))
        two = stack.enter_context(Ranks(directory / "two", two_devices, text))
        for ranks, name, dealt in ((one, "one", []), (two, "two", list(shares))):
            ranks.tell("prepare", run=run)
            ranks.tell("gradients", batches=BATCHES, file=str(files[name]), shares=dealt)
        for ranks in (two, one):
            ranks.answer()
            ranks.answer()
        parameters = one.ask("prepare", run=run)["params"]
        one.ask("exact", batches=BATCHES, file=str(files["exact"]))
    found = {name: load_file(file) for name, file in files.items()}
    difference, bound = distance(found["two"], found["one"]), distance(found["one"], found["exact"])
    dealt_as = " + ".join(map(str, shares))
    return [compared(f"gradients of two groups, {dealt_as} sequences, in units of 2⁻²⁴", parameters, difference, bound)]


def distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference of two sets of tensors, in units of fp32's rounding of each tensor's largest element.
    Infinite where they are not of the same names, or hold what is not finite."""
    if ours.keys() != theirs.keys():
        return float("inf")
    worst = 0.0
    for name, other in theirs.items():
        mine, largest = ours[name].double(), float(other.abs().max())
        off = float((mine - other.double()).abs().max())
        if not off < float("inf"):
            return float("inf")
        worst = max(worst, off / max(largest, 1e-30) / ROUNDING)
    return worst


def compared(what: str, parameters: int, difference: float, bound: float) -> dict[str, Any]:
    """A row; where the bound is 0 it is bytes that are compared, and the difference counts those that differ."""
    return {
        "setting": what,
        "params": parameters,
        "difference": difference,
        "bound": bound,
        "equal": "yes" if difference <= bound else "no",
    }


def contributions(directory: Path, text: Path, tables: Tables) -> list[dict[str, Any]]:
    """A row for each codec: how many of the contributions of two processes are other bytes than one's."""
    half = tables["inner"]["batch_size"] // 2
    rows = []
    with ExitStack() as stack:
        one = stack.enter_context(Ranks(directory / "whole", {"device": ["cpu"], "micro_batch": half}, text))
        shards = {"device": ["cpu", "cpu"], "parallel": "fsdp"}
        two = stack.enter_context(Ranks(directory / "shards", shards, text))
        for codec in CODECS:
            run = upload_run(tables, codec)
            for ranks in (one, two):
                ranks.tell("prepare", run=run)
                ranks.tell("contributions", steps=STEPS)
            parameters, _ = one.answer()["params"], two.answer()
            ours, theirs = one.answer()["digests"], two.answer()["digests"]
            differ = sum(a != b for a, b in zip(ours, theirs, strict=True))
            rows.append(
                compared(f"{len(ours)} contributions of FSDP2 over two processes, {codec}", parameters, differ, 0)
            )
    return rows


def upload_run(tables: Tables, codec: str) -> dict[str, dict[str, Any]]:
    """The run with contributions in this codec."""
    outer = {"optimizer": "sgd", "lr": 1.0} if codec == "topk2" else {}
    return _with(tables, wire={"upload": codec}, outer=outer)


def _with(tables: Tables, **more: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tables with these keys in place of theirs."""
    names = {**tables, **more}
    return {name: {**tables.get(name, {}), **more.get(name, {})} for name in names}
