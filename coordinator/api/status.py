"""The JSON documents for people and the dashboard: what the coordinator knows, as of now."""

from __future__ import annotations

from typing import Any

from coordinator.core.membership import Report
from coordinator.service import Coordinator


def versions_document(c: Coordinator) -> dict[str, Any]:
    """Each fragment's newest published version, by `fragment`."""
    return {
        "run": c.run_id,
        "fragments": [
            {
                "fragment": p,
                "version": newest.version,
                "digest": newest.digest,
                "tokens": newest.tokens,
                "parameters": c.layout.fragments[p].size,
            }
            for p, newest in enumerate(c.publication.newest)
        ],
    }


def run_document(c: Coordinator) -> dict[str, Any]:
    """The run's name, config and layout."""
    return {
        "run": c.run_id,
        "name": c.config.run.name,
        "parameters": c.layout.parameters,
        "layout_digest": c.layout.digest,
        "config": c.config.model_dump(mode="json", exclude={"store": {"mirror"}}),
    }


async def status_document(c: Coordinator) -> dict[str, Any]:
    """Progress, sites and open rounds."""
    rounds = await c.rounds()
    now, core = c.clock(), c.core
    return {
        "run": c.run_id,
        "name": c.config.run.name,
        "state": "finished" if core.finished else "training" if core.started else "waiting for sites",
        "tokens": core.tokens,
        "tokens_budget": core.plan.tokens,
        "outer_steps": sum(newest.version for newest in c.publication.newest),
        "eval_loss": c.evaluations[-1][1] if c.evaluations else None,
        "evaluations": [{"tokens": tokens, "loss": loss} for tokens, loss in c.evaluations],
        "min_sites": core.plan.min_sites,
        "storage_fault": c.workers.storage_fault,
        "data": c.lending.document(),
        "sites": [_site(c, name, now) for name in sorted(core.roster | core.members.live.keys())],
        "fragments": [
            {
                "fragment": p,
                "version": newest.version,
                "digest": newest.digest,
                "tokens": newest.tokens,
                "parameters": c.layout.fragments[p].size,
                "merging": core.fragments[p].merging,
                "contributions": sorted(core.fragments[p].open.sites),
            }
            for p, newest in enumerate(c.publication.newest)
        ],
        "rounds": rounds,
    }


def _site(c: Coordinator, name: str, now: float) -> dict[str, Any]:
    """A site as it last reported itself; `live` says whether it still holds a lease."""
    member, report = c.core.members.live.get(name), c.core.pacer.reports.get(name, Report("preparing"))
    pace = c.core.pacer.pace(name) if member else None
    return {
        "name": name,
        "live": member is not None,
        "state": report.state if member else "away",
        "stalled": member.stalled if member else False,
        "lease_seconds": round(member.lease_until - now, 1) if member else None,
        "steps": report.steps,
        "tokens": report.tokens,
        "step_seconds": report.step_seconds,
        "training_share": report.training_share,
        "pace": None if pace is None else round(pace, 2),
        "loss": report.loss,
        "anchor_repairs": report.repairs,
    }
