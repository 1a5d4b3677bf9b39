"""What is read out of two loss curves."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality_report import loss_at, sooner, tables, write_markdown


def curve(*points: tuple[float, float]) -> list[tuple[float, float, float]]:
    return [(seconds, 0, loss) for seconds, loss in points]


def test_the_same_course_in_half_the_time_is_twice_as_soon_everywhere() -> None:
    slow = curve((0, 5.0), (10, 3.0), (20, 2.0), (40, 1.0))
    fast = [(seconds / 2, tokens, loss) for seconds, tokens, loss in slow]
    assert sooner(fast, slow) == (pytest.approx(2.0), pytest.approx(2.0))


def test_the_least_lead_counts_not_the_mean() -> None:
    slow = curve((0, 5.0), (10, 3.0), (20, 2.0))
    fast = curve((0, 5.0), (1, 3.0), (20, 2.0))
    found = sooner(fast, slow)
    assert found is not None
    assert found[0] == pytest.approx(1.0)
    assert found[1] > 1.2


def test_only_losses_that_both_have_passed_through_are_compared() -> None:
    assert sooner(curve((0, 5.0), (1, 1.0), (2, 0.5)), curve((0, 5.0), (9, 4.0), (20, 3.0))) is None
    assert sooner(curve((0, 5.0)), curve((0, 5.0), (9, 4.0))) is None


def test_a_loss_that_rises_again_has_been_reached_at_its_first_time() -> None:
    slow = curve((0, 5.0), (10, 3.0), (20, 3.5), (30, 2.0))
    assert sooner(slow, slow) == (1.0, 1.0)


def test_the_loss_at_a_time_lies_between_measurements() -> None:
    assert loss_at(curve((0, 5.0), (10, 3.0)), 5.0) == 4.0
    assert loss_at(curve((0, 5.0), (10, 3.0)), 99.0) == 3.0


def test_the_page_holds_a_table_for_each_budget_and_what_is_said_below_it(tmp_path: Path) -> None:
    slow = curve((0, 5.0), (10, 3.0), (20, 2.0))
    fast = [(seconds / 2, tokens, loss) for seconds, tokens, loss in slow]
    rows = [
        {"setting": name, "seed": seed, "budget": budget, "eval_loss": 2.0, "virtual_seconds": 20.0, "curve": course}
        for name, course in (("base", slow), ("ours", fast))
        for seed in range(2)
        for budget in (100, 1000)
    ]
    shown = tables(rows, {"base": "the yardstick", "ours": "what is new"}, "ours", "base", [("ours", "base")])
    write_markdown("Quality", shown, ["all is well"], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page.startswith("# Quality\n\n## held-out loss at 100 tokens")
    assert page.count("| ours ") == 2
    assert "\n|---" in page
    assert page.count("- ours gets to any loss at least 2.00 times as soon as base, in each of 2 seeds") == 2
    assert page.endswith("- all is well\n")
