"""What `benchmarks.gpu` finds amiss with its rows, and its page."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_report import FIGURES, page, problems

RESULTS = Path(__file__).parents[2] / "docs" / "results"
DOCUMENT: dict[str, Any] = json.loads((RESULTS / "gpu.json").read_text(encoding="utf-8"))


def document(kind: str = "", **changes: Any) -> dict[str, Any]:
    """What was measured last as if on a CPU with one run over sites, with changes to the rows of one kind."""
    changed = copy.deepcopy(DOCUMENT)
    changed["machine"]["device_type"] = "cpu"
    runs = [row for row in changed["rows"] if row["kind"] == "sites"]
    changed["rows"] = [row for row in changed["rows"] if row not in runs[1:]]
    for row in changed["rows"]:
        if row["kind"] == kind:
            row.update(changes)
    return changed


def on(device_type: str, **changes: Any) -> dict[str, Any]:
    changed = document("sites", **changes)
    changed["machine"]["device_type"] = device_type
    return changed


def test_the_page_is_that_of_the_rows_beside_it() -> None:
    assert page(DOCUMENT) == (RESULTS / "gpu.md").read_text(encoding="utf-8")


def test_nothing_is_amiss_with_what_is_published() -> None:
    assert problems(DOCUMENT) == []


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FIGURES.items() for name in names])
@pytest.mark.parametrize("value", [None, math.nan, math.inf, 0, "many"])
def test_a_figure_that_is_none_is_told(kind: str, name: str, value: Any) -> None:
    told = problems(document(kind, **{name: value}))
    assert told
    assert any(name in problem for problem in told)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"finished": False}, "finish"),
        ({"identical": False}, "anchors"),
        ({"repairs": 1}, "anchors"),
        ({"least_contributions": 1}, "contributions"),
        ({"eval_loss": 6.0, "initial_eval_loss": 5.5}, "loss"),
    ],
)
def test_a_run_that_went_wrong_is_told(changes: dict[str, Any], word: str) -> None:
    (told,) = problems(document("sites", **changes))
    assert word in told


@pytest.mark.parametrize("kind", FIGURES)
def test_rows_that_are_missing_are_told(kind: str) -> None:
    rows = document()
    without = {**rows, "rows": [row for row in rows["rows"] if row["kind"] != kind]}
    assert problems(without) == [f"no row of {kind}"]


def test_a_device_that_does_not_count_its_memory_is_no_fault_and_a_slow_site_neither() -> None:
    rows = on("npu", peak_bytes=None, loop_peak_bytes=None, efficiency=0.1)
    assert problems(rows) == []
    assert "| – | – | – |" in page(rows)


@pytest.mark.parametrize(
    ("device_type", "efficiency", "says"),
    [
        ("cpu", 0.99, "**No accelerator has been at hand so far"),
        ("cuda", 0.97, "\nReached: sites train at least 97.0%"),
        ("cuda", 0.96, "\n**Not reached**: sites train at least 96.0%"),
    ],
)
def test_the_page_says_plainly_what_was_reached(device_type: str, efficiency: float, says: str) -> None:
    shown = page(on(device_type, efficiency=efficiency))
    assert says in shown
    assert shown.count("eached") == says.count("eached")


def test_every_row_of_a_table_has_its_cells() -> None:
    lines = page(document()).splitlines()
    tables = "\n".join(line if line.startswith("|") else "" for line in lines).split("\n\n")
    found = [table.strip().splitlines() for table in tables if table.strip()]
    assert len(found) == 4
    for table in found:
        assert len(table) > 2
        assert len({line.count("|") for line in table}) == 1
