"""RunCore: events and the time in, decisions out."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest

from coordinator.core.evaluation import EVALUATION_LEASE_SECONDS
from coordinator.core.membership import Report
from coordinator.core.pacing import FASTEST
from coordinator.core.rounds import SPARED, Contribution, Policy
from coordinator.core.run import (
    STALLED_CYCLES,
    CloseRound,
    Decision,
    Enrol,
    FinishRun,
    Plan,
    Refusal,
    RunCore,
    SiteActive,
    StartRun,
)
from shared.protocol import Code

POLICY = Policy(quorum=None, grace_seconds=0.0, deadline_seconds=600.0, max_staleness=2, weighting="tokens")
PLAN = Plan(policy=POLICY, fragments=2, tokens=1000, steps=50, equal_time=True, min_sites=1)
READY, TRAINING = Report("ready"), Report("training")


def training(*sites: str, plan: Plan = PLAN) -> RunCore:
    """A run in which `sites` train, since time 0; a session is named like its site."""
    core = RunCore(replace(plan, min_sites=len(sites)))
    for site in sites:
        core.join(site, site, 0.0)
    for site in sites:
        core.heartbeat(site, site, READY, 0.0)
    assert core.started
    return core


def contribution(site: str, fragment: int = 0, base: int = 0, tokens: int = 10) -> Contribution:
    return Contribution(f"{site}-{fragment}-{base}", site, fragment, base, tokens, 5)


def contribute(core: RunCore, site: str, fragment: int = 0, base: int = 0, now: float = 1.0) -> list[Decision]:
    sent = contribution(site, fragment, base)
    assert core.offer(site, site, fragment, base, sent.id) is None
    return core.accept(sent, now)[1]


def refused(core: RunCore, site: str, fragment: int, base: int, session: str = "", id_: str = "new") -> Code:
    verdict = core.offer(site, session or site, fragment, base, id_)
    assert isinstance(verdict, Refusal)
    assert verdict.detail
    return verdict.code


def publish(core: RunCore, close: Decision, now: float = 2.0) -> list[Decision]:
    assert isinstance(close, CloseRound)
    return core.published(close.fragment, close.version, sum(c.tokens for c in close.contributions), now)


# ---- the start


def test_training_starts_once_enough_sites_are_ready() -> None:
    core = RunCore(replace(PLAN, min_sites=2))
    core.join("us", "us", 0.0)
    core.join("eu", "eu", 0.0)
    assert core.heartbeat("us", "us", READY, 1.0) == [Enrol("us")]
    assert not core.started
    assert core.heartbeat("eu", "eu", READY, 2.0) == [Enrol("eu"), StartRun(("eu", "us"))]
    assert core.started


def test_learners_of_one_site_count_once_for_the_start() -> None:
    core = RunCore(replace(PLAN, min_sites=2))
    for name in ("eu~fast", "eu~slow", "us"):
        core.join(name, name, 0.0)
    for name in ("eu~fast", "eu~slow"):
        core.heartbeat(name, name, READY, 1.0)
        assert not core.started
    decisions = core.heartbeat("us", "us", READY, 2.0)
    assert decisions[-1] == StartRun(("eu~fast", "eu~slow", "us"))


def test_sites_that_still_prepare_do_not_count_for_the_start() -> None:
    core = RunCore(replace(PLAN, min_sites=2))
    for site in ("a", "b", "c"):
        core.join(site, site, 0.0)
    core.heartbeat("a", "a", READY, 1.0)
    assert core.heartbeat("b", "b", Report("preparing"), 1.0) == []
    assert not core.started


def test_a_late_ready_heartbeat_does_not_take_a_site_out_of_the_round() -> None:
    core = training("a", "b")
    # Sent before the order to start had reached the site.
    assert core.heartbeat("b", "b", READY, 1.0) == []
    assert core.members.live["b"].report.state == "training"
    assert contribute(core, "a") == [], "the round still waits for b"
    (close,) = contribute(core, "b")
    assert isinstance(close, CloseRound)


def test_a_site_that_joins_later_counts_once_it_trains() -> None:
    core = training("a")
    core.join("b", "b", 1.0)
    assert core.heartbeat("b", "b", READY, 1.0) == [Enrol("b")]
    assert len(contribute(core, "a", 0)) == 1, "a round does not wait for a site that prepares"
    assert core.heartbeat("b", "b", TRAINING, 2.0) == [SiteActive("b", True)]
    assert core.heartbeat("b", "b", TRAINING, 3.0) == []
    assert contribute(core, "a", 1) == [], "and now it waits"


# ---- offers and their refusals


def test_a_site_that_starts_again_within_its_lease_is_waited_for() -> None:
    """Without it the round would close one contribution short, and a run that repeats would not."""
    core = training("eu", "us")
    contribute(core, "us")
    assert core.join("eu", "again", 2.0) == []
    assert core.heartbeat("eu", "again", Report("preparing"), 3.0) == []
    assert core.tick(20.0) == []
    (close,) = core.accept(contribution("eu"), 21.0)[1]
    assert isinstance(close, CloseRound)
    assert [c.site for c in close.contributions] == ["eu", "us"]


def test_a_site_that_starts_again_and_dies_is_waited_for_no_longer_than_its_lease() -> None:
    core = training("eu", "us")
    contribute(core, "us")
    core.join("eu", "again", 2.0)
    core.heartbeat("us", "us", TRAINING, 31.0)
    closed = core.tick(33.0)
    assert [type(decision) for decision in closed] == [SiteActive, CloseRound]


def test_a_contribution_before_the_start_is_refused() -> None:
    core = RunCore(PLAN)
    core.join("a", "a", 0.0)
    assert refused(core, "a", 0, 0) is Code.BAD_REQUEST


def test_a_site_without_a_lease_is_refused() -> None:
    core = training("a")
    assert refused(core, "stranger", 0, 0) is Code.NOT_A_MEMBER
    core.tick(1e6)
    assert refused(core, "a", 0, 0) is Code.NOT_A_MEMBER


def test_an_older_agent_of_the_same_name_is_told_that_it_was_superseded() -> None:
    core = training("a")
    core.join("a", "a-2", 1.0)
    assert refused(core, "a", 0, 0, session="a") is Code.SUPERSEDED
    assert core.offer("a", "a-2", 0, 0, "x") is None
    for verdict in (core.heartbeat("a", "a", TRAINING, 1.0), core.leave("a", "a", 1.0)):
        assert isinstance(verdict, Refusal)
        assert verdict.code is Code.SUPERSEDED
    assert "a" in core.members.live, "and it cannot take the newer one out"


def test_a_fragment_that_the_run_does_not_have_is_refused() -> None:
    assert refused(training("a"), "a", 2, 0) is Code.WRONG_LAYOUT


def test_a_base_that_was_never_published_is_refused() -> None:
    core = training("a")
    assert refused(core, "a", 0, 1) is Code.UNKNOWN_BASE
    (close,) = contribute(core, "a")
    assert refused(core, "a", 0, 1) is Code.UNKNOWN_BASE, "version 1 is being made and not yet published"
    publish(core, close)
    assert core.offer("a", "a", 0, 1, "x") is None


def test_a_second_contribution_from_the_same_base_is_refused() -> None:
    core = training("a", "b")
    contribute(core, "a")
    assert refused(core, "a", 0, 0, id_="other") is Code.ALREADY_CONTRIBUTED
    assert core.offer("a", "a", 1, 0, "fragments know nothing of each other") is None


def test_a_contribution_that_is_too_stale_is_refused_and_the_limit_itself_is_not() -> None:
    for version, expected in ((2, None), (3, Code.TOO_STALE)):  # max_staleness = 2
        core = training("a")
        core.fragments[0].version = version
        verdict = core.offer("a", "a", 0, 0, "x")
        assert (verdict.code if isinstance(verdict, Refusal) else verdict) is expected


def test_after_an_outage_the_first_to_return_are_not_too_stale_because_the_others_are_not_back_yet() -> None:
    """A cycle of 24 sites has 24 versions where each arrival is a round; in an outage every lease is lost."""
    sites = [f"s{n:02}" for n in range(24)]
    policy = replace(POLICY, quorum=1, max_staleness=None)
    core = training(*sites, plan=replace(PLAN, fragments=1, tokens=10**6, policy=policy))
    bases = {}
    for site in sites:
        (close,) = contribute(core, site)
        publish(core, close)
        bases[site] = core.fragments[0].version
    core.tick(10**6)
    assert not core.members.live
    for site in sites:
        core.join(site, site, 10**6)
        core.heartbeat(site, site, TRAINING, 10**6)
        for close in contribute(core, site, base=bases[site], now=10**6):
            publish(core, close, 10**6)


def test_a_finished_fragment_takes_no_more() -> None:
    core = training("a", plan=replace(PLAN, tokens=10))
    (close,) = contribute(core, "a", 0)
    assert publish(core, close) == []
    assert refused(core, "a", 0, 1) is Code.RUN_FINISHED
    assert core.offer("a", "a", 1, 0, "x") is None, "the other fragment goes on"


def test_an_offer_may_be_repeated_and_names_the_version_that_holds_it() -> None:
    core = training("a", "b")
    contribute(core, "a")
    assert core.offer("a", "a", 0, 0, "a-0-0") == 1, "in the open round"
    (close,) = contribute(core, "b")
    assert core.offer("a", "a", 0, 0, "a-0-0") == 1, "while it merges"
    publish(core, close)
    assert core.offer("a", "a", 0, 0, "a-0-0") == 1, "and after"


def test_a_repeated_offer_is_known_even_when_the_run_has_finished() -> None:
    core = training("a", plan=replace(PLAN, tokens=10, fragments=1))
    (close,) = contribute(core, "a")
    assert publish(core, close) == [FinishRun()]
    assert core.offer("a", "a", 0, 0, "a-0-0") == 1


# ---- rounds


def test_a_round_closes_in_site_order_with_its_weights_whoever_came_first() -> None:
    closed = set()
    for arrival in permutations(["asia", "eu", "us"]):
        core = training("asia", "eu", "us")
        decisions = [decision for site in arrival for decision in contribute(core, site)]
        (close,) = decisions
        assert isinstance(close, CloseRound)
        assert (close.fragment, close.version, close.reason) == (0, 1, "complete")
        closed.add((tuple(c.site for c in close.contributions), close.weights))
    assert closed == {(("asia", "eu", "us"), (1 / 3, 1 / 3, 1 / 3))}


def test_contributions_that_arrive_while_a_round_merges_go_to_the_next() -> None:
    core = training("a", "b", plan=replace(PLAN, policy=replace(POLICY, quorum=1)))
    (close,) = contribute(core, "a")
    late = contribution("b")
    assert core.offer("b", "b", 0, 0, late.id) is None
    assert core.accept(late, 2.0) == (2, []), "one merge at a time"
    (next_close,) = publish(core, close)
    assert isinstance(next_close, CloseRound)
    assert next_close.version == 2
    assert next_close.contributions == (late,)


def test_a_dead_sites_lease_lets_the_round_close() -> None:
    core = training("a", "b")
    core.heartbeat("a", "a", TRAINING, 20.0)
    assert contribute(core, "a", now=20.0) == []
    assert core.tick(29.9) == []
    gone, close = core.tick(30.0)
    assert gone == SiteActive("b", False, expired=True)
    assert isinstance(close, CloseRound)
    assert [c.site for c in close.contributions] == ["a"]


def test_bytes_of_an_upload_keep_a_site_alive_without_a_heartbeat() -> None:
    core = training("a", "b")
    contribute(core, "a", now=1.0)
    for second in (20.0, 40.0, 60.0):
        core.bytes_arrived("a", second)
        core.bytes_arrived("b", second)
        assert core.tick(second) == []
    core.bytes_arrived("a", 89.0)
    assert core.tick(90.0)[0] == SiteActive("b", False, expired=True)


def test_an_accepted_contribution_renews_the_lease() -> None:
    core = training("a", "b")
    contribute(core, "a", now=25.0)
    assert core.members.live["a"].lease_until == 55.0


def test_a_site_that_leaves_is_no_longer_waited_for() -> None:
    core = training("a", "b")
    contribute(core, "a")
    left, close = core.leave("b", "b", 2.0)
    assert left == SiteActive("b", False)
    assert isinstance(close, CloseRound)


def test_a_deadline_closes_a_round_at_next_wakeup() -> None:
    core = training("a", "b")
    contribute(core, "a", now=1.0)
    for now in range(20, 601, 20):
        for site in ("a", "b"):
            core.heartbeat(site, site, TRAINING, float(now))
    assert core.next_wakeup() == 601.0
    (close,) = core.tick(601.0)
    assert isinstance(close, CloseRound)
    assert close.reason == "deadline"


def measured(site: str, core: RunCore, overlap: float = 8.0, now: float = 1.0) -> None:
    """Two steps a second and H = 16: cycles of 8 seconds, of which the link takes 2."""
    core.heartbeat(site, site, Report("training", step_seconds=0.5, overlap_seconds=overlap, sync_seconds=2.0), now)


@pytest.mark.parametrize(("now", "until"), [(8.0, 8.0 + 6 * SPARED), (4.0, 4.0 + 3 * SPARED)], ids=["soon", "late"])
def test_a_round_waits_for_a_site_that_is_expected_in_time_and_not_for_a_later_one(now: float, until: float) -> None:
    """b comes every 8 seconds: at 4 it is too early to wait for it, and only c counts, of which nothing is known."""
    plan = replace(PLAN, steps=16, equal_time=True, policy=replace(POLICY, quorum=1, grace_seconds=None))
    core = training("a", "b", "c", plan=plan)
    for site in ("a", "b", "c"):
        measured(site, core)
    contribute(core, "b", now=1.0)
    (close,) = core.tick(3.9)
    assert isinstance(close, CloseRound)
    publish(core, close)
    for site in ("a", "b", "c"):
        measured(site, core, now=now)
    assert contribute(core, "a", base=1, now=now) == []
    assert core.next_wakeup() == until


def test_a_round_does_not_wait_for_more_of_who_is_in_it() -> None:
    """a is fast enough to contribute twice while b could wait, and c comes too late."""
    plan = replace(PLAN, steps=16, equal_time=False, policy=replace(POLICY, quorum=1, grace_seconds=None))
    core = training("a", "b", "c", plan=plan)
    measured("b", core)
    measured("c", core)
    core.heartbeat("a", "a", Report("training", step_seconds=0.1, overlap_seconds=0.0, sync_seconds=2.0), 1.0)
    contribute(core, "c", now=1.0)
    (close,) = core.tick(3.9)
    publish(core, close)
    assert contribute(core, "b", base=1, now=4.0) == []
    (close,) = contribute(core, "a", base=1, now=4.5)
    assert isinstance(close, CloseRound)
    assert [c.site for c in close.contributions] == ["a", "b"]


def test_what_a_site_can_spare_is_no_more_than_a_cycle_whatever_it_says() -> None:
    plan = replace(PLAN, steps=16, equal_time=True, policy=replace(POLICY, quorum=1, grace_seconds=None))
    core = training("a", "b", plan=plan)
    measured("b", core)
    measured("a", core, overlap=1e18)
    assert contribute(core, "a", now=1.0) == []
    assert core.next_wakeup() == 1.0 + 0.5 * SPARED * 6.0


def test_a_round_does_not_wait_for_a_site_that_has_not_measured_anything() -> None:
    core = training("a", "b", "c", plan=replace(PLAN, policy=replace(POLICY, quorum=1, grace_seconds=None)))
    measured("a", core)
    assert contribute(core, "b", now=1.0) != []


# ---- the end


def test_a_run_finishes_when_every_fragment_has_merged_the_budget() -> None:
    core = training("a", plan=replace(PLAN, tokens=20))
    for base in (0, 1):
        for fragment in (0, 1):
            assert not core.finished
            (close,) = contribute(core, "a", fragment, base)
            follow_up = publish(core, close)
    assert follow_up == [FinishRun()]
    assert core.finished
    assert core.tokens == 20
    assert core.tick(3.0) == []


def test_tokens_of_a_run_are_the_mean_over_its_fragments() -> None:
    core = training("a")
    core.fragments[0].tokens, core.fragments[1].tokens = 100, 50
    assert core.tokens == 75


# ---- pace and shards


def paced(*seconds: float, plan: Plan = PLAN) -> list[float | None]:
    names = [f"s{i}" for i in range(len(seconds))]
    core = training(*names, plan=plan)
    for name, step in zip(names, seconds, strict=True):
        core.heartbeat(name, name, Report("training", step_seconds=step), 1.0)
    return [core.pacer.pace(name) for name in names]


def test_a_pace_is_in_proportion_to_measured_speed() -> None:
    assert paced(0.1, 0.2, 0.5) == [50.0, 25.0, 10.0]


def test_a_pace_is_at_least_one_step() -> None:
    assert paced(0.2, 12.0) == [50.0, 1.0]


def test_a_site_that_was_not_heard_of_since_a_restart_leaves_every_pace_as_it_was() -> None:
    """The first to report is not the fastest."""
    core = RunCore(PLAN)
    core.restore([(0, 0)] * 2, [], ["a", "b"], [("a", "a"), ("b", "b")], started=True, evaluated=-1, now=0.0)
    core.heartbeat("a", "a", Report("training", step_seconds=1.0), 1.0)
    assert core.pacer.pace("a") is None
    core.heartbeat("b", "b", Report("training", step_seconds=0.5), 1.0)
    assert (core.pacer.pace("a"), core.pacer.pace("b")) == (25.0, 50.0)


def test_a_site_that_reports_no_speed_takes_h_steps_and_is_no_measure_for_the_others() -> None:
    assert paced(0.1, 0.0, 0.2) == [50.0, 50.0, 25.0]


def test_equal_steps_ignores_speed() -> None:
    assert paced(0.1, 0.5, plan=replace(PLAN, equal_time=False)) == [50.0, 50.0]


def test_shard_ranks_do_not_depend_on_who_joined_first() -> None:
    for order in permutations(["asia", "eu", "us"]):
        core = training(*order)
        assert [core.shard(site) for site in ("asia", "eu", "us")] == [(0, 3), (1, 3), (2, 3)]


def test_a_site_that_left_keeps_its_shard() -> None:
    core = training("a", "b")
    core.leave("a", "a", 1.0)
    assert core.shard("b") == (1, 2)


# ---- evaluation


def test_one_site_at_a_time_evaluates() -> None:
    core = training("a", "b")
    assert core.take_evaluation("a", 0.0)
    assert not core.take_evaluation("b", 1.0)
    assert not core.evaluated("b", 0), "it was not asked"
    assert core.evaluated("a", 0)
    assert not core.evaluated("a", 0), "a heartbeat that was sent twice counts once"
    assert not core.take_evaluation("b", 2.0), "nothing new to evaluate"
    core.fragments[0].tokens = core.fragments[1].tokens = 50  # a twentieth of the budget
    assert core.take_evaluation("b", 3.0)
    assert not core.evaluated("b", 10**15), "there are no such weights"
    assert core.take_evaluation("a", 4.0), "and the next one may try at once"


def test_a_lost_evaluator_gives_way() -> None:
    core = training("a", "b")
    assert core.take_evaluation("a", 0.0)
    assert not core.take_evaluation("b", EVALUATION_LEASE_SECONDS - 1)
    assert core.take_evaluation("b", EVALUATION_LEASE_SECONDS), "its lease is over"
    core.leave("b", "b", EVALUATION_LEASE_SECONDS)
    assert core.take_evaluation("a", EVALUATION_LEASE_SECONDS), "or it has left"


def test_an_evaluation_that_took_longer_than_its_lease_counts_unless_a_newer_one_came_first() -> None:
    core = training("a", "b")
    assert core.take_evaluation("a", 0.0)
    assert core.take_evaluation("b", EVALUATION_LEASE_SECONDS)
    assert core.evaluated("a", 0)
    assert not core.evaluated("b", 0), "no news"


def test_at_the_end_the_evaluator_is_told_again() -> None:
    """An order that crosses the end of a site's training is never read; the site asks once more before it leaves."""
    core = training("a", "b", plan=replace(PLAN, fragments=1))
    assert core.take_evaluation("a", 0.0)
    assert not core.take_evaluation("a", 1.0), "it is at it"
    assert core.published(0, 1, 1000, 1.0) == [FinishRun()]
    assert not core.take_evaluation("b", 2.0)
    assert core.take_evaluation("a", 2.0)


def test_the_last_weights_are_evaluated_however_few_tokens_they_add() -> None:
    core = training("a", plan=replace(PLAN, fragments=1))
    core.fragments[0].tokens = 999
    assert core.take_evaluation("a", 0.0)
    assert core.evaluated("a", 999)
    assert not core.take_evaluation("a", 0.0)
    assert core.published(0, 1, 1, 1.0) == [FinishRun()]
    assert core.take_evaluation("a", 2.0)


def test_only_a_site_that_trains_and_is_willing_evaluates() -> None:
    core = training("a", "b")
    core.join("late", "late", 1.0)
    assert not core.take_evaluation("late", 1.0), "its orders at joining are not read before it trains"
    core.heartbeat("a", "a", replace(TRAINING, evaluates=False), 1.0)
    assert not core.take_evaluation("a", 1.0)
    assert core.take_evaluation("b", 1.0)


def test_nobody_evaluates_before_the_start() -> None:
    core = RunCore(PLAN)
    core.join("a", "a", 0.0)
    assert not core.take_evaluation("a", 0.0)


# ---- restore


def restored(
    accepted: list[tuple[Contribution, bool]],
    active: list[tuple[str, str]],
    versions: tuple[tuple[int, int], tuple[int, int]] = ((3, 30), (2, 20)),
    plan: Plan = PLAN,
) -> tuple[RunCore, list[Decision]]:
    core = RunCore(plan)
    roster = [site for site, _ in active] + ["gone"]
    return core, core.restore(versions, accepted, roster, active, started=True, evaluated=10, now=100.0)


def test_a_restored_round_is_open_again_and_the_first_to_return_does_not_pass_for_all() -> None:
    core, decisions = restored([(contribution("a", base=3), False)], [("a", "a"), ("b", "b")])
    assert decisions == []
    assert core.heartbeat("a", "a", TRAINING, 101.0) == []
    assert core.offer("a", "a", 0, 3, "a-0-3") == 4, "it is still in the open round"
    (close,) = contribute(core, "b", 0, 3, now=110.0)
    assert isinstance(close, CloseRound)
    assert (close.version, [c.site for c in close.contributions]) == (4, ["a", "b"])


def test_a_site_that_does_not_come_back_is_waited_for_one_lease() -> None:
    core, _ = restored([(contribution("a", base=3), False)], [("a", "a"), ("b", "b")])
    core.heartbeat("a", "a", TRAINING, 110.0)
    assert core.tick(129.9) == []
    gone, close = core.tick(130.0)
    assert gone == SiteActive("b", False, expired=True)
    assert isinstance(close, CloseRound)


def test_a_round_that_was_complete_closes_at_once_after_a_restart() -> None:
    _, (close,) = restored([(contribution("a", base=3), False)], [("a", "a")])
    assert isinstance(close, CloseRound)
    assert close.version == 4


def test_merged_contributions_are_remembered_and_not_merged_again() -> None:
    core, decisions = restored([(contribution("a", base=2), True)], [("a", "a")])
    assert decisions == []
    assert core.offer("a", "a", 0, 2, "a-0-2") == 3
    assert refused(core, "a", 0, 2, id_="other") is Code.ALREADY_CONTRIBUTED
    assert core.contributed("a", 0) == 2
    assert core.contributed("a", 1) == -1


def test_a_restored_run_keeps_its_roster_start_and_evaluations() -> None:
    core, _ = restored([], [("a", "a")])
    assert core.started
    assert core.shard("a") == (0, 2)
    assert not core.take_evaluation("a", 100.0), "25 merged tokens are less than a twentieth past the last, at 10"


def test_a_finished_run_is_restored_as_finished() -> None:
    core, _ = restored([], [("a", "a")], ((3, 1000), (2, 1000)))
    assert core.finished
    core, _ = restored([], [("a", "a")], ((3, 1000), (2, 999)))
    assert not core.finished


@pytest.mark.parametrize("quorum", [1, 2])
def test_restored_rounds_under_a_quorum_close_only_with_k(quorum: int) -> None:
    plan = replace(PLAN, policy=replace(POLICY, quorum=quorum))
    _, decisions = restored([(contribution("a", base=3), False)], [("a", "a"), ("b", "b")], plan=plan)
    assert len(decisions) == (1 if quorum == 1 else 0)


# ---- the end of a run


def test_what_is_accepted_while_the_last_merge_runs_is_merged_as_well() -> None:
    """It was acknowledged, so it must not be lost, and its site waits for the version that will hold it."""
    core = training("a", "b", plan=replace(PLAN, fragments=1, policy=replace(PLAN.policy, quorum=1), tokens=5))
    late = Contribution("late", "b", 0, 0, 10, 1)
    # Offered before the round closed, accepted after.
    assert core.offer("b", "b", 0, 0, "late") is None
    (close,) = contribute(
        core,
        "a",
        0,
    )
    assert isinstance(close, CloseRound)
    assert isinstance(core.offer("b", "b", 0, 0, "later"), Refusal), "no more are let in"
    version, decisions = core.accept(late, 1.0)
    assert (version, decisions) == (2, [])
    (second,) = core.published(0, 1, 20, 2.0)
    assert isinstance(second, CloseRound)
    assert [c.id for c in second.contributions] == ["late"]
    assert not core.finished
    assert core.published(0, 2, 10, 3.0) == [FinishRun()]


def test_a_site_that_never_got_ready_has_no_part_of_the_data() -> None:
    core = training("a", "b")
    core.join("typo", "typo", 1.0)
    assert [core.shard(site) for site in ("a", "b")] == [(0, 2), (1, 2)]


# ---- sites that are out of step


def test_a_round_that_was_opened_first_waits_for_the_site_that_contributed_to_a_later_one() -> None:
    core = training("a", "b")
    contribute(core, "a", 0, now=1.0)
    assert core.awaited("a") == core.awaited("b") == [], "b is on its way, and waits for nothing"
    contribute(core, "b", 1, now=2.0)
    assert core.awaited("b") == [(0, 1)]
    assert core.awaited("a") == [], "a waits for b, and never both for each other"
    (close,) = contribute(core, "b", 0, now=3.0)
    assert core.awaited("b") == []
    publish(core, close)
    assert core.awaited("a") == []


def test_rounds_that_were_opened_at_the_same_time_are_served_in_order_of_fragment() -> None:
    core = training("a", "b")
    contribute(core, "a", 1)
    contribute(core, "b", 0)
    assert (core.awaited("a"), core.awaited("b")) == ([(0, 1)], [])


def test_one_of_several_coordinators_names_every_round_that_a_site_lacks() -> None:
    """It does not see what the site waits for at the others."""
    core = training("a", "b", plan=replace(PLAN, alone=False))
    assert core.awaited("a") == []
    contribute(core, "b", 1, now=1.0)
    contribute(core, "a", 0, now=2.0)
    assert (core.awaited("a"), core.awaited("b")) == ([(1, 1)], [(0, 1)])


# ---- absurd claims


def test_no_site_has_trained_more_since_its_last_contribution_than_a_fast_one_could() -> None:
    core = training("a", "b")
    core.heartbeat("a", "a", replace(TRAINING, step_seconds=0.1), 0.0)
    core.heartbeat("b", "b", replace(TRAINING, step_seconds=1.0), 0.0)
    liar = Contribution("1", "b", 0, 0, 10**9, 10**9)
    assert core.credible(liar, 1.0).steps == 16 * PLAN.steps, "its first one may hold anything"
    core.accept(core.credible(liar, 1.0), 1.0)
    late = replace(liar, id="2", base_version=1)
    assert core.credible(late, 2.0).steps == 3 * 10, "the fast one takes ten steps a second"
    honest = replace(late, steps=20, tokens=200)
    assert core.credible(honest, 3.0) == honest


def test_of_two_neither_is_cut_short_where_nobody_can_tell_which_speed_is_absurd() -> None:
    core = training("a", "liar", plan=quorum_of_one(0.0))
    core.heartbeat("a", "a", replace(TRAINING, step_seconds=0.1), 0.0)
    core.heartbeat("liar", "liar", replace(TRAINING, step_seconds=1e9), 0.0)
    contribute(core, "a", 0)
    honest = Contribution("2", "a", 0, 1, 500, 50)
    assert core.credible(honest, 5.0) == honest
    (close,) = contribute(core, "a", 1)
    assert isinstance(close, CloseRound)
    assert close.share == 1.0, "who brings nothing takes no part of a round"


def test_a_site_knows_how_much_the_run_trains_for_each_of_its_steps() -> None:
    core = training("a", "b", "c")
    assert core.pacer.peers("a") == 3, "nothing is measured yet"
    for site, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0)):
        core.heartbeat(site, site, replace(TRAINING, step_seconds=seconds), 1.0)
    assert (core.pacer.peers("a"), core.pacer.peers("c")) == (1.75, 7.0)
    even = training("a", "b", plan=replace(PLAN, equal_time=False))
    assert even.pacer.peers("a") == 2
    alone = training("a", "b", plan=replace(quorum_of_one(), equal_time=False))
    for site, seconds in (("a", 1.0), ("b", 3.0)):
        alone.heartbeat(site, site, replace(TRAINING, step_seconds=seconds), 1.0)
    assert alone.pacer.peers("b") == pytest.approx(4.0), "where nobody waits the fast one trains on meanwhile"


@pytest.mark.parametrize("absurd", [1e-18, 1e7])
def test_an_absurd_speed_does_not_change_what_the_run_trains_for_a_step_of_the_others(absurd: float) -> None:
    core = training("a", "b", "c", "liar", plan=quorum_of_one())
    for site, seconds in (("a", 1.0), ("b", 1.0), ("c", 2.0), ("liar", absurd)):
        core.heartbeat(site, site, replace(TRAINING, step_seconds=seconds), 1.0)
    assert core.pacer.peers("a") == pytest.approx(2.5 if absurd > 1 else 3.5), "at most one more as fast as the fastest"
    assert 1 <= core.pacer.peers("liar") <= 1e6, "and its orders can be sent"


def test_absurd_speeds_are_named() -> None:
    core = training("a", "b", "c")
    for site, seconds in (("a", 1.0), ("b", 0.5), ("c", 1e-9)):
        core.heartbeat(site, site, replace(TRAINING, step_seconds=seconds), 1.0)
    assert core.pacer.absurd() == ["c"]
    assert (core.pacer.pace("a"), core.pacer.pace("b"), core.pacer.pace("c")) == (25.0, 50.0, 50.0)
    core.heartbeat("c", "c", replace(TRAINING, step_seconds=0.25), 2.0)
    assert core.pacer.absurd() == []
    assert core.pacer.pace("a") == 12.5


def test_of_two_speeds_that_are_too_far_apart_either_may_be_the_absurd_one() -> None:
    core = training("a", "b")
    for site, seconds in (("a", 1.0), ("b", 1e-9)):
        core.heartbeat(site, site, replace(TRAINING, step_seconds=seconds), 1.0)
    assert core.pacer.absurd() == ["a", "b"]
    assert core.pacer.fastest() is None


def test_a_lone_fast_site_is_the_measure_as_far_as_it_can_be_believed() -> None:
    core = training("a", "b", "fast")
    for site, seconds in (("a", 70.0), ("b", 70.0), ("fast", 1.0)):
        core.heartbeat(site, site, replace(TRAINING, step_seconds=seconds), 1.0)
    assert core.pacer.absurd() == ["fast"]
    assert core.pacer.fastest() == pytest.approx(FASTEST / 70.0)


def test_until_speeds_are_known_after_a_restart_nobody_is_told_how_much_the_others_train() -> None:
    core, _ = restored([], [("a", "a"), ("b", "b")])
    core.heartbeat("a", "a", replace(TRAINING, step_seconds=1.0), 101.0)
    assert (core.pacer.pace("a"), core.pacer.peers("a")) == (None, None)
    core.heartbeat("b", "b", replace(TRAINING, step_seconds=1.0), 101.0)
    assert (core.pacer.pace("a"), core.pacer.peers("a")) == (50.0, 2.0)


# ---- a site that is alive and sends nothing


class Silent:
    """Two sites, whose cycles take 50 s and their links 1 s: both report every other second, and only a sends."""

    def __init__(self, quorum: int | None) -> None:
        plan = replace(quorum_of_one(0.0), fragments=1, tokens=10**6, batch_size=1, sequence_tokens=1)
        self.core = training(
            "a", "b", plan=replace(plan, policy=replace(plan.policy, quorum=quorum, max_staleness=None))
        )
        self.now = 0.0

    def report(self, until: float) -> None:
        report = replace(TRAINING, step_seconds=1.0, overlap_seconds=50.0, sync_seconds=1.0)
        while self.now < until:
            self.now += 2.0
            for site in ("a", "b"):
                self.core.heartbeat(site, site, report, self.now)
            self.core.tick(self.now)

    def run(self, cycles: int) -> CloseRound:
        for _ in range(cycles):
            self.report(self.now + 50.0)
            (close,) = contribute(self.core, "a", base=self.core.fragments[0].version, now=self.now)
            publish(self.core, close, self.now)
        assert isinstance(close, CloseRound)
        return close


def test_a_site_that_hangs_is_no_part_of_the_run_until_it_sends_something() -> None:
    run = Silent(quorum=1)
    patience = run.core.members.lease_seconds + STALLED_CYCLES * 51.0
    early = run.run(int(patience // 50))
    assert (run.core.stalled(), early.share, early.sites) == ([], 0.5, 2)
    late = run.run(2)
    assert (run.core.stalled(), late.share, late.sites) == (["b"], 1.0, 1)
    assert run.core.pacer.peers("a") == 1.0
    (back,) = contribute(run.core, "b", base=0, now=run.now)
    assert isinstance(back, CloseRound)
    assert (run.core.stalled(), back.share, back.sites) == ([], 0.5, 2)


def test_parts_of_a_slow_upload_are_a_sign_that_a_site_gets_on() -> None:
    run = Silent(quorum=1)
    for _ in range(20):
        run.core.bytes_arrived("b", run.now)
        run.run(1)
    assert run.core.stalled() == []


def test_who_waits_for_the_others_does_not_hang() -> None:
    run = Silent(quorum=2)
    assert contribute(run.core, "a", now=run.now) == []
    run.report(1000.0)
    assert run.core.stalled() == ["b"], "and not a, whose round cannot close"
    (close,) = contribute(run.core, "b", now=run.now)
    publish(run.core, close, run.now)
    run.report(1060.0)
    assert run.core.stalled() == []


def test_a_full_quorum_counts_with_everyone() -> None:
    run = Silent(quorum=None)
    run.report(1000.0)
    assert run.core.stalled() == []


def test_a_time_to_spare_that_is_far_beyond_a_cycle_is_named_and_bounded() -> None:
    core = training("a", "b", "c", plan=quorum_of_one())
    for site, overlap in (("a", 40.0), ("b", 50.0), ("c", 1e7)):
        core.heartbeat(site, site, replace(TRAINING, step_seconds=1.0, overlap_seconds=overlap, sync_seconds=1.0), 1.0)
    assert core.absurd_reports() == [("c", "overlap")]
    core.heartbeat("c", "c", replace(TRAINING, step_seconds=1.0, overlap_seconds=50.0), 2.0)
    assert core.absurd_reports() == []


# ---- what a round is worth, and who may still join it


def quorum_of_one(grace: float = 10.0, *, follow: bool = False) -> Plan:
    return replace(PLAN, policy=replace(POLICY, quorum=1, grace_seconds=grace), follow=follow)


def test_a_round_is_worth_its_part_of_what_all_sites_bring() -> None:
    core = training("a", "b", plan=replace(quorum_of_one(0.0), steps=5))
    (first,) = contribute(core, "a", 0)
    assert isinstance(first, CloseRound)
    assert (first.share, first.sites) == (0.5, 2), "b is taken to train as a does until it has shown more"
    core.heartbeat("a", "a", replace(TRAINING, step_seconds=1.0), 1.0)
    core.heartbeat("b", "b", replace(TRAINING, step_seconds=3.0), 1.0)
    (second,) = contribute(core, "a", 1)
    assert isinstance(second, CloseRound)
    assert second.share == pytest.approx(0.75), "b trains a third as fast"


def test_a_round_that_is_about_to_close_can_be_followed() -> None:
    core = training("a", "b", plan=quorum_of_one(follow=True))
    assert core.closing("b") == []
    assert contribute(core, "a", 0) == []
    assert (core.closing("a"), core.closing("b")) == ([], [(0, 1)])
    assert training("a", "b", plan=quorum_of_one()).closing("b") == []


def test_who_does_not_evaluate_is_not_asked_at_the_start_either() -> None:
    core = RunCore(replace(PLAN, min_sites=2))
    for site, evaluates in (("a", False), ("b", True)):
        core.join(site, site, 0.0)
        core.heartbeat(site, site, Report("ready", evaluates=evaluates), 0.0)
    assert core.started
    assert [core.take_evaluation(site, 1.0) for site in ("a", "b")] == [False, True]


@pytest.mark.parametrize("seconds", [1e-310, 1e308])
def test_a_speed_is_a_finite_number(seconds: float) -> None:
    core = training("a", "b")
    core.heartbeat("a", "a", replace(TRAINING, step_seconds=seconds), 1.0)
    assert 0 < core.pacer.speeds()["a"] < float("inf")
    contribute(core, "a", now=1.0)
    core.credible(contribution("a", 0, 1), 2.0)
