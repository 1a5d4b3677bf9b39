from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest

from site_agent.core.site import UNDELIVERED, Action, Align, Done, Settings, SiteCore, Snapshot, Step, Wait

Overlap = Literal["auto", "unbounded"] | int
TOKENS = 10
BUDGET = 1_000_000


def site(
    overlap: Overlap,
    fragments: int = 2,
    pace: float = 6.0,
    budget: int = BUDGET,
    merged: int = 0,
    sharded: bool = False,
) -> SiteCore:
    return SiteCore.begin(Settings(overlap, budget, sharded=sharded), [(0, merged)] * fragments, pace, peers=2)


def train(core: SiteCore, steps: int = 1, seconds: float = 1.0) -> None:
    """That many inner steps, each of which the core must ask for."""
    for _ in range(steps):
        assert core.next_action() == Step()
        core.stepped(TOKENS, seconds)


def take(core: SiteCore, now: float = 0.0) -> Snapshot:
    """The snapshot that the core must ask for now."""
    action = core.next_action()
    assert isinstance(action, Snapshot), action
    core.snapshot_taken(action, now)
    return action


def take_up(core: SiteCore) -> Align:
    """The alignment that the core must ask for now."""
    action = core.next_action()
    assert isinstance(action, Align), action
    core.aligned(action.fragment)
    return action


def deliver(core: SiteCore, fragment: int, version: int, tokens: int = 0, now: float = 0.0) -> None:
    """The contribution is accepted, and the version that holds it arrives."""
    core.accepted(fragment, version, now)
    core.arrived(fragment, version, tokens, "align")


# ---- τ


def test_without_overlap_a_site_waits_right_after_its_snapshot() -> None:
    core = site(0)
    train(core, 3)
    assert take(core) == Snapshot(fragment=0, base_version=0, tokens=30, steps=3)
    assert core.next_action() == Wait(0)
    core.accepted(0, 1, now=1.0)
    assert core.next_action() == Wait(0)
    core.arrived(0, 1, 60, "align")
    assert take_up(core) == Align(0, 1, "align")
    train(core, 3)
    assert take(core) == Snapshot(fragment=1, base_version=0, tokens=60, steps=6)
    assert core.next_action() == Wait(1)


def test_a_fixed_overlap_aligns_exactly_that_many_steps_after_the_snapshot_however_early_the_version() -> None:
    core = site(2)
    train(core, 3)
    take(core)
    deliver(core, 0, 1)
    train(core, 2)
    assert take_up(core) == Align(0, 1, "align")
    train(core)
    assert take(core).fragment == 1


def test_a_fixed_overlap_waits_for_a_late_version_and_aligns_on_the_same_step() -> None:
    core = site(2)
    train(core, 3)
    take(core)
    train(core, 2)
    assert core.next_action() == Wait(0)
    assert core.next_action() == Wait(0)
    deliver(core, 0, 1)
    assert take_up(core) == Align(0, 1, "align")
    assert core.steps == 5


def test_unbounded_trains_on_until_the_version_is_here_and_aligns_at_once() -> None:
    core = site("unbounded")
    train(core, 3)
    take(core)
    train(core, 1)
    deliver(core, 0, 1)
    assert take_up(core) == Align(0, 1, "align")
    assert core.steps == 4


def test_unbounded_waits_only_when_the_fragment_is_due_again() -> None:
    core = site("unbounded", fragments=1)
    train(core, 6)
    take(core)
    train(core, 6)
    assert core.next_action() == Wait(0)
    deliver(core, 0, 1)
    take_up(core)
    # it was due all along: its snapshot is taken now, of everything since the last one
    assert take(core) == Snapshot(fragment=0, base_version=1, tokens=60, steps=6)


def test_auto_has_no_bound_until_it_has_measured_a_round_trip() -> None:
    core = site("auto")
    train(core, 3, seconds=0.5)
    take(core, now=100.0)
    train(core, 2, seconds=0.5)
    deliver(core, 0, 1, now=100.25)  # a quarter of a second up: 1.5 steps there and back with the margin
    take_up(core)
    assert core.overlap_seconds == 1.5
    train(core, 1, seconds=0.5)
    take(core, now=102.0)
    train(core, 3, seconds=0.5)
    # three steps after fragment 1's snapshot fragment 0 is due too, but the older snapshot comes first
    assert core.next_action() == Wait(1)


def test_auto_aligns_before_its_bound_when_the_version_is_here() -> None:
    core = site("auto")
    core.tempo.synced(100.0)
    train(core, 3)
    take(core)
    train(core, 1)
    deliver(core, 0, 1)
    assert take_up(core) == Align(0, 1, "align")


def test_a_site_goes_on_without_a_version_for_a_cycle_at_most() -> None:
    assert site("unbounded").overlap_seconds == 0, "nothing is measured"
    for overlap, seconds in (("unbounded", 3.0), (1, 0.5), (20, 3.0)):
        core = site(overlap)
        core.tempo.stepped(0.5)
        assert core.overlap_seconds == seconds, "the fragment is due again after six steps"


# ---- one contribution at a time


@pytest.mark.parametrize("overlap", [5, "auto", "unbounded"])
def test_a_fragment_never_has_two_contributions_on_their_way(overlap: Overlap) -> None:
    core = site(overlap, fragments=1, pace=2.0)
    train(core, 2)
    take(core)
    train(core, 2)
    assert core.next_action() == Wait(0)
    core.accepted(0, 1, now=0.0)
    assert core.next_action() == Wait(0)


def test_the_oldest_snapshot_is_aligned_first() -> None:
    core = site(3, fragments=4, pace=4.0)
    for fragment in range(3):
        train(core)
        assert take(core).fragment == fragment
    train(core)
    # τ = 3: fragment 0 is late now, before fragment 3 can be sent
    for fragment in (2, 1, 0):
        deliver(core, fragment, 1)
    assert take_up(core).fragment == 0
    assert take(core).fragment == 3
    train(core)
    assert take_up(core).fragment == 1


def test_versions_that_arrive_together_are_taken_up_in_the_order_of_their_snapshots() -> None:
    core = site("unbounded", fragments=3, pace=6.0)
    train(core, 2)
    take(core)
    train(core, 2)
    assert take(core).fragment == 1
    deliver(core, 0, 1)
    take_up(core)
    train(core, 2)
    assert take(core).fragment == 2
    deliver(core, 2, 1)
    take_up(core)
    train(core, 2)
    assert take(core).fragment == 0
    core.arrived(2, 5, 0, "overwrite")  # nothing of it is on its way: it comes before all
    deliver(core, 0, 2)
    deliver(core, 1, 1)
    assert [take_up(core).fragment for _ in range(3)] == [2, 1, 0]


def test_fragments_that_are_due_together_go_in_order() -> None:
    core = site("unbounded", fragments=4, pace=2.0)
    train(core)
    assert [take(core).fragment for _ in range(2)] == [0, 1]
    train(core)
    assert [take(core).fragment for _ in range(2)] == [2, 3]


# ---- what was refused, delivered before, or complete


def test_after_a_refusal_the_next_snapshot_carries_all_tokens() -> None:
    core = site(0, fragments=1, pace=3.0)
    train(core, 3)
    assert take(core).tokens == 30
    core.arrived(0, 7, 500, "rebase")
    assert take_up(core) == Align(0, 7, "rebase")
    train(core, 3)
    assert take(core) == Snapshot(fragment=0, base_version=7, tokens=60, steps=6)
    deliver(core, 0, 8)
    take_up(core)
    train(core, 3)
    assert take(core) == Snapshot(fragment=0, base_version=8, tokens=30, steps=3)


def test_a_refusal_keeps_to_a_fixed_overlap_too() -> None:
    core = site(2, fragments=1)
    train(core, 6)
    take(core)
    core.arrived(0, 7, 500, "rebase")
    train(core, 2)
    assert take_up(core) == Align(0, 7, "rebase")


def test_steps_since_the_snapshot_count_for_the_next_contribution() -> None:
    core = site(2, fragments=1, pace=6.0)
    train(core, 6)
    take(core)
    train(core, 2)
    deliver(core, 0, 1)
    take_up(core)
    train(core, 4)
    assert take(core) == Snapshot(fragment=0, base_version=1, tokens=60, steps=6)


def test_an_overwrite_drops_what_was_delivered_before() -> None:
    core = site("unbounded", fragments=1, pace=3.0)
    train(core, 2)
    core.arrived(0, 5, 900, "overwrite")
    assert take_up(core) == Align(0, 5, "overwrite")
    train(core, 1)
    assert take(core) == Snapshot(fragment=0, base_version=5, tokens=10, steps=1)


def test_an_acknowledgement_counts_once() -> None:
    core = site(2, fragments=1)
    train(core, 6)
    take(core)
    core.accepted(0, 1, now=1.0)
    core.accepted(0, 1, now=2.0)
    assert core.fragments[0].counted_tokens == 60
    assert core.tempo.sync_seconds == 1.0


def test_news_of_nothing_on_its_way_changes_nothing() -> None:
    core = site(2)
    core.accepted(0, 1, now=1.0)
    assert core.fragments[0].counted_tokens == 0
    with pytest.raises(ValueError, match="fragment 0 has no version to align with"):
        core.aligned(0)


def finish(core: SiteCore, fragment: int) -> None:
    """The coordinator takes no more contributions to the fragment, and its last version comes."""
    core.arrived(fragment, 9, core.settings.budget, "overwrite")


def test_a_completed_fragment_gets_no_snapshot() -> None:
    core = site(0)
    train(core, 3)
    take(core)
    finish(core, 0)
    take_up(core)
    train(core, 3)
    assert take(core).fragment == 1
    deliver(core, 1, 1)
    take_up(core)
    train(core, 6)
    assert take(core).fragment == 1


def test_the_last_version_of_a_finished_fragment_ends_a_wait() -> None:
    core = site(0)
    train(core, 3)
    take(core)
    assert core.next_action() == Wait(0)
    finish(core, 0)
    assert core.next_action() == Align(0, 9, "overwrite")
    take_up(core)
    train(core, 3)


def test_a_finished_run_ends_a_site_once_nothing_is_on_its_way() -> None:
    """Its own budget may say otherwise: the coordinator's was changed."""
    core = site(0)
    train(core, 3)
    take(core)
    core.run_finished = True
    assert core.next_action() == Wait(0)
    deliver(core, 0, 1)
    take_up(core)
    assert core.next_action() == Done()


def test_a_site_is_done_when_every_fragment_has_merged_the_budget() -> None:
    core = site(0, budget=100)
    train(core, 3)
    take(core)
    deliver(core, 0, 1, tokens=100)
    take_up(core)
    train(core, 3)
    take(core)
    deliver(core, 1, 1, tokens=99)
    take_up(core)
    train(core, 6)
    assert take(core).fragment == 1
    finish(core, 1)
    take_up(core)
    assert core.next_action() == Done()


def test_a_site_that_joins_a_finished_run_is_done_at_once() -> None:
    assert site(2, budget=100, merged=100).next_action() == Done()


def test_a_site_that_joins_late_starts_from_what_is_merged() -> None:
    core = SiteCore.begin(Settings(0, 1000), [(4, 400), (3, 1000)], 6.0, peers=2)
    train(core, 3)
    assert take(core) == Snapshot(fragment=0, base_version=4, tokens=30, steps=3)


# ---- pace and the budget's clock


def test_a_new_pace_holds_from_the_next_cycle() -> None:
    core = site("unbounded", fragments=1, pace=4.0)
    train(core, 2)
    core.pace = 2.0
    due = []
    for _ in range(8):
        action: Action = core.next_action()
        if isinstance(action, Snapshot):
            due.append(core.steps)
            take(core)
            deliver(core, 0, len(due))
            take_up(core)
        train(core)
    assert due == [4, 6, 8]


def test_the_furthest_token_count_never_falls() -> None:
    core = site(0, fragments=1, pace=3.0)
    seen = []
    merged: Callable[[int], int] = lambda round_: 55 * round_  # noqa: E731
    for round_ in range(1, 6):
        train(core, 3)
        seen.append(core.furthest)
        take(core)
        deliver(core, 0, round_, tokens=merged(round_))
        take_up(core)
    assert seen == sorted(seen)
    assert seen[0] == 60  # 30 tokens here, two sites


def test_the_budget_is_counted_from_the_snapshot_that_a_version_holds() -> None:
    core = site(2, fragments=1)
    train(core, 6)
    take(core)
    train(core, 2)
    deliver(core, 0, 1, tokens=180)  # the run merged three times what this site sent
    take_up(core)
    assert core.fragments[0].progress.estimate(core.tokens) == 180 + 3 * 20


# ---- sites that are out of step


def test_a_site_that_waits_contributes_early_to_a_round_that_waits_for_it() -> None:
    core = site(1)
    train(core, 3)
    take(core)
    core.awaited = [(1, 1)]
    train(core)
    assert take(core) == Snapshot(fragment=1, base_version=0, tokens=40, steps=4)
    assert core.next_action() == Wait(0), "and only once"
    deliver(core, 0, 1)
    deliver(core, 1, 1)
    take_up(core)
    train(core)
    assert take_up(core) == Align(1, 1, "align")
    train(core)
    assert take(core) == Snapshot(fragment=1, base_version=1, tokens=20, steps=2), "its own time has come as well"


def test_a_site_that_need_not_wait_keeps_its_schedule() -> None:
    core = site("unbounded")
    train(core, 3)
    take(core)
    core.awaited = [(1, 1)]
    train(core, 3)
    assert take(core) == Snapshot(fragment=1, base_version=0, tokens=60, steps=6)


def test_a_round_whose_version_is_here_is_over_whatever_older_orders_say() -> None:
    core = site(0)
    core.awaited = [(0, 1), (1, 1)]
    core.fragments[1].version = 1
    train(core, 3)
    take(core)
    assert core.next_action() == Wait(0)


def test_of_several_coordinators_rounds_a_site_serves_those_before_the_one_that_it_waits_for() -> None:
    """By version, then fragment: in whatever order coordinators name them, and as sites in step contribute anyway."""
    core = site(0, sharded=True)
    core.fragments[1].version = 1
    core.awaited = [(1, 2), (0, 1)]
    train(core, 3)
    take(core)
    assert core.next_action() == Wait(0), "(1, 2) comes after (0, 1), which it waits for"
    core = site(0, sharded=True)
    core.awaited = [(1, 1), (0, 1)]
    train(core, 3)
    core.due = [1]  # as at a site that is half a cycle out of step
    assert take(core).fragment == 1
    assert take(core) == Snapshot(fragment=0, base_version=0, tokens=30, steps=3)
    assert core.next_action() == Wait(0)


def test_a_site_follows_a_round_that_is_about_to_close_with_the_steps_that_it_has() -> None:
    core = site("unbounded")
    train(core, 1)
    core.closing = [(1, 1)]
    assert take(core) == Snapshot(fragment=1, base_version=0, tokens=10, steps=1)
    deliver(core, 1, 1)
    take_up(core)
    train(core, 1)
    core.closing = [(1, 1), (0, 3)]
    assert core.next_action() == Step(), "one round is over, and the other is not from the version that it has"


def test_a_fragment_that_has_followed_does_not_wait_when_it_is_due() -> None:
    core = site("unbounded")
    train(core, 2)
    core.closing = [(0, 1)]
    take(core)
    train(core, 1)  # fragment 0 is due, and its version is still to come
    train(core, 3)
    take(core)
    train(core, 2)
    deliver(core, 0, 1)
    take_up(core)
    train(core, 1)
    assert take(core) == Snapshot(fragment=0, base_version=1, tokens=70, steps=7), "all that it trained since"
    train(core, 2)
    assert core.next_action() == Step()
    core.stepped(TOKENS, 1.0)
    assert core.next_action() == Wait(1), "the other one was due, and has waited for a cycle"


def test_a_site_does_not_follow_with_nothing() -> None:
    core = site("unbounded")
    core.closing = [(1, 1)]
    assert core.next_action() == Step()


# ---- the budget as the coordinator reports it


def asynchronous() -> SiteCore:
    return SiteCore.begin(Settings("unbounded", BUDGET, everyone=False), [(0, 0)] * 2, 6.0, peers=2)


def test_where_nobody_waits_the_learning_rate_follows_what_the_coordinator_reports() -> None:
    core = asynchronous()
    core.told(5000, 3.0)
    assert core.furthest == 5000
    train(core, 2)
    assert core.furthest == 5000 + 3 * 20, "and what the run trains meanwhile"
    core.told(5000, 3.0)
    assert core.furthest == 5060, "said again, it takes nothing back"
    core.told(5040, 3.0)
    assert core.furthest == 5040 + 3 * 20, "what was merged meanwhile was not this site's"


def test_what_is_on_its_way_counts_until_a_version_holds_it() -> None:
    core = asynchronous()
    core.told(5000, 3.0)
    train(core, 3)
    take(core)
    core.accepted(0, 1, 0.0)
    assert core.furthest == 5000 + 3 * 30
    core.arrived(0, 1, 90, "align")
    take_up(core)
    core.told(5045, 3.0)
    train(core, 1)
    assert core.furthest == 5045 + 3 * (10 + 40) / 2, "one of two fragments has it"


def test_the_place_in_the_budget_holds_within_a_cycle_and_no_further() -> None:
    core = asynchronous()
    core.told(5000, 3.0)
    train(core, 3)
    take(core)
    deliver(core, 0, 1)
    take_up(core)
    train(core, 1)
    held = core.furthest
    assert held == 5000 + 3 * 30 > 5000 + 3 * (10 + 40) / 2, "merged, and not reported yet"
    core.told(5000, 10**6)
    core.told(5000, 3.0)
    assert core.furthest <= 5000 + 3 * (25 + 60), "an absurd order is not remembered"


def test_the_learning_rate_does_not_run_ahead_with_what_nobody_takes() -> None:
    """Everything is refused for ten cycles: the site trains on, and its work is not part of the run yet."""
    core = asynchronous()
    core.told(5000, 3.0)
    for version in range(1, 21):
        train(core, 3)
        core.arrived(take(core).fragment, version, 0, "rebase")
        take_up(core)
    cycle = 6 * TOKENS
    assert core.furthest == 5000 + 3 * UNDELIVERED * cycle < 5000 + 3 * core.tokens


def test_orders_without_peers_leave_them_as_they_were() -> None:
    core = asynchronous()
    core.told(5000, 3.0)
    core.told(5000, None)
    train(core, 1)
    assert core.furthest == 5000 + 3 * 10


def test_in_a_full_quorum_run_it_follows_the_versions_alone() -> None:
    core = site("unbounded")
    core.told(5000, 3.0)
    assert core.furthest == 0


# ---- outages


def bridging(overlap: Overlap, everyone: bool = False) -> SiteCore:
    """A site whose first contribution is on its way when the coordinator goes out of reach."""
    settings = Settings(overlap, BUDGET, everyone, outage_steps=8)
    core = SiteCore.begin(settings, [(0, 0)], pace=4.0, peers=2)
    train(core, 4)
    take(core)
    core.out_of_touch = range(len(core.fragments))
    return core


@pytest.mark.parametrize("overlap", [0, 2, "auto", "unbounded"])
def test_out_of_touch_a_site_trains_on_up_to_its_bound_and_then_waits(overlap: Overlap) -> None:
    core = bridging(overlap)
    train(core, 8)
    assert core.next_action() == Wait(0)
    # What it trained meanwhile goes with the next contribution, at once.
    core.out_of_touch = ()
    deliver(core, 0, 1)
    assert take_up(core) == Align(0, 1, "align")
    assert take(core) == Snapshot(fragment=0, base_version=1, tokens=8 * TOKENS, steps=8)


def test_with_one_of_several_coordinators_out_of_reach_only_its_fragments_are_not_waited_for() -> None:
    core = SiteCore.begin(Settings(0, BUDGET, everyone=False, outage_steps=8), [(0, 0)] * 2, pace=4.0, peers=2)
    core.out_of_touch = {1}
    train(core, 2)
    assert take(core).fragment == 0
    assert core.next_action() == Wait(0)
    deliver(core, 0, 1)
    take_up(core)
    train(core, 2)
    assert take(core).fragment == 1
    train(core, 2)
    assert take(core).fragment == 0
    assert core.next_action() == Wait(0)


def test_back_in_touch_a_site_waits_where_it_would_have() -> None:
    core = bridging("unbounded")
    train(core, 6)
    core.out_of_touch = ()
    train(core, 2)
    assert core.next_action() == Wait(0)


def test_a_run_that_waits_for_everyone_waits_for_its_coordinator() -> None:
    core = bridging(2, everyone=True)
    train(core, 2)
    assert core.next_action() == Wait(0)


# ---- contributions from before a restart


def test_what_was_contributed_before_a_restart_comes_up_at_its_own_step() -> None:
    """The cycle may be another by now: its pace follows the speeds of the run."""
    core = site("unbounded", fragments=1, pace=3)
    core.recorded = {0: 5}
    train(core, 5)
    action = core.next_action()
    assert isinstance(action, Snapshot)
    core.recorded = {0: 4}
    core.snapshot_taken(Snapshot(0, 0, 50, 5), 0.0)
    deliver(core, 0, 1)
    take_up(core)
    train(core, 4)
    assert core.next_action() == Snapshot(fragment=0, base_version=1, tokens=40, steps=4)


def test_nothing_is_contributed_before_it_is_more_than_what_was() -> None:
    """Two sites that wait for each other make one send what it had sent before it has trained all of it again."""
    core = site(1, fragments=1, pace=3)
    core.snapshot_taken(Snapshot(0, 0, 70, 7), 0.0)
    deliver(core, 0, 1)
    assert core.next_action() == Step()
    core.stepped(TOKENS, 1.0)
    take_up(core)
    train(core, 6)
    assert core.due == []
    train(core, 2)
    assert core.next_action() == Snapshot(fragment=0, base_version=1, tokens=20, steps=2)
