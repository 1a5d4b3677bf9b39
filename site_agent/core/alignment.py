"""How a site's weights take up a new published version. All vectors are flat fp32 of one fragment, and on one device:
that of the weights, which are this site's own and need not be the same bits elsewhere."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Rule = Literal["overwrite", "blend", "carry"]
How = Literal["align", "rebase", "overwrite"]
"""How to take up an arrived version: by the run's rule after an accepted contribution; with all progress since the
old anchor, after a refused one; or dropping that progress, where it was delivered before a restart."""


def align(rule: Rule, theta: Tensor, snapshot: Tensor, published: Tensor, alpha: float) -> Tensor:
    """θ after alignment to Θ̂ (`published`), where θ_s (`snapshot`) is what the contribution was taken from.

    overwrite: Θ̂. blend: αθ + (1−α)Θ̂ (Streaming DiLoCo, arXiv 2501.18512). carry: Θ̂ + (θ − θ_s), which keeps
    every step that was trained while the contribution was on its way.
    """
    if rule == "overwrite":
        return published.clone()
    if rule == "blend":
        return alpha * theta + (1 - alpha) * published
    return carry(theta, snapshot, published)


def take_up(how: How, theta: Tensor, since: Tensor | None, published: Tensor, rule: Rule, alpha: float) -> Tensor:
    """θ after it has taken up Θ̂ (`published`). `since`: what its progress counts from, the snapshot where `how` is
    "align" and the old anchor where it is "rebase"."""
    if how == "overwrite":
        return published
    if since is None:
        raise ValueError("an accepted contribution leaves its snapshot")
    return align(rule, theta, since, published, alpha) if how == "align" else carry(theta, since, published)


def carry(theta: Tensor, since: Tensor, published: Tensor) -> Tensor:
    """Θ̂ + (θ − `since`): what was trained since then, on top of the new version. With the old anchor for `since`
    it is the alignment after a refusal: nothing of that progress has been delivered, so all of it stays."""
    return published + (theta - since)
