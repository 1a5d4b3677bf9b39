"""What `benchmarks.memory` measures, each function in a process of its own whose peak memory is then its own.

Apart from it because nothing here may import torch where the coordinator does not: a daemon that recovers a run lives
without, and its memory is what is measured.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.apart import status_bytes
from coordinator.outer.merge import Weighted
from coordinator.outer.optimizers import SLOTS, Optimizer, OuterRule
from coordinator.outer.step import OuterState, outer_step, warm_up
from coordinator.service import Coordinator
from coordinator.store.checkpoint import Checkpoints
from coordinator.store.files import Blobs, file_digest
from coordinator.store.resting import is_mapped, map_states, state_bytes
from shared.codecs import codec_named
from shared.config import RunConfig, load_run, parse
from shared.container_files import write_flat
from shared.files import Disk
from shared.fragments import CHUNK_ELEMENTS, Fragment, Layout, TensorSpec, digest_flat
from shared.memory import memory_bytes
from shared.protocol import PROTOCOL, Heartbeat, Join, OpenUpload
from shared.wire import Header, open_container, pack_head, tensor_table

UPLOAD, PUBLISH = "int4", "int8"
OPTIMIZER: Optimizer = "nesterov"
STILL = Path(__file__).with_name("still.py")
PIECE_BYTES = 1 << 20
SAMPLE_SECONDS = 0.005


class Watch:
    """The memory of this process from now on. The kernel keeps the peak of all that is resident; of that part of it
    which is no file's, and which nothing but swap could take away, samples have to do."""

    def __init__(self) -> None:
        warm_up()
        self._baseline, self._anonymous, self._over = status_bytes("VmRSS"), 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        self._began = time.perf_counter()

    def row(self, fragments: Layout, computed: int, **facts: Any) -> dict[str, Any]:
        """A row of the benchmark. `computed` is what should be resident besides what a process has that has no run."""
        seconds = time.perf_counter() - self._began
        self._over.set()
        self._thread.join()
        return {
            "params": fragments.parameters,
            "fragments": len(fragments.fragments),
            **facts,
            "seconds": seconds,
            "computed_bytes": computed + self._baseline,
            "peak_rss_bytes": status_bytes("VmHWM"),
            "peak_anonymous_bytes": self._anonymous,
            "rss_at_rest_bytes": status_bytes("VmRSS"),
            "baseline_rss_bytes": self._baseline,
        }

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self._anonymous = max(self._anonymous, status_bytes("RssAnon"))


def open_bytes(
    fragment: Fragment, optimizer: Optimizer = OPTIMIZER, publish: str = PUBLISH, *, packed: bool = False
) -> int:
    """What a fragment in work takes: its state, and its delta until that is on disk; with zstd (`packed`) once more,
    for it is packed beside itself and may not get smaller."""
    delta = sum(codec_named(publish).size(chunk.size) for chunk in fragment.chunks())
    return state_bytes(fragment, SLOTS[optimizer]) + delta * (2 if packed else 1)


def resident_bytes(layout: Layout, optimizer: Optimizer, publish: str, *, packed: bool, mapped: bool) -> int:
    """What a coordinator takes besides what a process has that has no run: its largest fragment in work, and the states
    of the others where they do not rest in files."""
    largest = max(layout.fragments, key=lambda fragment: fragment.size)
    others = [fragment for fragment in layout.fragments if fragment is not largest]
    at_rest = 0 if mapped else sum(state_bytes(fragment, SLOTS[optimizer]) for fragment in others)
    return open_bytes(largest, optimizer, publish, packed=packed) + at_rest


# -- a run, scaled down


def run_config(layers: int, side: int, fragments: int, sites: int, resting: str) -> RunConfig:
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "memory", "tokens": 10**9, "min_sites": sites},
        "task": {"use": f"{STILL}:Still", "layers": layers, "side": side},
        "outer": {"optimizer": OPTIMIZER},
        "rounds": {"fragments": fragments, "quorum": "all", "pacing": "equal-steps"},
        "wire": {"upload": UPLOAD, "publish": PUBLISH, "zstd_level": 0},
        "store": {"resting": resting, "checkpoint_versions": 2, "keep_checkpoints": 1},
    }
    return parse(RunConfig, tables, "run.toml")


def started(directory: str, layers: int, side: int, fragments: int, sites: int) -> dict[str, Any]:
    """A new run: the model is built, cut up, written and read again."""
    import torch  # noqa: F401 (here the coordinator does need it, and it belongs to what a process has)

    watch = Watch()

    async def start() -> Layout:
        coordinator = await Coordinator.open(
            run_config(layers, side, fragments, sites, "mapped"), Path(directory), Path(directory)
        )
        await coordinator.stop()
        return coordinator.layout

    layout = asyncio.run(start())
    computed = 4 * layout.parameters + 4 * max(fragment.size for fragment in layout.fragments)
    return watch.row(layout, computed, setting="start", contributions=0, rounds=0)


def rounds(
    directory: str, layers: int, side: int, fragments: int, contributions: list[str], resting: str, count: int
) -> dict[str, Any]:
    """The run recovered, `count` rounds of all its fragments, checkpoints, and a snapshot of each."""
    watch = Watch()
    config = run_config(layers, side, fragments, len(contributions), resting)

    async def go_on() -> Layout:
        coordinator = await Coordinator.open(config, Path(directory), Path(directory))
        await coordinator.start()
        sites = [f"site-{n}" for n in range(len(contributions))]
        sessions = [(await coordinator.join(s, Join(protocol=PROTOCOL, site=s, software={}))).session for s in sites]
        for _ in range(2):
            for site, session in zip(sites, sessions, strict=True):
                await coordinator.heartbeat(site, _ready(coordinator, session))
        for _ in range(count):
            # Fragment after fragment without waiting for what becomes of it: rounds close while others are merged.
            versions = [newest.version for newest in coordinator.publication.newest]
            for p, version in enumerate(versions):
                for site, session, sections in zip(sites, sessions, contributions, strict=True):
                    await _contribute(coordinator, site, session, p, version, Path(sections), Path(directory))
            for p, version in enumerate(versions):
                await coordinator.publication.delta(p, version + 1, wait=600)
        while coordinator._merges:
            await asyncio.wait(coordinator._merges)
        for p, newest in enumerate(coordinator.publication.newest):
            await coordinator.publication.snapshot(p, newest.version)
        await coordinator.stop()
        return coordinator.layout

    layout = asyncio.run(go_on())
    return watch.row(
        layout,
        resident_bytes(layout, OPTIMIZER, PUBLISH, packed=False, mapped=resting == "mapped"),
        setting=resting,
        contributions=len(contributions),
        rounds=count,
    )


def _ready(coordinator: Coordinator, session: str) -> Heartbeat:
    return Heartbeat(
        run=coordinator.run_id,
        session=session,
        state="training" if coordinator.core.started else "ready",
        steps=0,
        tokens=0,
        step_seconds=0.1,
        overlap_seconds=0.0,
        sync_seconds=0.0,
        training_share=1.0,
        download_rate=None,
        loss=None,
        evaluation=None,
        repairs=0,
        evaluates=False,
        data=None,
    )


async def _contribute(
    coordinator: Coordinator, site: str, session: str, p: int, base: int, sections: Path, directory: Path
) -> None:
    """A contribution as it would come in, in parts; its sections are the same ones every time."""
    spool = directory.with_name(f"{site}.isthmus")
    digest = str(coordinator.publication.digest(p, base))
    header = _header(coordinator.layout.fragments[p], site, coordinator.run_id, base, digest)
    write_contribution(spool, header, sections)
    size = spool.stat().st_size
    opening = OpenUpload(
        run=coordinator.run_id,
        site=site,
        session=session,
        fragment=p,
        base_version=base,
        codec=UPLOAD,
        size=size,
        digest=file_digest(spool),
        part_size=4 << 20,
        body=None,
    )
    upload = await coordinator.intake.open(site, opening)
    for part in range(-(-size // upload.part_size)):
        at = part * upload.part_size
        await coordinator.intake.put_part(site, upload.id, part, _pieces(spool, at, min(size, at + upload.part_size)))
    await coordinator.intake.commit(site, upload.id)


async def _pieces(path: Path, start: int, stop: int) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < stop and (piece := file.read(min(64 << 10, stop - start))):
            start += len(piece)
            yield piece


# -- ten billion parameters


class SparseDisk(Disk):
    """For the show only: files whose room is not taken, so that 120 GB of states at rest fit any disk."""

    def allocate(self, path: Path, size: int) -> None:
        with path.open("wb") as file:
            file.truncate(size)


def layout_of(layers: int, side: int, fragments: int) -> Layout:
    """`layers` square matrices in each fragment."""
    return Layout(
        tuple(
            Fragment(p, tuple(TensorSpec(f"layer_{p:04d}_{n:04d}", (side, side)) for n in range(layers)))
            for p in range(fragments)
        )
    )


def stepped(directory: str, layers: int, side: int, fragments: int, contributions: list[str]) -> dict[str, Any]:
    """All fragments at rest over sparse files, and one of them in work: a step on real contributions, its delta, its
    checkpoint, a snapshot, and the checkpoint read again."""
    watch, place, layout = Watch(), Path(directory), layout_of(layers, side, fragments)
    homes = map_states(place / "states", layout.fragments, SLOTS[OPTIMIZER], SparseDisk())
    states = [
        OuterState(
            fragment,
            homes[fragment.index].empty("master", fragment.size),
            homes[fragment.index].empty("published", fragment.size),
            {name: homes[fragment.index].zeros(name, fragment.size) for name in SLOTS[OPTIMIZER]},
            vectors=homes[fragment.index],
        )
        for fragment in layout.fragments
    ]
    state, fragment = states[0], layout.fragments[0]
    rule, blobs = OuterRule(OPTIMIZER, 0.7, 0.9, PUBLISH, 0), Blobs(place / "blobs")
    blobs.directory.mkdir()
    began = time.perf_counter()
    with ExitStack() as stack, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        opened = [stack.enter_context(open_container(Path(path), fragment)) for path in contributions]
        weighted = [Weighted(container, 1 / len(opened), container.screen() ** 0.5) for container in opened]
        screened = time.perf_counter()
        done = outer_step(state, weighted, rule, "memory", 0, pool)
    merged = time.perf_counter()
    blobs.put(*done.delta)
    del done
    state.vectors.rest()
    checkpoints = Checkpoints(place / "checkpoints", "memory", keep=1)
    checkpoints.save(state)
    state.vectors.rest()
    saved = time.perf_counter()
    header = _header(fragment, "", "memory", 1, state.digest).model_copy(update={"kind": "snapshot", "codec": "fp32"})
    write_flat(place / "snapshot", header, fragment, state.published, 0)
    state.vectors.rest()
    loading = time.perf_counter()
    again = checkpoints.load(checkpoints.entries(0)[0], fragment, homes[0])
    again.vectors.rest()
    if again.digest != digest_flat(state.published, fragment.chunks()):
        raise AssertionError("the checkpoint is not what was stepped")
    again.vectors.rest()
    return watch.row(
        layout,
        open_bytes(fragment),
        setting="sparse",
        contributions=len(contributions),
        rounds=1,
        screen_seconds=screened - began,
        step_seconds=merged - screened,
        checkpoint_seconds=saved - merged,
        load_seconds=time.perf_counter() - loading,
    )


# -- contributions


def made(directory: str, layers: int, side: int, sites: int, whole: bool) -> list[str]:
    """Sections of the contributions of so many sites to a fragment of `layers` matrices, one file each; with `whole`
    a container of fragment 0 of `layout_of` each."""
    fragment, files = layout_of(layers, side, 1).fragments[0], []
    codec = codec_named(UPLOAD)
    for site in range(sites):
        random, path = np.random.default_rng(site), Path(directory) / f"sections-{layers}-{side}-{site}"
        with path.open("wb") as file:
            for chunk in fragment.chunks():
                delta = np.float32(1e-3) * random.standard_normal(chunk.size, dtype=np.float32)
                file.write(codec.encode(delta).tobytes())
        if whole:
            container = path.with_suffix(".isthmus")
            write_contribution(container, _header(fragment, f"site-{site}", "memory", 0, "0" * 32), path)
            path.unlink()
            path = container
        files.append(str(path))
    return files


def write_contribution(path: Path, header: Header, sections: Path) -> None:
    """The header, and behind it the sections, which all of the header's fragments have in common."""
    shapes = [TensorSpec(name, tuple(shape)) for name, shape in header.tensors]
    chunks = Fragment(header.fragment, tuple(shapes)).chunks()
    sizes = [codec_named(header.codec).size(chunk.size) for chunk in chunks]
    with path.open("wb") as out, sections.open("rb") as file:
        out.write(pack_head(header, sizes))
        while piece := file.read(PIECE_BYTES):
            out.write(piece)


def _header(fragment: Fragment, site: str, run: str, base: int, digest: str) -> Header:
    return Header(
        kind="contribution",
        run=run,
        site=site,
        fragment=fragment.index,
        base_version=base,
        version=base,
        digest=digest,
        codec=UPLOAD,
        zstd=False,
        chunk=CHUNK_ELEMENTS,
        tensors=tensor_table(fragment),
        tokens=1,
        steps=1,
        sizes=[],
    )


# -- a run that is to come


def foreseen(run: str) -> dict[str, Any]:
    """What the coordinator will take that starts the run in this config file, before there is any of it: parameters,
    the size of the largest fragment, where fragments rest, what a process has that has no run, and the sum.

    The model's names and shapes are those of the task, built without memory for its weights; so are they where a run
    is started from files (`[run] init`). One that starts from its seed needs the whole model besides, for a moment.
    """
    from coordinator import daemon  # noqa: F401 (belongs to what a process has)
    from coordinator.initial import initial_weights

    config = load_run(Path(run))
    layout = initial_weights(config, Path(run).parent).layout
    warm_up()
    baseline, optimizer = status_bytes("VmRSS"), config.outer.optimizer
    needed = sum(state_bytes(fragment, SLOTS[optimizer]) for fragment in layout.fragments)
    mapped, packed = is_mapped(config.store.resting, needed, memory_bytes()), config.wire.zstd_level != 0
    resident = resident_bytes(layout, optimizer, config.wire.publish, packed=packed, mapped=mapped)
    return {
        "params": layout.parameters,
        "fragments": len(layout.fragments),
        "largest_fragment": max(fragment.size for fragment in layout.fragments),
        "resting": "mapped" if mapped else "memory",
        "baseline_rss_bytes": baseline,
        "computed_bytes": baseline + resident,
    }
