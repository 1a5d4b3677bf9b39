"""A site's local checkpoints: everything that a restarted agent needs to go on as if it had not stopped.

One directory each, `step-N.K/`, with `tensors.safetensors` (weights, inner optimizer, anchors, snapshots on their way,
error feedback) and `manifest.json` (counters, decisions, data position; sealed by digests of itself and of the
tensors); written beside and renamed, the last two kept. They belong to one run, and only ever speed this site up:
published weights come from the coordinator.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.errors import ConfigError
from shared.files import DISK, Disk
from site_agent.core.budget import Progress
from site_agent.core.schedule import Cycle
from site_agent.core.site import FragmentView, InFlight, Settings, SiteCore

log = logging.getLogger(__name__)

KEPT = 2


def save(
    directory: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    manifest: Mapping[str, Any],
    disk: Disk = DISK,
    *,
    alone: bool = False,
) -> None:
    """Writes the checkpoint of `step` durably and drops all but the last two; all others, where it is to be `alone`.
    Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".step-*"):
        disk.remove(leftover)
    # A second one of the same step (a site that waits trains none) must not take the place of the first before it is
    # there.
    known = [int(path.suffix[1:]) for path in directory.glob(f"step-{step:012d}.*")]
    final = directory / f"step-{step:012d}.{max(known, default=-1) + 1:06d}"
    beside = directory / f".{final.name}"
    beside.mkdir()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    disk.write(beside / "tensors.safetensors", lambda path: save_file(contiguous, path))
    sealed = {"tensors": _file_digest(beside / "tensors.safetensors"), "manifest": dict(manifest)}
    sealed["seal"] = _seal(sealed)
    disk.write(beside / "manifest.json", lambda path: _write_text(path, json.dumps(sealed)))
    for path in beside.iterdir():
        disk.sync(path)
    disk.sync_directory(beside)
    disk.rename(beside, final)
    disk.sync_directory(directory)
    others = [path for path in sorted(directory.glob("step-*")) if path != final]
    for old in others if alone else others[: 1 - KEPT]:
        disk.remove(old)


def load_newest(directory: Path, run: str, lineage: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, manifest) of the newest readable checkpoint of the run, or of one of its lineage: the coordinator was
    restored since. None where there is none.

    Raises ConfigError where the directory holds another run's.
    """
    for path in sorted(directory.glob("step-*"), reverse=True):
        try:
            manifest, digest = _manifest(path)
            if _file_digest(path / "tensors.safetensors") != digest:
                raise ValueError("tensors.safetensors is not what was written")
            tensors = load_file(path / "tensors.safetensors")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            log.warning("checkpoint %s cannot be read (%s); trying the one before", path, error)
            continue
        if manifest.get("run") != run and manifest.get("lineage") != lineage:
            raise ConfigError(
                f"[site] state: {directory} holds checkpoints of run {manifest.get('run')}, and this is {run}; "
                "name another directory, or remove that one"
            )
        return tensors, manifest
    return None


def oldest_record(directory: Path) -> int:
    """The number of the oldest contribution in the outbox that a kept checkpoint may need; 0 where none can say."""
    oldest = []
    for path in directory.glob("step-*"):
        try:
            manifest, _ = _manifest(path)
            pending = [number for numbers in manifest["outbox"]["pending"].values() for number in numbers]
            oldest.append(min([manifest["outbox"]["next_number"], *pending, *manifest["numbers"].values()]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            oldest.append(0)
    return min(oldest, default=0)


def oldest_versions(directory: Path) -> dict[int, int]:
    """Of each fragment the oldest version that a kept checkpoint is at; empty where none can say."""
    oldest: dict[int, int] = {}
    for path in directory.glob("step-*"):
        try:
            for p, (version, _, _) in enumerate(_manifest(path)[0]["anchors"]):
                oldest[p] = min(oldest.get(p, version), int(version))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
    return oldest


def oldest_lease(directory: Path) -> int:
    """The newest lease of data that the oldest kept checkpoint knows; -1 where none can say."""
    known = []
    for path in directory.glob("step-*"):
        try:
            known.append(int(_manifest(path)[0]["stream"]["newest"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            known.append(-1)
    return min(known, default=-1)


def pack_core(core: SiteCore) -> dict[str, Any]:
    """The decisions' state as plain data. What was measured is not part of it: a restart measures anew."""
    return {
        "steps": core.steps,
        "tokens": core.tokens,
        "pace": core.pace,
        "furthest": core.furthest,
        "due": core.due,
        "cycle": asdict(core.cycle),
        "fragments": [
            {
                "version": view.version,
                "progress": asdict(view.progress),
                "counted_tokens": view.counted_tokens,
                "counted_steps": view.counted_steps,
                "complete": view.complete,
                "in_flight": _plain(view.in_flight) if view.in_flight else None,
            }
            for view in core.fragments
        ],
    }


def _plain(flight: InFlight) -> dict[str, Any]:
    """A contribution on its way, without the time of its snapshot: another process has another clock."""
    return {key: value for key, value in asdict(flight).items() if key != "taken_at"}


def unpack_core(state: Mapping[str, Any], settings: Settings, now: float) -> SiteCore:
    """The inverse of `pack_core`. What was on its way counts as taken `now`, because it is sent again."""
    views = [
        FragmentView(
            version=view["version"],
            progress=Progress(**view["progress"]),
            counted_tokens=view["counted_tokens"],
            counted_steps=view["counted_steps"],
            complete=view["complete"],
            in_flight=InFlight(**view["in_flight"], taken_at=now) if view["in_flight"] else None,
        )
        for view in state["fragments"]
    ]
    return SiteCore(
        settings,
        views,
        Cycle(**state["cycle"]),
        state["pace"],
        steps=state["steps"],
        tokens=state["tokens"],
        due=list(state["due"]),
        furthest=state["furthest"],
    )


def _manifest(path: Path) -> tuple[dict[str, Any], str]:
    """The manifest of a checkpoint as it was written, and the digest of its tensors' file. Raises ValueError, KeyError,
    TypeError, OSError where it is not."""
    sealed = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    if sealed.pop("seal") != _seal(sealed):
        raise ValueError("manifest.json is not what was written")
    return sealed["manifest"], sealed["tensors"]


def _seal(facts: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def _file_digest(path: Path) -> str:
    """XXH3-128 of a file, read in bounded pieces."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
