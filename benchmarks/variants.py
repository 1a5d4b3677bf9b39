"""Which 4 and 8 bits: the search behind the choice of codecs, over real pseudo-gradients.

Four sites train a byte-level model on the plays as production does (virtual time, everything in fp32), and what one of
them contributes is recorded: Δ of H inner steps, an outer step, the next one. Every variant then encodes that sequence
chunk by chunk, with error feedback as production keeps it (x = Δ + βe, e ← x − x̂), and once more without. So all have
the same Δ, and none has an effect on the next: what a codec costs in *loss* is for `benchmarks.quality` to say.

Bits are for each parameter, scales included, headers not: `raw_bits`, `zstd_1_bits` and `zstd_3_bits` as sections of
production have them, `ideal_bits` behind an ideal entropy coder of order 0 (as ANS is) for scales and codes.

`error` is ‖x − x̂‖/‖x‖ of single encodings, root mean square over the sequence; `cosine` the mean one between x̂ and Δ;
`sum_error` is ‖Σx̂ − ΣΔ‖/‖ΣΔ‖ over all of it, which is what error feedback has not mended yet, and `sum_error_alone` the
same without feedback. `to_grids` are the bits after zstd at level 1 over those that production's int4 and int8 need on
the grid that has the same `error` (`sum_to_grids`: the same `sum_error`): below 1 the variant needs fewer. `pareto`
names the errors in which nothing else is as good in fewer bits.

    python -m benchmarks.variants [--quick] [--json FILE] [--plot FILE.png]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import quantisers
from benchmarks.machine import arguments, copy_bytes_per_second, report
from benchmarks.quality import LINK, NAMED, tables_of
from benchmarks.quantisers import (
    NF4,
    Encoded,
    Quantiser,
    clipped,
    even,
    fixed,
    largest,
    stochastic,
    toward_zero,
)
from lab.corpus import shakespeare
from lab.trained import TrainedRun
from lab.virtual import VirtualSite
from shared.codecs import DENSE, codec_named, grid, warm_up
from shared.codecs.kernels import F32, F64
from shared.compression import LEVELS, USUAL
from shared.config import TOPK_FEEDBACK, RunConfig, parse
from shared.fragments import CHUNK_ELEMENTS
from shared.wire import pack_section
from site_agent.core.site import Snapshot

RECIPE = "diloco-m4-short"
"""The setting of `benchmarks.quality` that is trained: four even sites, full quorum, fp32, the default outer step."""
BLOCKS = (32, 64, 128, 256, 512, 1024, 4096)
STEPS_4 = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
STEPS_8 = (0.03, 0.06, 0.125, 0.25)
GRIDS = "grid"
"""The kind of those variants that others are compared with."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is trained and recorded. `rounds` are outer steps, of which the first `skipped` are not recorded: a
    model's first steps are like no later ones."""

    width: int
    layers: int
    rounds: int
    skipped: int


QUICK, WHOLE = Size(64, 3, 20, 8), Size(192, 4, 40, 16)


@dataclass(frozen=True)
class Variant:
    """`kind` is what it varies, `decay` the β of its error feedback."""

    name: str
    kind: str
    quantise: Quantiser
    decay: float = 1.0


class _Recorded(TrainedRun):
    """Keeps every Δ of its first site. Its one fragment is the whole model."""

    def __init__(self, config: RunConfig, sites: Sequence[VirtualSite]) -> None:
        super().__init__(config, Path(), sites, evaluations=1)
        self.deltas: list[F32] = []

    def take(self, site: VirtualSite, action: Snapshot) -> Any:
        sent = super().take(site, action)
        if site is self.sites[0]:
            body = self._bodies[site.name]
            self.deltas.append(body.anchors[0].flat - body.trainer.trainer.snapshots[0].numpy())
        return sent


def pseudo_gradients(text: str, size: Size) -> list[F32]:
    """Consecutive Δ of one site, each fp32 (parameters,)."""
    setting = NAMED[RECIPE]
    tables = tables_of(setting, text, 1, 0)
    steps, batch, context = tables["inner"]["steps"], tables["inner"]["batch_size"], tables["task"]["context"]
    tokens = size.rounds * len(setting.steps) * steps * batch * context
    tables = tables_of(setting, text, tokens, 0)
    tables["task"] |= {"width": size.width, "layers": size.layers}
    tables["rounds"]["fragments"] = 1
    sites = [VirtualSite(f"site-{n}", each, LINK) for n, each in enumerate(setting.steps)]
    run = _Recorded(parse(RunConfig, tables, RECIPE), sites)
    run.run()
    return run.deltas[size.skipped : size.rounds]


def variants(first: F32) -> Iterator[Variant]:
    """All that are tried; codebooks are fitted to `first`."""
    for name in ("int8", "int4"):
        yield Variant(f"{name}, blocks of 64 (production)", GRIDS, quantisers.production(codec_named(name)))
    for name, steps in (("int8", STEPS_8), ("int4", STEPS_4)):
        for step in steps:
            yield Variant(f"{name}, step {step:g} σ (production)", GRIDS, quantisers.production(grid(name, step)))
    yield Variant("e3m0 (production)", "e3m0", quantisers.production(codec_named("e3m0")))
    for k in (64, 128, 256):
        codec = quantisers.production(codec_named(f"topk2-{k}"))
        yield Variant(f"topk2, k = {k} (production)", "topk2", codec, TOPK_FEEDBACK)
    for bits in (8, 4):
        for block in BLOCKS:
            if block != 64:
                yield Variant(f"int{bits}, blocks of {block}", "block size", even(bits, block))
    for block in (256, 1024, 4096):
        for step in (0.5, 1.0, 1.5):
            yield Variant(f"int4, blocks of {block}, step {step:g} σ", "block size", even(4, block, largest(step)))
    for name, step in (("int8", 0.0), ("int4", 0.0), ("int4", 0.5), ("int4", 1.0), ("int4", 1.5)):
        apart = quantisers.scales_apart(DENSE[name].with_step(step))
        yield Variant(f"{name}, step {step:g} σ, scales a frame of their own", "two frames", apart)
    for step in (0.03, 0.25, 0.4, 0.5, 1.0):
        yield Variant(f"int8, one step of {step:g} σ", "one step", even(8, CHUNK_ELEMENTS, largest(step)))
    for step in (0.75, 1.0, 1.5):
        # (A chunk's largest value is further out than seven such steps.)
        yield Variant(f"int4, one step of {step:g} σ, clipped", "one step", even(4, CHUNK_ELEMENTS, fixed(step)))
    for block in (64, 256, 4096):
        yield Variant(f"int4, blocks of {block}, clipped for least error", "clipped", even(4, block, clipped))
    for bits, block in ((8, 64), (8, 256), (4, 64), (4, 256), (4, 4096)):
        rounded = even(bits, block, rounding=stochastic)
        yield Variant(f"int{bits}, blocks of {block}, stochastic", "stochastic", rounded)
    for step in (0.5, 1.0, 1.5):
        rounded = even(4, 64, largest(step), stochastic)
        yield Variant(f"int4, step {step:g} σ, stochastic", "stochastic", rounded)
    for step in (0.0, 0.5, 1.0, 1.5):
        rounded = even(4, 64, largest(step), toward_zero)
        yield Variant(f"int4, step {step:g} σ, toward zero", "toward zero", rounded)
    yield from _codebooks(first)


def _codebooks(first: F32) -> Iterator[Variant]:
    nf4 = quantisers.middles(np.array(NF4, dtype=np.float32))
    for block in (64, 256):
        yield Variant(f"NF4, blocks of {block}", "codebook", quantisers.by_codebook(nf4, block, largest()))
    for count, block in ((16, 64), (16, 256), (8, 64), (8, 256)):
        book = quantisers.fitted(first, count, block, largest())
        yield Variant(f"Lloyd-Max, {count} levels, blocks of {block}", "codebook", book)
    for count, block in ((16, 64), (16, 256), (8, 64)):
        book = quantisers.fitted(first, count, block, fixed(1.0))
        yield Variant(f"Lloyd-Max, {count} levels by the rms of {block}", "codebook", book)
    for block in (64, 256):
        for price in (0.01, 0.03, 0.1):
            book = quantisers.fitted(first, 16, block, fixed(1.0), price)
            yield Variant(f"priced Lloyd-Max, {price:g}, by the rms of {block}", "codebook", book)


def measure(variant: Variant, deltas: Sequence[F32]) -> Row:
    """One row, without what compares it with others."""
    raw = ideal = lost = whole = 0.0
    packed = dict.fromkeys(LEVELS, 0.0)
    cosines = []
    random = np.random.default_rng(0)
    truth: F64 = np.sum(deltas, axis=0, dtype=np.float64)
    kept, total, alone = np.zeros_like(deltas[0]), np.zeros_like(truth), np.zeros_like(truth)
    for delta in deltas:
        x = delta + np.float32(variant.decay) * kept
        sections = _encode(variant, x, random)
        sent = np.concatenate([section.decoded for section in sections])
        kept, total = x - sent, total + sent
        lost, whole = lost + _squares(kept), whole + _squares(x)
        cosines.append(float(np.vdot(sent, delta)) / (_squares(sent) * _squares(delta)) ** 0.5)
        for section in sections:
            raw, ideal = raw + section.raw_bits, ideal + section.ideal_bits
            for level in LEVELS:
                squeezed = sum(len(pack_section(frame, level)) for frame in section.frames)
                packed[level] += min(section.raw_bits, 8 * squeezed)
        alone += np.concatenate([section.decoded for section in _encode(variant, delta, random)])
    elements = sum(delta.size for delta in deltas)
    return {
        "variant": variant.name,
        "kind": variant.kind,
        "raw_bits": raw / elements,
        **{_zstd(level): packed[level] / elements for level in LEVELS},
        "ideal_bits": ideal / elements,
        "error": (lost / whole) ** 0.5,
        "cosine": float(np.mean(cosines)),
        "sum_error": (_squares(total - truth) / _squares(truth)) ** 0.5,
        "sum_error_alone": (_squares(alone - truth) / _squares(truth)) ** 0.5,
    }


def _encode(variant: Variant, x: F32, random: np.random.Generator) -> list[Encoded]:
    """Chunk by chunk, as sections."""
    return [variant.quantise(x[at : at + CHUNK_ELEMENTS], random) for at in range(0, x.size, CHUNK_ELEMENTS)]


def _squares(x: F32 | F64) -> float:
    return float(np.vdot(x, x))


def _zstd(level: int) -> str:
    return f"zstd_{level}_bits"


BITS, ERROR, SUM_ERROR = _zstd(USUAL), "error", "sum_error"


def compare(rows: Sequence[Row]) -> list[Row]:
    """The rows with what each is beside the others."""
    grids = [row for row in rows if row["kind"] == GRIDS]
    singly, summed = frontier(rows, ERROR), frontier(rows, SUM_ERROR)
    compared = []
    for row in rows:
        best = [label for label, found in ((ERROR, singly), (SUM_ERROR, summed)) if row in found]
        beside = {"to_grids": _beside(row, grids, ERROR), "sum_to_grids": _beside(row, grids, SUM_ERROR)}
        compared.append({**row, **beside, "pareto": ", ".join(best)})
    return compared


def frontier(rows: Sequence[Row], error: str) -> list[Row]:
    """The rows that no other beats in bits without a larger error, from the fewest bits on."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row[BITS], row[error])):
        if not best or row[error] < best[-1][error]:
            best.append(row)
    return best


def _beside(row: Row, grids: Sequence[Row], error: str) -> float | None:
    """The row's bits over those of a grid with the same error: between two grids bits go by the logarithm of the error.
    None beyond the coarsest and the finest."""
    known = frontier(grids, error)[::-1]
    errors = [each[error] for each in known]
    if not errors[0] <= row[error] <= errors[-1]:
        return None
    bits = np.interp(np.log(row[error]), np.log(errors), [each[BITS] for each in known])
    return float(row[BITS] / bits)


def plot(rows: Sequence[Row], file: Path) -> None:
    """Bits beside those of grids over both errors, a colour for each kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(15, 7), sharey=True)
    for axis, error, beside in zip(axes, (ERROR, SUM_ERROR), ("to_grids", "sum_to_grids"), strict=True):
        shown = [row for row in rows if row[beside] is not None]
        for kind in dict.fromkeys(row["kind"] for row in shown):
            mine = [row for row in shown if row["kind"] == kind]
            axis.plot([row[error] for row in mine], [row[beside] for row in mine], "o", markersize=5, label=kind)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set(xlabel=error, xscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel(f"bits after zstd {USUAL}, of those of production's grids at the same error")
    axes[0].legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def main() -> None:
    """Trains, prints the table, and writes the JSON and the plot."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warm_up()
    copy = copy_bytes_per_second()
    text = str(shakespeare(Path(tempfile.gettempdir()) / "isthmus-corpus"))
    deltas = pseudo_gradients(text, QUICK if options.quick else WHOLE)
    rows = compare([measure(variant, deltas) for variant in variants(deltas[0])])
    title = f"{len(deltas)} pseudo-gradients of {deltas[0].size:,} parameters"
    report(title, copy, rows, options.json)
    if options.plot is not None:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
