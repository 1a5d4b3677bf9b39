"""What a run's config says to those who decide and to those who step."""

from __future__ import annotations

from coordinator.core.rounds import Policy
from coordinator.core.run import CloseRound, Plan
from coordinator.outer.optimizers import OuterRule
from shared.config import RunConfig


def plan_of(config: RunConfig, fragments: int, sequence_tokens: int | None) -> Plan:
    """What decisions depend on: a part of the run config, how many fragments are decided on here, and the most tokens
    that a sequence can count."""
    rounds = config.rounds
    return Plan(
        policy=Policy(
            quorum=None if rounds.quorum == "all" else int(rounds.quorum),
            grace_seconds=None if rounds.grace_seconds == "auto" else float(rounds.grace_seconds),
            deadline_seconds=rounds.deadline_seconds,
            max_staleness=None if rounds.max_staleness == "auto" else int(rounds.max_staleness),
            weighting=rounds.weighting,
            weight_cap=rounds.weight_cap or None,
            staleness_decay=rounds.staleness_decay,
        ),
        fragments=fragments,
        tokens=config.run.tokens,
        steps=config.inner.steps,
        equal_time=rounds.pacing != "equal-steps",
        min_sites=config.run.min_sites,
        batch_size=config.inner.batch_size,
        follow=rounds.pacing == "follow",
        sequence_tokens=sequence_tokens,
        alone=len(config.run.coordinators) <= 1,
    )


def rule_of(config: RunConfig, close: CloseRound, zstd_level: int) -> OuterRule:
    """The outer rule that this round is carried out under."""
    outer, wire = config.outer, config.wire
    return OuterRule(
        optimizer=outer.optimizer,
        lr=outer.lr,
        momentum=0.0 if outer.optimizer == "sgd" else outer.momentum,
        codec=wire.publish,
        zstd_level=zstd_level,
        merge=outer.merge,
        correction=outer.correction,
        share=close.share if outer.partial == "share" else 1.0,
        period=close.sites if outer.period == "auto" else int(outer.period),
        delay_c=outer.delay_c,
        beta2=outer.beta2,
        epsilon=outer.epsilon,
        grid_step=wire.publish_grid,
    )
