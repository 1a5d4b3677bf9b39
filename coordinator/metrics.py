"""What an operator asks of a coordinator, as Prometheus metrics on a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from coordinator.core.membership import Report
from coordinator.core.run import CloseRound, RunCore

_COUNTS = (1, 2, 3, 4, 8, 16, 32, 64, 128)
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """All metrics of one coordinator. Names begin with `isthmus_`; units are in the names."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.version = Gauge("isthmus_fragment_version", "Published version", ["fragment"], registry=r)
        self.open_contributions = Gauge(
            "isthmus_round_contributions", "Contributions in the open round", ["fragment"], registry=r
        )
        self._of_fragments: list[tuple[Gauge, Gauge]] = []
        self.rounds = Counter("isthmus_rounds", "Closed rounds by reason", ["reason"], registry=r)
        self.round_sites = Histogram(
            "isthmus_round_sites",
            "Contributions merged in a round",
            registry=r,
            buckets=(1, 2, 3, 4, 8, 16, 32, 64, 128),
        )
        self.accepted = Counter("isthmus_contributions_accepted", "Accepted contributions", ["site"], registry=r)
        self.refused = Counter("isthmus_refused", "Refused requests by stable code", ["site", "code"], registry=r)
        self.bounded = Counter(
            "isthmus_claims_bounded", "Absurd claims that were bounded", ["site", "what"], registry=r
        )
        self.staleness = Histogram(
            "isthmus_staleness_versions",
            "Staleness of merged contributions",
            registry=r,
            buckets=(0, 1, 2, 3, 4, 8, 16, 32),
        )
        self.merge_seconds = Histogram("isthmus_merge_seconds", "Merge, step and encode", registry=r, buckets=_SECONDS)
        self.publish_seconds = Histogram(
            "isthmus_publish_seconds", "From a round's close to its published delta", registry=r, buckets=_SECONDS
        )
        self.contribution_norm = Gauge("isthmus_contribution_norm", "L2 norm of the last one", ["site"], registry=r)
        self.merged_norm = Gauge("isthmus_merged_norm", "L2 norm of the last merged Δ", ["fragment"], registry=r)
        self.cosine = Gauge(
            "isthmus_contribution_cosine", "Mean cosine between the last merged contributions", ["fragment"], registry=r
        )
        self.weight = Gauge("isthmus_contribution_weight", "Weight of the last merged one", ["site"], registry=r)
        self.bytes_in = Counter("isthmus_bytes_in", "Request body bytes", ["site"], registry=r)
        self.bytes_out = Counter("isthmus_bytes_out", "Response body bytes", ["site"], registry=r)
        self.live_sites = Gauge("isthmus_live_sites", "Sites that hold a lease", registry=r)
        self.training_sites = Gauge("isthmus_training_sites", "Sites that take part in rounds", registry=r)
        self.stalled_sites = Gauge(
            "isthmus_stalled_sites", "Sites that are alive and have sent nothing for long", registry=r
        )
        self.leases_lost = Counter("isthmus_leases_lost", "Leases that ran out", ["site"], registry=r)
        self.site_steps = Gauge("isthmus_site_inner_steps", "Inner steps, as reported", ["site"], registry=r)
        self.site_step_seconds = Gauge("isthmus_site_step_seconds", "Median inner step", ["site"], registry=r)
        self.site_share = Gauge("isthmus_site_training_share", "Share of time in inner steps", ["site"], registry=r)
        self.site_download = Gauge(
            "isthmus_site_download_bytes_per_second", "Of its last large download, as reported", ["site"], registry=r
        )
        self.site_pace = Gauge("isthmus_site_pace_steps", "Inner steps a cycle, as paced", ["site"], registry=r)
        self.site_loss = Gauge("isthmus_site_train_loss_nats", "Training loss, as reported", ["site"], registry=r)
        self.site_repairs = Gauge("isthmus_site_anchor_repairs", "Repaired anchors", ["site"], registry=r)
        self.tokens = Gauge("isthmus_tokens_merged", "Tokens merged into the run", registry=r)
        self.tokens_budget = Gauge("isthmus_tokens_budget", "The run's token budget", registry=r)
        self.eval_loss = Gauge("isthmus_eval_loss_nats", "Held-out loss of the published weights", registry=r)
        self.finished = Gauge("isthmus_run_finished", "1 once the token budget is merged", registry=r)
        self.journal_bytes = Gauge("isthmus_journal_bytes", "Size of the journal", registry=r)
        self.state_bytes = Gauge("isthmus_state_bytes", "Size of the state directory", registry=r)
        self.disk_free_bytes = Gauge("isthmus_disk_free_bytes", "Free space under the state directory", registry=r)
        self.disk_needed_bytes = Gauge(
            "isthmus_disk_needed_bytes", "What may be written before anything is dropped again", registry=r
        )
        self.storage_faults = Counter("isthmus_storage_faults", "Writes that the disk refused", registry=r)
        self.mirrored_at = Gauge(
            "isthmus_mirror_completed_timestamp_seconds", "When the last pass of the mirror was complete", registry=r
        )
        self.mirror_faults = Counter("isthmus_mirror_faults", "Passes of the mirror that failed", registry=r)
        self.loop_lag = Gauge(
            "isthmus_event_loop_lag_seconds", "Longest lag of the event loop within the last 15 s", registry=r
        )

    def show_core(self, core: RunCore) -> None:
        """The gauges that mirror the core's state."""
        if not self._of_fragments:
            # Looked up once: this is called with everything that happens.
            fragments = range(len(core.fragments))
            self._of_fragments = [(self.version.labels(p), self.open_contributions.labels(p)) for p in fragments]
        for (version, contributions), state in zip(self._of_fragments, core.fragments, strict=True):
            version.set(state.version)
            contributions.set(len(state.open.contributions))
        self.live_sites.set(len(core.members.live))
        self.training_sites.set(len(core.members.in_state("training")))
        self.stalled_sites.set(len(core.stalled()))
        self.tokens.set(core.tokens)
        self.tokens_budget.set(core.plan.tokens)
        self.finished.set(int(core.finished))

    def show_report(self, site: str, report: Report) -> None:
        """What a heartbeat said."""
        self.site_steps.labels(site).set(report.steps)
        self.site_step_seconds.labels(site).set(report.step_seconds)
        self.site_share.labels(site).set(report.training_share)
        self.site_repairs.labels(site).set(report.repairs)
        if report.download_rate is not None:
            self.site_download.labels(site).set(report.download_rate)
        if report.loss is not None:
            self.site_loss.labels(site).set(report.loss)

    def show_round(
        self, close: CloseRound, norm: float, cosine: float | None, merge_seconds: float, publish_seconds: float
    ) -> None:
        """A round that was merged and published."""
        self.merge_seconds.observe(merge_seconds)
        self.publish_seconds.observe(publish_seconds)
        self.merged_norm.labels(close.fragment).set(norm)
        self.rounds.labels(close.reason).inc()
        self.round_sites.observe(len(close.contributions))
        if cosine is not None:
            self.cosine.labels(close.fragment).set(cosine)
        for contribution, weight in zip(close.contributions, close.weights, strict=True):
            self.staleness.observe(close.version - 1 - contribution.base_version)
            self.weight.labels(contribution.site).set(weight)

    def show_sizes(self, journal: int, state: int, free: int, needed: int) -> None:
        """Bytes on disk."""
        self.journal_bytes.set(journal)
        self.state_bytes.set(state)
        self.disk_free_bytes.set(free)
        self.disk_needed_bytes.set(needed)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)
