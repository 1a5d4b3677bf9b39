"""How a site's weights take up a new published version. All arrays are flat fp32 of one fragment."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
Rule = Literal["overwrite", "blend", "carry"]
How = Literal["align", "rebase", "overwrite"]
"""How to take up an arrived version: by the run's rule after an accepted contribution; with all progress since the
old anchor, after a refused one; or dropping that progress, where it was delivered before a restart."""


def align(rule: Rule, theta: F32, snapshot: F32, published: F32, alpha: float) -> F32:
    """θ after alignment to Θ̂ (`published`), where θ_s (`snapshot`) is what the contribution was taken from.

    overwrite: Θ̂. blend: αθ + (1−α)Θ̂ (Streaming DiLoCo, arXiv 2501.18512). carry: Θ̂ + (θ − θ_s), which keeps
    every step that was trained while the contribution was on its way.
    """
    if rule == "overwrite":
        return published.copy()
    if rule == "blend":
        return (np.float32(alpha) * theta + np.float32(1 - alpha) * published).astype(np.float32, copy=False)
    return carry(theta, snapshot, published)


def take_up(how: How, theta: F32, anchor: F32, snapshot: F32 | None, published: F32, rule: Rule, alpha: float) -> F32:
    """θ after it has taken up Θ̂ (`published`) in place of `anchor`; `snapshot` is there where `how` is "align"."""
    match how:
        case "overwrite":
            return published
        case "rebase":
            return carry(theta, anchor, published)
        case "align":
            if snapshot is None:
                raise ValueError("an accepted contribution leaves its snapshot")
            return align(rule, theta, snapshot, published, alpha)


def carry(theta: F32, since: F32, published: F32) -> F32:
    """Θ̂ + (θ − `since`): what was trained since then, on top of the new version. With the old anchor for `since`
    it is the alignment after a refusal: nothing of that progress has been delivered, so all of it stays."""
    return (published + (theta - since)).astype(np.float32, copy=False)
