"""How much memory a site needs on each of its devices, known from the run's config before anything is allocated.

It is a lower bound: activations depend on the task and its batch, and a real step measures them. A run that does not
fit even so is better refused with the sum in words than ended by an allocator, hours into the first cycle.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from shared.fragments import Fragment, Layout

Optimizer = Literal["adamw", "muon", "sgd"]
ALIGNING = 16
"""Bytes for each element of a fragment's part that is taken up: θ, Θ̂, their difference and the result, fp32."""


@dataclass(frozen=True)
class Needed:
    """Bytes on one device, by what they are for; without activations."""

    weights: int
    gradients: int
    optimizer: int
    feedback: int
    snapshots: int
    alignment: int

    @property
    def total(self) -> int:
        return sum(size for _, size in self._parts())

    def sentence(self) -> str:
        """The sum and its parts, as "at least 38.2 GB on each device without activations (weights 2.1, …)"."""
        unit, name = _unit(self.total)
        parts = ", ".join(f"{part} {size / unit:.1f}" for part, size in self._parts() if size)
        return f"at least {self.total / unit:.1f} {name} on each device without activations ({parts})"

    def shortage(self, device: str, free: int) -> str | None:
        """What is wrong and what to do, where `device` has `free` bytes left and that is too little; else None."""
        if self.total <= free:
            return None
        unit, name = _unit(self.total)
        ways = ["share the model among more devices", "train a smaller one"]
        if 4 * (self.snapshots + self.alignment) > self.total:
            ways.insert(0, "raise [rounds] fragments")
        if self.optimizer and 4 * self.optimizer > self.total:
            ways.append('use an [inner] optimizer that holds less ("muon": one vector for matrices; "sgd": none)')
        return f"needs {self.sentence()}, {device} has {free / unit:.1f} {name} free: {', or '.join(ways)}"

    def _parts(self) -> list[tuple[str, int]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


def memory_needed(
    layout: Layout,
    optimizer: Optimizer,
    *,
    feedback: bool,
    overlap: int | None,
    steps: int,
    shards: int = 1,
    holders: int = 1,
) -> Needed:
    """Bytes on one device of a site that trains `layout`.

    `feedback`: whether the run keeps error feedback. `overlap`: τ where it is a number, None where a contribution may
    be on its way for as long as it takes; `steps`: the inner steps of a cycle, H. `shards`: how many ranks the weights,
    gradients and the optimizer's vectors are sharded over; `holders`: how many share snapshots and error feedback.
    """
    parameters = layout.parameters
    return Needed(
        weights=_part(4 * parameters, shards),
        gradients=_part(4 * parameters, shards),
        optimizer=_part(_optimizer_bytes(layout, optimizer), shards),
        feedback=_part(4 * parameters, holders) if feedback else 0,
        snapshots=_part(4 * _on_its_way(layout, overlap, steps), holders),
        alignment=_part(ALIGNING * max((fragment.size for fragment in layout.fragments), default=0), holders),
    )


def _optimizer_bytes(layout: Layout, optimizer: Optimizer) -> int:
    """AdamW's two moments; Muon's momentum for matrices, beside AdamW for the rest; SGD has no momentum here."""
    if optimizer == "sgd":
        return 0
    if optimizer == "adamw":
        return 8 * layout.parameters
    tensors = [tensor for fragment in layout.fragments for tensor in fragment.tensors]
    return sum((4 if len(tensor.shape) >= 2 else 8) * tensor.size for tensor in tensors)


def _on_its_way(layout: Layout, overlap: int | None, steps: int) -> int:
    """Elements of the snapshots that can be held at once. Fragments are due H/P steps apart, rounded either way."""
    apart = steps // max(1, len(layout.fragments))
    at_once = len(layout.fragments) if overlap is None or apart == 0 else overlap // apart + 1
    return sum(sorted(map(_size, layout.fragments), reverse=True)[:at_once])


def _size(fragment: Fragment) -> int:
    return fragment.size


def _part(size: int, ranks: int) -> int:
    """The largest part of `size` bytes that are dealt among `ranks`."""
    return -(-size // ranks)


def _unit(size: int) -> tuple[int, str]:
    return (10**9, "GB") if size >= 10**9 else (10**6, "MB")
