from __future__ import annotations

from site_agent.core.budget import Progress


def test_a_new_site_counts_as_many_tokens_as_all_sites_train_at_its_speed() -> None:
    progress = Progress(merged=0, at=0, ratio=3.0)
    assert [progress.estimate(local) for local in (0, 10, 100)] == [0, 30, 300]


def test_a_merged_version_sets_the_count_and_the_ratio() -> None:
    progress = Progress(merged=0, at=0, ratio=3.0)
    progress.advance(merged=400, snapshot_at=100, contributed=100)
    assert progress.ratio == 4.0
    assert progress.estimate(100) == 400
    assert progress.estimate(110) == 440  # the ten tokens since the snapshot


def test_a_version_without_this_site_keeps_the_ratio() -> None:
    progress = Progress(merged=400, at=100, ratio=4.0)
    progress.advance(merged=700, snapshot_at=180, contributed=0)
    assert (progress.merged, progress.at, progress.ratio) == (700, 180, 4.0)


def test_a_site_never_counts_less_than_its_own_tokens() -> None:
    progress = Progress(merged=400, at=0, ratio=4.0)
    progress.advance(merged=450, snapshot_at=100, contributed=100)
    assert progress.ratio == 1.0


def test_a_version_that_merged_nothing_keeps_the_ratio() -> None:
    progress = Progress(merged=400, at=0, ratio=4.0)
    progress.advance(merged=400, snapshot_at=50, contributed=50)
    assert progress.ratio == 4.0


def test_the_estimate_never_falls_below_what_is_merged() -> None:
    assert Progress(merged=400, at=100, ratio=4.0).estimate(60) == 400
