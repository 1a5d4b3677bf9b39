"""What an operator asks of a site agent, as Prometheus metrics on a registry of its own."""

from __future__ import annotations

import errno
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from shared.config import MetricsTable
from shared.errors import ConfigError


class Metrics:
    """All metrics of one agent. Names begin with `isthmus_site_`; units are in the names."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.steps = Counter("isthmus_site_inner_steps", "Inner steps", registry=r)
        self.tokens = Counter("isthmus_site_tokens", "Tokens trained", registry=r)
        self.skipped = Gauge("isthmus_site_skipped_steps", "Steps whose gradient was not finite", registry=r)
        self.loss = Gauge("isthmus_site_train_loss_nats", "Loss of the last inner step", registry=r)
        self.lr = Gauge("isthmus_site_learning_rate", "Inner learning rate", registry=r)
        self.step_seconds = Gauge("isthmus_site_step_seconds", "Median inner step", registry=r)
        self.share = Gauge("isthmus_site_training_share", "Share of time in inner steps", registry=r)
        self.pace = Gauge("isthmus_site_pace_steps", "Inner steps a cycle, as paced", registry=r)
        self.waited = Counter("isthmus_site_wait_seconds", "Time spent waiting for versions", registry=r)
        self.version = Gauge("isthmus_site_fragment_version", "Version aligned with", ["fragment"], registry=r)
        self.accepted = Counter("isthmus_site_contributions_accepted", "Accepted contributions", registry=r)
        self.refused = Counter("isthmus_site_refused", "Refused requests by code", ["code"], registry=r)
        self.repairs = Counter("isthmus_site_anchor_repairs", "Anchors repaired after a mismatch", registry=r)
        self.bytes_up = Counter("isthmus_site_bytes_up", "Request body bytes", registry=r)
        self.bytes_down = Counter("isthmus_site_bytes_down", "Response body bytes", registry=r)
        self.connected = Gauge("isthmus_site_connected", "1 while heartbeats are answered", registry=r)

    def serve(self, table: MetricsTable) -> WSGIServer | None:
        """Serves them at the configured port; None where that is 0. Raises ConfigError where the port is taken."""
        if not table.port:
            return None
        try:
            server, _ = start_http_server(table.port, table.host, self.registry)
        except OSError as error:
            reason = "is in use by another program" if error.errno == errno.EADDRINUSE else str(error.strerror)
            raise ConfigError(
                f"[metrics] port: {table.host}:{table.port} {reason}; name another one, or 0 for none"
            ) from None
        return server
