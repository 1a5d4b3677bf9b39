"""The settings of the quality benchmark: each is a run that starts, and rows are kept only while they are what would be
measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality
from benchmarks.quality import NAMED, SETTINGS, Setting, _finished, _write, digest_of, measure, tables_of
from shared.config import RunConfig, parse

TEXT = "".join(f"line {n} of a text that is long enough to be learnt from, {n * n} times.\n" for n in range(4000))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_each_setting_is_a_run_that_is_not_refused(setting: Setting) -> None:
    parse(RunConfig, tables_of(setting, "text.txt", 1_000_000, 0), setting.name)
    assert not setting.double or NAMED[setting.double].tables == setting.tables


@pytest.mark.parametrize("name", ["data-parallel", "decoupled", "delayed-nesterov", "decoupled-one-dies"])
def test_a_setting_trains(tmp_path: Path, name: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    row = measure(name, str(text), 20_000, 0)
    assert row["tokens"] >= 20_000
    assert row["eval_loss"] < row["curve"][0][2]
    assert row["virtual_seconds"] > 0
    assert json.loads(json.dumps(row)) == row


def test_rows_are_kept_until_their_setting_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, setting = tmp_path / "rows.json", NAMED["decoupled"]
    row: dict[str, Any] = {"setting": setting.name, "seed": 1, "budget": 5000, "config": digest_of(setting, 5000, 1)}
    _write(file, 1.0, [row])
    assert _finished(file) == [row]
    monkeypatch.setitem(quality.NAMED, setting.name, replace(setting, tables={"outer": {"lr": 0.3}}))
    assert _finished(file) == []
