"""The two-scalar recipe of Streaming DiLoCo (arXiv 2501.18512), driven through the site core, by hand.

Two sites; two fragments of one scalar, both start at 1; the gradient is 2 everywhere; inner SGD lr 1; outer SGD lr 2
without momentum; H = 6, so that the fragments take turns every three steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from site_agent.core.alignment import Rule, align
from site_agent.core.site import Align, Settings, SiteCore, Snapshot, Step, Wait

F32 = NDArray[np.float32]
H, FRAGMENTS, GRADIENT, INNER_LR, OUTER_LR = 6, 2, 2.0, 1.0, 2.0


@dataclass
class Outer:
    """The coordinator: collects both sites' Δ of a fragment, then Θ ← Θ − η · mean."""

    theta: list[F32] = field(default_factory=lambda: [np.ones(1, np.float32) for _ in range(FRAGMENTS)])
    versions: list[list[F32]] = field(default_factory=lambda: [[np.ones(1, np.float32)] for _ in range(FRAGMENTS)])
    waiting: list[list[F32]] = field(default_factory=lambda: [[] for _ in range(FRAGMENTS)])

    def receive(self, p: int, delta: F32) -> None:
        self.waiting[p].append(delta)
        if len(self.waiting[p]) == 2:
            mean = (self.waiting[p][0] + self.waiting[p][1]) / np.float32(2)
            self.theta[p] = self.theta[p] - np.float32(OUTER_LR) * mean
            self.versions[p].append(self.theta[p])
            self.waiting[p] = []


class Site:
    """What the agent does with the core's decisions, on two scalars."""

    def __init__(self, outer: Outer, rule: Rule, alpha: float, overlap: int) -> None:
        self.outer, self.rule, self.alpha = outer, rule, alpha
        self.core = SiteCore.begin(Settings(overlap, 10**9), [(0, 0)] * FRAGMENTS, float(H), peers=2)
        self.theta = [np.ones(1, np.float32) for _ in range(FRAGMENTS)]
        self.anchor = [np.ones(1, np.float32) for _ in range(FRAGMENTS)]
        self.snapshot: dict[int, F32] = {}
        self.expected: dict[int, int] = {}
        self.local: dict[tuple[int, int], float] = {}
        """(fragment, step of its alignment) → local weight after it"""

    def advance(self) -> bool:
        """One decision; False while it waits."""
        self._hear()
        match self.core.next_action():
            case Step():
                self.theta = [theta - np.float32(INNER_LR * GRADIENT) for theta in self.theta]
                self.core.stepped(1, 1.0)
            case Snapshot(p, base) as action:
                self.snapshot[p] = self.theta[p].copy()
                self.core.snapshot_taken(action, 0.0)
                self.outer.receive(p, self.anchor[p] - self.snapshot[p])
                self.expected[p] = base + 1
                self.core.accepted(p, base + 1, 0.0)
            case Align(p, version):
                published = self.outer.versions[p][version]
                flat = [torch.from_numpy(each) for each in (self.theta[p], self.snapshot.pop(p), published)]
                self.theta[p] = align(self.rule, *flat, self.alpha).numpy()
                self.anchor[p] = published
                self.core.aligned(p)
                self.local[p, self.core.steps] = float(self.theta[p][0])
            case Wait():
                return False
        return True

    def _hear(self) -> None:
        for p, version in list(self.expected.items()):
            if len(self.outer.versions[p]) > version:
                self.core.arrived(p, version, 0, "align")
                del self.expected[p]


def run(rule: Rule, alpha: float, overlap: int, steps: int, first_ahead: bool) -> tuple[Outer, list[Site]]:
    """Both sites through `steps` inner steps; `first_ahead`: one site always goes as far as it can before the other."""
    outer = Outer()
    sites = [Site(outer, rule, alpha, overlap) for _ in range(2)]
    while any(site.core.steps < steps for site in sites):
        moved = False
        for site in sites:
            while site.core.steps <= steps and not (site.core.steps == steps and site.core.next_action() == Step()):
                if not site.advance():
                    break
                moved = True
                if not first_ahead:
                    break
        assert moved or all(site.core.steps >= steps for site in sites), "both sites wait for ever"
    for site in sites * 2:  # what is left to do on the last step, which may need the other's contribution first
        while site.core.next_action() != Step() and site.advance():
            pass
    return outer, sites


GLOBAL_WITHOUT_OVERLAP = {0: [1, -11, -35, -59], 1: [1, -23, -47, -71]}


@pytest.mark.parametrize("first_ahead", [False, True])
@pytest.mark.parametrize(
    ("rule", "alpha", "overlap", "published", "local"),
    [
        # α = 0, τ = 0: every alignment is the published weight
        (
            "overwrite",
            0.0,
            0,
            GLOBAL_WITHOUT_OVERLAP,
            {(0, 3): -11, (1, 6): -23, (0, 9): -35, (1, 12): -47, (0, 15): -59, (1, 18): -71},
        ),
        (
            "blend",
            0.0,
            0,
            GLOBAL_WITHOUT_OVERLAP,
            {(0, 3): -11, (1, 6): -23, (0, 9): -35, (1, 12): -47, (0, 15): -59, (1, 18): -71},
        ),
        (
            "carry",
            0.5,
            0,
            GLOBAL_WITHOUT_OVERLAP,
            {(0, 3): -11, (1, 6): -23, (0, 9): -35, (1, 12): -47, (0, 15): -59, (1, 18): -71},
        ),
        # α = 0.5, τ = 0; e.g. step 9: θ = −8 − 12 = −20, Δ = −11 + 20 = 9, Θ = −11 − 18 = −29, (−20 − 29)/2 = −24.5
        (
            "blend",
            0.5,
            0,
            {0: [1, -11, -29, -44], 1: [1, -23, -35, -53]},
            {(0, 3): -8, (1, 6): -17, (0, 9): -24.5, (1, 12): -32, (0, 15): -40.25, (1, 18): -48.5},
        ),
        # τ = 2, overwrite: the two steps since the snapshot are lost, so a cycle counts four: Δ = 8, Θ falls by 16
        (
            "overwrite",
            0.0,
            2,
            {0: [1, -11, -27, -43], 1: [1, -23, -39, -55]},
            {(0, 5): -11, (1, 8): -23, (0, 11): -27, (1, 14): -39, (0, 17): -43},
        ),
        # τ = 2, carry: nothing is lost; Θ is as without overlap, and the site is two steps (−4) further
        (
            "carry",
            0.5,
            2,
            GLOBAL_WITHOUT_OVERLAP,
            {(0, 5): -15, (1, 8): -27, (0, 11): -39, (1, 14): -51, (0, 17): -63},
        ),
        # τ = 2, α = 0.5. Fragment 0: (−9 − 11)/2 = −10; at 9: θ = −18, Δ = 7, Θ = −25; at 11: (−22 − 25)/2 = −23.5;
        # at 15: θ = −31.5, Δ = 6.5, Θ = −38; at 17: (−35.5 − 38)/2 = −36.75.
        # Fragment 1: at 8: (−15 − 23)/2 = −19; at 12: θ = −27, Δ = 4, Θ = −31; at 14: −31; at 18: Δ = 8, Θ = −47.
        (
            "blend",
            0.5,
            2,
            {0: [1, -11, -25, -38], 1: [1, -23, -31, -47]},
            {(0, 5): -10, (1, 8): -19, (0, 11): -23.5, (1, 14): -31, (0, 17): -36.75},
        ),
        # τ = 4, carry: longer than the three steps between two fragments' snapshots
        (
            "carry",
            0.5,
            4,
            GLOBAL_WITHOUT_OVERLAP,
            {(0, 7): -19, (1, 10): -31, (0, 13): -43, (1, 16): -55},
        ),
    ],
)
def test_the_published_recipe_is_followed_number_by_number(
    rule: Rule,
    alpha: float,
    overlap: int,
    published: dict[int, list[float]],
    local: dict[tuple[int, int], float],
    first_ahead: bool,
) -> None:
    outer, sites = run(rule, alpha, overlap, 18, first_ahead)
    assert {p: [float(v[0]) for v in versions] for p, versions in enumerate(outer.versions)} == published
    for site in sites:
        assert site.local == local
