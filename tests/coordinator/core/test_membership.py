"""Leases and sessions, in virtual time."""

from __future__ import annotations

from coordinator.core.membership import LEASE_SECONDS, Membership, Report


def members(*sites: str, at: float = 0.0) -> Membership:
    membership = Membership(lease_seconds=30.0)
    for site in sites:
        membership.join(site, f"{site}-1", at)
    return membership


def test_a_lease_runs_out_exactly_at_its_end_and_not_before() -> None:
    membership = members("eu")
    assert membership.expire(29.999) == []
    assert membership.expire(30.0) == ["eu"]
    assert membership.live == {}
    assert membership.expire(31.0) == [], "a site is lost once"


def test_a_sign_of_life_renews_the_lease_from_that_moment() -> None:
    membership = members("eu")
    membership.renew("eu", 20.0)
    assert membership.expire(49.9) == []
    assert membership.live["eu"].seen == 20.0
    assert membership.expire(50.0) == ["eu"]


def test_a_sign_of_life_of_a_stranger_makes_no_member() -> None:
    membership = members()
    membership.renew("stranger", 1.0)
    membership.remove("stranger")
    assert membership.live == {}
    assert membership.standing("stranger", "any") == "unknown"


def test_sites_that_run_out_together_are_named_in_order() -> None:
    assert members("us", "asia", "eu").expire(30.0) == ["asia", "eu", "us"]


def test_the_newest_session_of_a_name_wins_and_the_older_is_told() -> None:
    membership = members("eu")
    assert membership.standing("eu", "eu-1") == "member"
    membership.join("eu", "eu-2", 10.0)
    assert membership.standing("eu", "eu-1") == "superseded"
    assert membership.standing("eu", "eu-2") == "member"
    assert membership.live["eu"].lease_until == 40.0
    membership.remove("eu")
    assert membership.standing("eu", "eu-2") == "unknown"


def test_a_new_session_starts_as_preparing_without_the_old_report() -> None:
    membership = members("eu")
    membership.live["eu"].report = Report("training", steps=7)
    membership.join("eu", "eu-2", 1.0)
    assert membership.live["eu"].report == Report("preparing")


def test_sites_in_a_state_come_in_order_of_name() -> None:
    membership = members("us", "asia", "eu")
    for site, state in (("us", "ready"), ("asia", "training"), ("eu", "ready")):
        membership.live[site].report = Report(state)
    assert [member.site for member in membership.in_state("ready")] == ["eu", "us"]
    assert [member.site for member in membership.in_state("ready", "training")] == ["asia", "eu", "us"]
    assert membership.in_state("preparing") == []


def test_the_slowest_download_is_that_of_the_sites_that_are_here_and_train() -> None:
    membership = members("asia", "eu", "us")
    assert membership.slowest_download() is None
    membership.live["eu"].report = Report("training", download_rate=3e6)
    membership.live["us"].report = Report("training")
    assert membership.slowest_download() == 3e6, "who has not said yet is not waited for"
    membership.live["us"].report = Report("training", download_rate=2e6)
    membership.live["asia"].report = Report("ready", download_rate=1e6)
    assert membership.slowest_download() == 2e6
    membership.live["us"].report = Report("training", download_rate=4e6)
    assert membership.slowest_download() == 3e6, "the newest report counts"
    membership.remove("eu")
    assert membership.slowest_download() == 4e6
    membership.expire(30.0)
    assert membership.slowest_download() is None


def test_the_next_expiry_is_that_of_the_most_silent_site() -> None:
    assert members().next_expiry() is None
    membership = members("eu", "us")
    membership.renew("us", 12.0)
    assert membership.next_expiry() == 30.0
    membership.renew("eu", 15.0)
    assert membership.next_expiry() == 42.0


def test_a_lease_outlasts_several_lost_heartbeats() -> None:
    assert Membership().lease_seconds == LEASE_SECONDS == 30.0
