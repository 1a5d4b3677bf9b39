"""The coordinator's whole decision-making: one object, events in, decisions out.

The shell calls an event method with the time, journals and carries out the decisions that come back, and
reports `published` when a merge is done. All of a run's state that matters can be rebuilt from the journal
(`restore`); what cannot (leases, speeds) is measured again within a heartbeat.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from coordinator.core import rounds
from coordinator.core.claims import Claims
from coordinator.core.evaluation import Evaluations
from coordinator.core.membership import Member, Membership, Report
from coordinator.core.pacing import FASTEST, Pacer
from coordinator.core.rounds import Contribution, Expected, OpenRound, Policy, Reason, Tempo
from coordinator.core.voices import middle
from shared.names import site_of
from shared.protocol import Code

STALLED_CYCLES = 3.0
"""A site that has sent nothing for so many of its cycles, and a lease, is not counted with until it sends something."""


@dataclass(frozen=True)
class Plan:
    """The settings of a run that decisions depend on."""

    policy: Policy
    fragments: int
    tokens: int
    steps: int
    equal_time: bool
    min_sites: int
    batch_size: int = 1
    follow: bool = False
    sequence_tokens: int | None = None
    """The most tokens that a sequence can count, where the task knows it."""
    alone: bool = True
    """Whether all fragments of the run are decided on here; False: this is one of several coordinators."""


@dataclass(frozen=True)
class StartRun:
    """Enough sites are ready: training begins, and rounds wait for these from the first one on."""

    sites: tuple[str, ...]


@dataclass(frozen=True)
class CloseRound:
    """Merge these contributions, in this order and with these weights, into `version` of the fragment."""

    fragment: int
    version: int
    contributions: tuple[Contribution, ...]
    weights: tuple[float, ...]
    reason: Reason
    share: float
    """The part of a full round that it is worth; see `rounds.share`."""
    sites: int
    """How many sites train, the ones in this round included."""


@dataclass(frozen=True)
class SiteActive:
    """The site counts in rounds from now on, or no longer; `expired` where its lease ran out."""

    site: str
    active: bool
    expired: bool = False


@dataclass(frozen=True)
class Enrol:
    """The site has shown that it can train: it gets a part of the data, now and for the rest of the run."""

    site: str


@dataclass(frozen=True)
class FinishRun:
    """Every fragment has merged the token budget."""


Decision = StartRun | CloseRound | SiteActive | Enrol | FinishRun


@dataclass(frozen=True)
class Refusal:
    code: Code
    detail: str


@dataclass
class FragmentState:
    """A fragment as the decisions see it. `merging` is the version being made, if any."""

    version: int = 0
    tokens: int = 0
    merging: int | None = None
    merging_tokens: int = 0
    merging_sites: frozenset[str] = frozenset()
    open: OpenRound = field(default_factory=OpenRound)

    @property
    def target(self) -> int:
        """The version that the open round will become."""
        return (self.merging or self.version) + 1


class RunCore:
    """Events and the time in, decisions out."""

    def __init__(self, plan: Plan, membership: Membership | None = None) -> None:
        self.plan = plan
        self.claims = Claims(plan.steps, plan.batch_size, plan.sequence_tokens)
        self.members = membership or Membership()
        self.pacer = Pacer(self.members, plan.steps, equal_time=plan.equal_time, everyone=plan.policy.quorum is None)
        self.fragments = [FragmentState() for _ in range(plan.fragments)]
        self.roster: set[str] = set()
        self.last_base: dict[tuple[str, int], tuple[int, str]] = {}
        self._accepted_at: dict[tuple[str, int], float] = {}
        self._got_on: dict[str, float] = {}
        self.started = False
        self.finished = False
        self._evaluations = Evaluations(plan.tokens)

    # -- what the journal restores

    def restore(
        self,
        versions: Sequence[tuple[int, int]],
        accepted: Iterable[tuple[Contribution, bool]],
        roster: Iterable[str],
        active: Iterable[tuple[str, str]],
        started: bool,
        evaluated: int,
        now: float,
    ) -> list[Decision]:
        """The state after recovery.

        `versions`: (version, tokens) of each fragment; `accepted`: every contribution in the journal in order of
        arrival, and whether a published round holds it; `active`: (site, session) of those that took part, which
        get one fresh lease, so that the first to come back does not pass for all of them.
        """
        for state, (version, tokens) in zip(self.fragments, versions, strict=True):
            state.version, state.tokens = version, tokens
        self.roster, self.started = set(roster), started
        self._evaluations = Evaluations(self.plan.tokens, evaluated)
        for contribution, merged in accepted:
            self._note(contribution)
            if not merged:
                self.fragments[contribution.fragment].open.add(contribution, self.plan.policy, now)
        for site, session in active:
            self.members.join(site, session, now, "training")
            self._got_on[site] = now
        closed = self._close_due(now)
        self.finished = self._all_done()
        return closed

    # -- events

    def join(self, site: str, session: str, now: float) -> list[Decision]:
        """A site joins, or joins again under a new session. One that was training, and whose lease has not run out, is
        waited for as before: it will go on where it was."""
        before = self.members.live.get(site)
        if before is not None and before.report.state == "training":
            self.members.join(site, session, now, "training")
            return []
        self.members.join(site, session, now)
        return [SiteActive(site, False), *self._close_due(now)]

    def heartbeat(self, site: str, session: str, report: Report, now: float) -> list[Decision] | Refusal:
        if (refusal := self._standing(site, session)) is not None:
            return refusal
        self.members.renew(site, now)
        before = self.members.live[site].report.state
        if before == "training" and report.state != "training":
            # Sent before the order to start had arrived: from that order on the rounds wait for this site.
            report = replace(report, state="training")
        self.members.live[site].report = self.pacer.reports[site] = report
        decisions: list[Decision] = []
        if report.state != "preparing" and site not in self.roster:
            self.roster.add(site)
            decisions.append(Enrol(site))
        if report.state == "training" and before != "training":
            self._got_on[site] = now
            decisions.append(SiteActive(site, True))
        return [*decisions, *self._start_if_ready(now), *self._close_due(now)]

    def bytes_arrived(self, site: str, now: float, *, uploads: bool = True) -> None:
        """Part of a request came in: the site lives, however long its link keeps heartbeats waiting. `uploads`: it is a
        contribution's."""
        self.members.renew(site, now)
        if uploads:
            self._gets_on(site, now)

    def leave(self, site: str, session: str, now: float) -> list[Decision] | Refusal:
        if (refusal := self._standing(site, session)) is not None:
            return refusal
        self.members.remove(site)
        return [SiteActive(site, False), *self._start_if_ready(now), *self._close_due(now)]

    def offer(self, site: str, session: str, fragment: int, base_version: int, id_: str) -> Refusal | int | None:
        """Whether a contribution may come: a Refusal, the version that will hold it if it is here already, or None."""
        if (refusal := self._standing(site, session)) is not None:
            return refusal
        if fragment >= len(self.fragments):
            return Refusal(Code.WRONG_LAYOUT, f"fragment {fragment} of a run that has {len(self.fragments)}")
        state = self.fragments[fragment]
        last_base, last_id = self.last_base.get((site, fragment), (-1, ""))
        if last_id == id_:
            return self.holding(fragment, id_)
        if not self.started:
            return Refusal(Code.BAD_REQUEST, "the run has not started; wait for the order to start")
        if self.finished or state.tokens + state.merging_tokens >= self.plan.tokens:
            return Refusal(Code.RUN_FINISHED, f"fragment {fragment} has merged its token budget")
        if base_version > state.version:
            return Refusal(
                Code.UNKNOWN_BASE, f"fragment {fragment} is at version {state.version}, not {base_version} or later"
            )
        if base_version <= last_base:
            return Refusal(
                Code.ALREADY_CONTRIBUTED, f"a contribution to fragment {fragment} from base {last_base} was accepted"
            )
        stalest = self.stalest()
        if (staleness := state.target - 1 - base_version) > stalest:
            return Refusal(
                Code.TOO_STALE,
                f"base {base_version} of fragment {fragment} is {staleness} versions old, and [rounds] max_staleness "
                f"allows {stalest}",
            )
        return None

    def stalest(self) -> int:
        """The staleness, in versions, that a contribution may have now."""
        # All sites that ever took part: those that are away for a moment will contribute again.
        sites, cycles = len(self.roster | self.members.live.keys()), self.pacer.cycle_seconds()
        return rounds.stalest(self.plan.policy, sites, cycles.values())

    def accept(self, contribution: Contribution, now: float) -> tuple[int, list[Decision]]:
        """The contribution is on disk and in the journal: the version that will hold it, and what follows."""
        state = self.fragments[contribution.fragment]
        self.members.renew(contribution.site, now)
        self._note(contribution)
        self._accepted_at[contribution.site, contribution.fragment] = now
        self._gets_on(contribution.site, now)
        self.claims.spend(contribution, now, self.pacer.fastest())
        target = state.target
        state.open.add(contribution, self.plan.policy, now)
        return target, self._close_due(now)

    def published(self, fragment: int, version: int, tokens: int, now: float) -> list[Decision]:
        """The merge that CloseRound asked for is durable; `tokens` are those of its contributions."""
        state = self.fragments[fragment]
        for site in state.merging_sites:
            self._gets_on(site, now)
        state.version, state.merging, state.merging_tokens, state.merging_sites = version, None, 0, frozenset()
        state.tokens += tokens
        closed = self._close_due(now)
        if self._all_done() and not self.finished:
            self.finished = True
            return [*closed, FinishRun()]
        return closed

    def tick(self, now: float) -> list[Decision]:
        """Time has passed: leases run out, deadlines and grace windows end."""
        gone: list[Decision] = [SiteActive(site, False, expired=True) for site in self.members.expire(now)]
        return [*gone, *self._close_due(now)]

    def evaluated(self, site: str, tokens: int) -> bool:
        """Whether a site's evaluation of the weights at `tokens` merged tokens counts."""
        return self._evaluations.report(site, tokens, self.tokens)

    # -- questions

    def next_wakeup(self) -> float | None:
        """The earliest time at which `tick` has something to do; None where only an event can change things."""
        times = [self.members.next_expiry()]
        cycles = self.pacer.cycle_seconds()
        tempos = self._tempos(cycles)
        times += [
            rounds.closes_by(state.open, tempos, self.plan.policy, self._missing(p, cycles))
            for p, state in enumerate(self.fragments)
            if state.open.contributions and state.merging is None and not self.complete(p)
        ]
        return min((time for time in times if time is not None), default=None)

    def complete(self, fragment: int) -> bool:
        """Whether the fragment has merged the run's budget; it then takes no more contributions."""
        return self.fragments[fragment].tokens >= self.plan.tokens

    def holding(self, fragment: int, id_: str) -> int:
        """The version that holds an accepted contribution, or the newest one where that is older."""
        state = self.fragments[fragment]
        return state.target if id_ in state.open.contributions else state.merging or state.version

    def contributed(self, site: str, fragment: int) -> int:
        """The base version of the site's last accepted contribution to the fragment; −1: none."""
        return self.last_base.get((site, fragment), (-1, ""))[0]

    def awaited(self, site: str) -> list[tuple[int, int]]:
        """(fragment, version) of the open rounds that lack this site and were opened before one that holds it.

        Sites whose schedules are out of step (one was away for a while) can wait for each other: this one for a round
        that lacks another site, which waits for a round that lacks this one. Served in the order in which they were
        opened, rounds cannot wait in a circle; a site in step has contributed to the earlier ones anyway.

        One of several coordinators does not see what a site waits for at the others: it names all open rounds that lack
        the site, and the site serves them in an order that needs no clock (site_agent.core.site).
        """
        opened = sorted(
            (state.open.opened_at, p)
            for p, state in enumerate(self.fragments)
            if state.open.opened_at is not None  # nothing in it yet
        )
        lacking: list[tuple[int, int]] = []
        before = 0
        for _, p in opened:
            if site in self.fragments[p].open.sites:
                before = len(lacking)
            else:
                lacking.append((p, self.fragments[p].target))
        return lacking[:before] if self.plan.alone else lacking

    def closing(self, site: str) -> list[tuple[int, int]]:
        """(fragment, version) of the open rounds that have their quorum, lack this site, and are about to close: with
        pacing = "follow" it may take part with the steps that it has."""
        if not self.plan.follow:
            return []
        return [
            (p, state.target)
            for p, state in enumerate(self.fragments)
            if state.open.quorum_at is not None and site not in state.open.sites
        ]

    @property
    def tokens(self) -> int:
        """Merged tokens of the run: the mean over its fragments, each of which sees every token once."""
        return sum(state.tokens for state in self.fragments) // len(self.fragments)

    def shard(self, site: str, among: Collection[str] | None = None) -> tuple[int, int]:
        """(index, count) of the site's part of the data: its rank among all that ever got ready (or `among` those of
        them that are known to be remembered), itself included."""
        dealt = sorted({*(self.roster if among is None else among), site})
        return dealt.index(site), len(dealt)

    def take_evaluation(self, site: str, now: float) -> bool:
        """Whether this site should evaluate now; the lease goes to one site at a time that trains and is willing."""
        member = self.members.live.get(site)
        willing = member is not None and member.report.state == "training" and member.report.evaluates
        return (
            self.started
            and willing
            and self._evaluations.ask(site, self.tokens, self.members.live.keys(), now, self.finished)
        )

    def credible(self, claimed: Contribution, now: float) -> Contribution:
        """The contribution with its counts bounded by what its site can have trained since its last one."""
        return self.claims.credible(claimed, now, self.pacer.fastest())

    def stalled(self) -> list[str]:
        """The sites that are live and train by their own account, and have sent nothing for long."""
        return [member.site for member in self.members.in_state("training") if member.stalled]

    def absurd_reports(self) -> list[tuple[str, str]]:
        """(site, what) of the reports that are too far from the others' to be believed, and are bounded."""
        longest = FASTEST * middle(self.pacer.cycle_seconds())
        late = [m.site for m in self.members.in_state("training") if 0 < longest < m.report.overlap_seconds]
        return [*((site, "speed") for site in self.pacer.absurd()), *((site, "overlap") for site in sorted(late))]

    # -- rules

    def _note(self, contribution: Contribution) -> None:
        """What is remembered of an accepted contribution."""
        self.last_base[contribution.site, contribution.fragment] = (contribution.base_version, contribution.id)
        self.claims.note(contribution)

    def _cycles(self, sites: Iterable[str]) -> dict[str, float]:
        """The tokens that each site is expected to train from one contribution to the next."""
        paces = self.pacer.paces() or {}
        # A site whose speed nobody believes counts for what it has brought.
        unknown = dict.fromkeys(self.pacer.absurd(), 0.0)

        def steps(site: str) -> float:
            expected = None if site in unknown else paces.get(site)
            return expected or self.claims.steps_per_cycle(site) or unknown.get(site, float(self.plan.steps))

        return {site: steps(site) * self.claims.tokens_per_step(site) for site in sites}

    def _all_done(self) -> bool:
        return all(
            self.complete(p) and state.merging is None and not state.open.contributions
            for p, state in enumerate(self.fragments)
        )

    def _standing(self, site: str, session: str) -> Refusal | None:
        match self.members.standing(site, session):
            case "unknown":
                return Refusal(Code.NOT_A_MEMBER, f"site {site} holds no lease; join again")
            case "superseded":
                return Refusal(Code.SUPERSEDED, f"another agent has joined as {site}; stop one of the two")
            case _:
                return None

    def _start_if_ready(self, now: float) -> list[Decision]:
        sites = {site_of(member.site) for member in self.members.in_state("ready")}
        if self.started or len(sites) < self.plan.min_sites:
            return []
        self.started = True
        ready = self.members.in_state("ready")
        for member in ready:
            member.report = replace(member.report, state="training")
            self._got_on[member.site] = now
        return [StartRun(tuple(member.site for member in ready))]

    def _close_due(self, now: float) -> list[Decision]:
        cycles = self.pacer.cycle_seconds()
        if self._judge(now, cycles):
            cycles = self.pacer.cycle_seconds()
        training = [member.site for member in self._counted()]
        tempos = self._tempos(cycles)
        decisions: list[Decision] = []
        for p, state in enumerate(self.fragments):
            if state.merging is not None or not state.open.contributions:
                continue
            reason = rounds.reason_to_close(
                state.open, training, tempos, self.plan.policy, now, self._missing(p, cycles)
            )
            if self.complete(p):
                # Accepted while the last merge was under way: it was acknowledged, so it is merged as well.
                reason = reason or "complete"
            if reason is None:
                continue
            contributions = state.open.ordered()
            state.merging, state.open = state.target, OpenRound()
            state.merging_tokens = sum(contribution.tokens for contribution in contributions)
            state.merging_sites = frozenset(contribution.site for contribution in contributions)
            sites = {*training, *(contribution.site for contribution in contributions)}
            decisions.append(
                CloseRound(
                    p,
                    state.merging,
                    tuple(contributions),
                    tuple(rounds.weights(contributions, self.plan.policy, state.merging)),
                    reason,
                    rounds.share(contributions, self._cycles(sites), self.plan.policy, state.merging),
                    len(sites),
                )
            )
        return decisions

    def _counted(self) -> list[Member]:
        """The sites that train and get on: those whose contributions a round may wait for, and be measured by."""
        return [member for member in self.members.in_state("training") if not member.stalled]

    def _gets_on(self, site: str, now: float) -> None:
        """The site sends something, or what it sent was published and it need not wait any more."""
        self._got_on[site] = now
        if (member := self.members.live.get(site)) is not None:
            member.stalled = False

    def _judge(self, now: float, cycles: Mapping[str, float]) -> bool:
        """Which sites keep their lease and yet send nothing, for much longer than their cycles and links take: an
        agent's heartbeats go on where its training hangs. A full quorum waits for them, as it does for everyone, until
        the deadline. Whether it is others than before."""
        if self.plan.policy.quorum is None:
            return False
        changed = False
        longest = FASTEST * middle(cycles)
        here = frozenset[str]().union(*(state.open.sites | state.merging_sites for state in self.fragments))
        for member in self.members.in_state("training"):
            if (cycle := cycles.get(member.site)) is None or member.site in here:
                continue
            usual = min(cycle, longest) + min(member.report.sync_seconds, longest)
            patience = self.members.lease_seconds + STALLED_CYCLES * usual
            stalled = now > self._got_on.get(member.site, now) + patience
            changed |= stalled != member.stalled
            member.stalled = stalled
        return changed

    def _missing(self, fragment: int, cycles: Mapping[str, float]) -> list[Expected | None]:
        """When the sites that train and are not in the fragment's open round should contribute to it: a cycle after the
        last time."""
        found: list[Expected | None] = []
        here = self.fragments[fragment].open.sites
        for member in self._counted():
            if member.site in here:
                continue
            last, cycle = self._accepted_at.get((member.site, fragment)), cycles.get(member.site)
            if last is None or cycle is None:
                found.append(None)
            else:
                found.append(Expected(last + cycle, last + (1 + rounds.LATE) * cycle))
        return found

    def _tempos(self, cycles: Mapping[str, float]) -> dict[str, Tempo]:
        """What each site has measured. Paced sites have cycles alike: none can spare more than the lower median."""
        longest = middle(cycles)
        return {
            member.site: Tempo(min(member.report.overlap_seconds, longest), member.report.sync_seconds)
            for member in self.members.in_state("training")
            if member.report.sync_seconds > 0
        }
