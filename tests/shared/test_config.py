from __future__ import annotations

import json
import math
import re
import tomllib
from pathlib import Path

import msgpack
import pytest

from shared.config import DevicesTable, RunConfig, SiteConfig, load_run, load_site, parse, received_run
from shared.errors import ConfigError

MINIMAL = """
[run]
name = "shakespeare"
tokens = 5_000_000
[task]
use = "byte-lm"
"""

FULL = """
[run]
name = "shakespeare"
seed = 0
tokens = 5_000_000
init = ""

[task]
use = "byte-lm"
width = 64
paths = ["a.txt", "b.txt"]

[inner]
optimizer = "adamw"
lr = 1e-3
steps = 50
batch_size = 16
schedule = "cosine"
warmup_tokens = 100_000
clip_norm = 1.0
weight_decay = 0.1

[outer]
optimizer = "nesterov"
lr = 0.7
momentum = 0.9
merge = "mean"
correction = "none"

[rounds]
fragments = 4
layout = "balanced"
quorum = "all"
grace_seconds = "auto"
deadline_seconds = 600
max_staleness = 8
weighting = "tokens"
overlap_steps = 2
align = "carry"
pacing = "equal-time"

[wire]
upload = "int4"
publish = "int8"
error_feedback = true
zstd_level = 1
"""

SITE = """
[site]
name = "eu-west"
coordinator = "https://coordinator.example:8470"
token_file = "eu-west.token"
state = "state/eu-west"
ca = ""

[devices]
[data]
paths = ["texts", "/srv/more"]
[task]
use = "mine.py:Mine"
[metrics]
port = 9471
"""


def run_with(text: str, tmp_path: Path) -> RunConfig:
    """MINIMAL with `text` after it; a [run] or [task] key goes under its table."""
    path = tmp_path / "run.toml"
    lines = MINIMAL
    for table in ("run", "task"):
        if text.startswith(f"[{table}]\n"):
            lines, text = lines.replace(f"[{table}]\n", text + "\n"), ""
    path.write_text(lines + text, encoding="utf-8")
    return load_run(path)


def site_with(text: str, tmp_path: Path) -> SiteConfig:
    path = tmp_path / "site.toml"
    path.write_text(text, encoding="utf-8")
    return load_site(path)


def assert_one_sentence(said: str) -> None:
    assert "\n" not in said
    assert "Input should" not in said
    assert "Value error" not in said
    assert len(said) < 300


# ---- what parses


def test_the_whole_run_file_of_the_design_parses(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(FULL, encoding="utf-8")
    config = load_run(path)
    assert config.run.tokens == 5_000_000
    assert config.task.use == "byte-lm"
    assert config.task.options() == {"width": 64, "paths": ["a.txt", "b.txt"]}
    assert config.rounds.deadline_seconds == 600.0
    assert config.wire.upload == "int4"


def test_a_minimal_run_file_gets_the_documented_defaults(tmp_path: Path) -> None:
    """FULL states the design's values; whatever a run leaves out is that, but for the schedule's warm-up (off) and for
    what was measured since (docs/algorithms.md)."""
    stated = tomllib.loads(FULL)
    measured = {
        "outer": {"lr": 1.0, "momentum": 0.5},
        "rounds": {"quorum": 1, "overlap_steps": "auto", "max_staleness": "auto"},
        "wire": {"zstd_level": "auto"},
    }
    for table, keys in measured.items():
        stated[table] |= keys
    stated["inner"]["warmup_tokens"] = 0
    stated["task"] = {"use": "byte-lm"}
    dumped = run_with("", tmp_path).model_dump(mode="json")
    for table, keys in stated.items():
        for key, value in keys.items():
            assert dumped[table][key] == value, f"[{table}] {key}"
    assert dumped["rounds"]["blend"] == 0.5
    assert dumped["run"]["min_sites"] == 1


def test_a_run_file_is_read_as_utf_8(tmp_path: Path) -> None:
    assert run_with('[task]\nmotto = "Θ̂ → τ"', tmp_path).task.options() == {"motto": "Θ̂ → τ"}


@pytest.mark.parametrize(
    "text",
    [
        '[rounds]\noverlap_steps = 0\nalign = "blend"\nblend = 0.25',
        '[rounds]\nquorum = "all"\noverlap_steps = "auto"\nalign = "blend"',
        '[rounds]\noverlap_steps = "unbounded"',
        '[rounds]\nmax_staleness = "auto"',
        "[rounds]\nmax_staleness = 0",
        "[rounds]\noverlap_steps = 49",
        "[rounds]\nquorum = 3\ngrace_seconds = 0",
        "[rounds]\nquorum = 1\ngrace_seconds = 1.5",
        '[outer]\noptimizer = "sgd"',
        '[outer]\noptimizer = "sgd"\nmomentum = 0.0',
        '[outer]\noptimizer = "delayed-nesterov"\nperiod = 4\ndelay_c = 0.25\ncorrection = "heloco"\nmerge = "rda"',
        '[outer]\noptimizer = "adam"\nlr = 1e-3\nbeta2 = 0.9\nepsilon = 1e-6\npartial = "full"',
        '[rounds]\nquorum = 1\npacing = "follow"\nweight_cap = 0\nstaleness_decay = 0.5',
        "[inner]\nwarmup_tokens = 4_999_999",
        '[inner]\nsteps = 1\n[rounds]\noverlap_steps = 0\nalign = "overwrite"',
        "[wire]\nzstd_level = 0",
        "[wire]\nupload = 'fp32'\npublish = 'bf16'",
        "[wire]\nupload = 'topk2'\ntopk = 64\n[outer]\noptimizer = 'sgd'",
        "[wire]\nupload = 'topk2'\nfeedback_decay = 1.0\n[outer]\nmomentum = 0.5",
        "[wire]\nfeedback_decay = 0.9",
        "[wire]\nupload_grid = 1.5\npublish_grid = 0.0",
        "[store]\nkeep_versions = 1",
        "[run]\nmin_sites = 3\n",
    ],
)
def test_possible_settings_are_not_refused(text: str, tmp_path: Path) -> None:
    run_with(text, tmp_path)


# ---- what does not


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[inner]\nstep = 3", '[inner] step: unknown key; did you mean "steps"?'),
        ("[rounds]\noverlap_step = 3", '[rounds] overlap_step: unknown key; did you mean "overlap_steps"?'),
        (
            '[wire]\nupload = "topk2"',
            '[wire] upload = "topk2" is meant for an outer step without momentum (its error feedback is one), '
            'and [outer] momentum is not stated: use [outer] optimizer = "sgd", or state momentum',
        ),
        (
            '[wire]\nupload = "topk2"\nerror_feedback = false\n[outer]\noptimizer = "sgd"',
            '[wire] upload = "topk2" without error_feedback never sends most of what is trained: drop error_feedback = '
            'false, or upload = "int4"',
        ),
        (
            '[wire]\nupload = "e3m0"\nupload_grid = 1.0',
            '[wire] upload_grid has no effect with "e3m0", which has no even grid: drop it, or use "int4"',
        ),
        (
            "[wire]\nupload_grid = 1.0\nerror_feedback = false",
            "[wire] upload_grid above 0 leaves much of what is trained to error_feedback, and that is false: drop it, "
            "or error_feedback = true",
        ),
        (
            "[wire]\npublish_grid = 3.5",
            "[wire] publish_grid: got 3.5 (a number); a number from 0 (the finest) to 3 would do",
        ),
        (
            "[wire]\ntopk = 64",
            '[wire] topk has no effect with upload = "int4": drop it, or upload = "topk2"',
        ),
        (
            "[wire]\nerror_feedback = false\nfeedback_decay = 0.9",
            "[wire] feedback_decay has no effect with error_feedback = false: drop it, or error_feedback = true",
        ),
        (
            "[wire]\nfeedback_decay = 0.0",
            '[wire] feedback_decay: got 0.0 (a number); β: "auto" or a number from 0 to 1 would do',
        ),
        (
            "[wire]\nxyz = 3",
            "[wire] xyz: unknown key; it may have: upload, publish, topk, error_feedback, feedback_decay, upload_grid, "
            "publish_grid, zstd_level",
        ),
        ("[run]\ntokenz = 3", '[run] tokenz: unknown key; did you mean "tokens"?'),
        ("[round]\nquorum = 3", '[round]: unknown table; did you mean "rounds"?'),
        ("[qqq]", "[qqq]: unknown table; it may have: run, task, inner, outer, rounds, wire, store"),
        ("[inner]\nsteps = 2.5", "[inner] steps: got 2.5 (a number); H, a whole number from 1 would do"),
        ("[inner]\nsteps = 0", "[inner] steps: got 0 (a whole number); H, a whole number from 1 would do"),
        ('[inner]\nsteps = "5"', '[inner] steps: got "5" (text); H, a whole number from 1 would do'),
        ("[inner]\nsteps = true", "[inner] steps: got true (a truth value); H, a whole number from 1 would do"),
        ("[inner]\nlr = nan", "[inner] lr: got nan (a number); a number above 0 would do"),
        ("[inner]\nlr = inf", "[inner] lr: got inf (a number); a number above 0 would do"),
        ("[inner]\nlr = 0", "[inner] lr: got 0 (a whole number); a number above 0 would do"),
        ("[inner]\nlr = []", "[inner] lr: got [] (a list); a number above 0 would do"),
        ("[inner]\nlr = {}", "[inner] lr: got {} (a table); a number above 0 would do"),
        (
            '[inner]\nschedule = "linear"',
            '[inner] schedule: got "linear" (text); one of "constant", "cosine", "wsd" would do',
        ),
        (
            '[wire]\nupload = "int2"',
            '[wire] upload: got "int2" (text); one of "fp32", "bf16", "fp16", "int8", "int4", "e3m0", "topk2" would do',
        ),
        (
            "[wire]\nzstd_level = 20",
            '[wire] zstd_level: got 20 (a whole number); "auto", or a whole number from 0 (off) to 19 would do',
        ),
        ("[wire]\nerror_feedback = 1", "[wire] error_feedback: got 1 (a whole number); true or false would do"),
        ("[outer]\nmomentum = 1.0", "[outer] momentum: got 1.0 (a number); a number from 0 to below 1 would do"),
        ('[outer]\nmerge = "median"', '[outer] merge: got "median" (text); one of "mean", "rda" would do'),
        ("[rounds]\nquorum = 0", '[rounds] quorum: got 0 (a whole number); "all" or a whole number from 1 would do'),
        ('[rounds]\nquorum = "most"', '[rounds] quorum: got "most" (text); "all" or a whole number from 1 would do'),
        ("[rounds]\nquorum = 2.0", '[rounds] quorum: got 2.0 (a number); "all" or a whole number from 1 would do'),
        (
            "[rounds]\ngrace_seconds = -1",
            '[rounds] grace_seconds: got -1 (a whole number); "auto" or seconds from 0 would do',
        ),
        (
            "[rounds]\ngrace_seconds = nan",
            '[rounds] grace_seconds: got nan (a number); "auto" or seconds from 0 would do',
        ),
        (
            "[rounds]\nmax_staleness = -1",
            '[rounds] max_staleness: got -1 (a whole number); "auto" or versions, a whole number from 0 would do',
        ),
        (
            "[rounds]\noverlap_steps = -1",
            '[rounds] overlap_steps: got -1 (a whole number); τ: a whole number from 0, "auto" or "unbounded" would do',
        ),
        ("[rounds]\ndeadline_seconds = inf", "[rounds] deadline_seconds: got inf (a number); seconds above 0 would do"),
        (
            '[rounds]\nalign = "blend"',
            '[rounds] align = "blend" mixes by what τ steps changed, and overlap_steps is not stated: '
            "state it (0 is allowed), or use carry",
        ),
        (
            '[rounds]\nalign = "blend"\noverlap_steps = "unbounded"',
            '[rounds] align = "blend" mixes by what τ steps changed, and with overlap_steps = "unbounded" '
            "and quorum = 1 there is no τ: name a number for overlap_steps, or use carry",
        ),
        (
            '[rounds]\nalign = "blend"\noverlap_steps = "auto"',
            '[rounds] align = "blend" mixes by what τ steps changed, and with overlap_steps = "auto" '
            "and quorum = 1 there is no τ: name a number for overlap_steps, or use carry",
        ),
        (
            '[rounds]\nalign = "blend"\noverlap_steps = 0\nblend = 1.0',
            "[rounds] blend: got 1.0 (a number); α, a number from 0 to below 1 would do",
        ),
        (
            '[rounds]\nweighting = "uniform"\nweight_cap = 4.0',
            '[rounds] weight_cap has no effect with weighting = "uniform", under which all weigh the same: drop it, or '
            'weighting = "tokens"',
        ),
        (
            "[rounds]\ngrace_seconds = 20\ndeadline_seconds = 20",
            "[rounds] grace_seconds = 20 does not end before deadline_seconds = 20: make it smaller, or raise "
            "deadline_seconds",
        ),
        (
            "[rounds]\ngrace_seconds = 0\ndeadline_seconds = 20",
            "[rounds] deadline_seconds has no effect with quorum = 1 and grace_seconds = 0, which close a round at its "
            "first contribution: drop it, or allow a grace",
        ),
        (
            "[rounds]\nblend = 0.5",
            '[rounds] blend has no effect with align = "carry": drop it, or align = "blend"',
        ),
        (
            "[rounds]\noverlap_steps = 50",
            "[rounds] overlap_steps = 50 reaches the next snapshot of the same fragment: "
            "at most 49 with [inner] steps = 50",
        ),
        (
            '[outer]\noptimizer = "sgd"\nmomentum = 0.9',
            '[outer] momentum has no effect with optimizer = "sgd": drop it, or optimizer = "nesterov"',
        ),
        (
            '[outer]\noptimizer = "sgd"\ncorrection = "heloco"',
            '[outer] correction = "heloco" corrects against a momentum, and optimizer = "sgd" has none: '
            'use "nesterov", "delayed-nesterov" or "adam", or correction = "none"',
        ),
        (
            "[outer]\nperiod = 4",
            '[outer] period has no effect with optimizer = "nesterov": drop it, or optimizer = "delayed-nesterov"',
        ),
        (
            "[outer]\nbeta2 = 0.9",
            '[outer] beta2 has no effect with optimizer = "nesterov": drop it, or optimizer = "adam"',
        ),
        (
            '[outer]\noptimizer = "delayed-nesterov"\nperiod = 4\ndelay_c = 0.5',
            "[outer] delay_c = 0.5 is more than 1/period: at most 0.25 with period = 4",
        ),
        (
            '[outer]\noptimizer = "delayed-nesterov"\ndelay_c = 0.5',
            "[outer] delay_c is bounded by 1/period, and period is not stated: name a number for period",
        ),
        (
            '[outer]\noptimizer = "delayed-nesterov"\npartial = "share"',
            '[outer] partial has no effect with optimizer = "delayed-nesterov", which has its own way with rounds of '
            'few sites: drop it, or optimizer = "nesterov"',
        ),
        (
            '[rounds]\nquorum = "all"\npacing = "follow"',
            '[rounds] pacing = "follow" joins rounds that have their quorum and are about to close, and with '
            'quorum = "all" none is: name a number for quorum, or use "equal-time"',
        ),
        (
            '[rounds]\nquorum = "all"\ngrace_seconds = 5',
            '[rounds] grace_seconds has no effect with quorum = "all", which waits for everyone until '
            "deadline_seconds: drop it, or name a number for quorum",
        ),
        (
            '[rounds]\nquorum = 1\npacing = "follow"\ngrace_seconds = 0',
            '[rounds] pacing = "follow" joins rounds within their grace, and grace_seconds = 0 leaves none: '
            'use grace_seconds = "auto" or a number above 0, or pacing = "equal-time"',
        ),
        (
            '[rounds]\nquorum = 1\npacing = "follow"\noverlap_steps = 0',
            '[rounds] pacing = "follow" joins rounds within their grace, and grace_seconds = "auto" is none with '
            "overlap_steps = 0: name seconds for grace_seconds",
        ),
        (
            '[outer]\npartial = "full"\n[rounds]\nquorum = 1\ngrace_seconds = 0\nstaleness_decay = 0.5',
            '[rounds] staleness_decay has no effect on rounds of one contribution with partial = "full": '
            'drop it, or allow a grace, or partial = "share"',
        ),
        (
            '[outer]\noptimizer = "delayed-nesterov"\n[rounds]\nquorum = 1\ngrace_seconds = 0\nstaleness_decay = 0.5',
            "[rounds] staleness_decay has no effect on rounds of one contribution with optimizer = "
            '"delayed-nesterov": drop it, or allow a grace, or optimizer = "nesterov"',
        ),
        (
            '[outer]\noptimizer = "adam"',
            '[outer] lr is not stated, and the default is for pseudo-gradients as they are; optimizer = "adam" '
            "makes each element's step about lr long: state it, 1e-3 for a start",
        ),
        (
            '[outer]\ncorrection = "heloco"\nmomentum = 0',
            '[outer] correction = "heloco" corrects against the momentum, and momentum = 0 leaves only the last '
            'round\'s: state a momentum above 0, or correction = "none"',
        ),
        (
            '[outer]\noptimizer = "adam"\nlr = 1e-3\nepsilon = 1e-40',
            "[outer] epsilon: got 1e-40 (a number); a number from 1e-30 to 1 would do",
        ),
        (
            "[rounds]\nweight_cap = 0.5",
            "[rounds] weight_cap: got 0.5 (a number); times the round's median weight, a number from 1, or 0: no cap "
            "would do",
        ),
        (
            "[inner]\nwarmup_tokens = 5_000_000",
            "[inner] warmup_tokens = 5000000 does not end within [run] tokens = 5000000: make it smaller",
        ),
    ],
)
def test_a_bad_key_is_told_in_one_sentence_with_what_would_do(text: str, said: str | None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_with(text, tmp_path)
    assert_one_sentence(str(caught.value))
    if said is not None:
        assert str(caught.value) == f"run.toml: {said}"


def test_a_bound_that_refuses_sites_which_are_in_time_is_refused(tmp_path: Path) -> None:
    """Seven sites by twos: a cycle of all has four versions, and what was there before the first is three old."""
    path = tmp_path / "run.toml"

    def load(bound: int) -> None:
        tables = f"[rounds]\nquorum = 2\nmax_staleness = {bound}"
        path.write_text(MINIMAL.replace("[task]", "min_sites = 7\n[task]") + tables, encoding="utf-8")
        load_run(path)

    load(3)
    with pytest.raises(ConfigError) as caught:
        load(2)
    assert str(caught.value) == (
        "run.toml: [rounds] max_staleness = 2 refuses sites that are in time: a cycle of [run] min_sites = 7 has up to "
        '4 versions with quorum = 2; use "auto" or at least 3'
    )


@pytest.mark.parametrize(
    "text",
    [
        "[rounds]\noverlap_steps = 10_000_000",
        "[rounds]\nquorum = 10_000_000",
        "[rounds]\nmax_staleness = 10_000_000",
        "[outer]\noptimizer = 'delayed-nesterov'\nperiod = 10_000_000",
        "[outer]\nlr = 1e300",
        "[inner]\nlr = 1e300",
        "[inner]\nclip_norm = 1e300",
        "[inner]\nweight_decay = 1e300",
        "[inner]\nwarmup_tokens = 10_000_000_000_000_000",
        "[store]\nkeep_versions = 10_000_000",
    ],
)
def test_numbers_beyond_all_measure_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_with(text, tmp_path)
    assert_one_sentence(str(caught.value))
    assert " got " in str(caught.value)


def test_a_quorum_that_the_sites_cannot_meet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL.replace("[task]", "min_sites = 2\n[task]") + "[rounds]\nquorum = 3", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert str(caught.value) == (
        "run.toml: [rounds] quorum = 3 cannot be met by [run] min_sites = 2: raise min_sites or lower quorum"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "run.toml: [run]: missing; a table is needed; run.toml: [task]: missing; a table is needed"),
        (
            '[run]\nname = "x"\n[task]\nuse = "y"',
            "run.toml: [run] tokens: missing; the token budget, a whole number from 1 is needed",
        ),
        (
            '[run]\nname = "x"\ntokens = 1\n[task]',
            'run.toml: [task] use: missing; a task name such as "byte-lm", or "file.py:Class" is needed',
        ),
        (
            '[run]\nname = "Big Name"\ntokens = 1\n[task]\nuse = "y"',
            "run.toml: [run] name: got \"Big Name\" (text); letters a-z, digits, '.', '_' and '-', at most 64 would do",
        ),
        ('run = 3\n[task]\nuse = "y"', "run.toml: [run]: got 3 (a whole number); a table would do"),
        ('[[run]]\nname = "x"\n[task]\nuse = "y"', "run.toml: [run]: got [{'name': 'x'}] (a list); a table would do"),
    ],
)
def test_what_is_missing_is_told_with_what_is_needed(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_run(path)
    assert str(caught.value) == said


def test_every_wrong_key_is_told_not_only_the_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_with("[inner]\nlr = -1\nsteps = 0", tmp_path)
    assert str(caught.value).count("run.toml: [inner]") == 2


def test_a_date_is_not_called_a_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_with("[inner]\nsteps = 1979-05-27", tmp_path)
    assert "(a table)" not in str(caught.value)


def test_a_long_value_is_cut_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_with(f'[inner]\nsteps = "{"x" * 5000}"', tmp_path)
    assert_one_sentence(str(caught.value))


def test_a_file_that_cannot_be_used_is_told_by_its_path(tmp_path: Path) -> None:
    missing, binary, broken = tmp_path / "missing.toml", tmp_path / "binary.toml", tmp_path / "broken.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    broken.write_text("[run\n", encoding="utf-8")
    for load in (load_run, load_site):
        for path, said in [
            (missing, "no such file; name a TOML file"),
            (tmp_path, "cannot be read: "),
            (binary, "cannot be read: "),
            (broken, "is not TOML: "),
        ]:
            with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}: {said}"):
                load(path)


# ---- a run config travels to the sites


@pytest.mark.parametrize(
    "text",
    [
        "",
        '[rounds]\noverlap_steps = "auto"',
        '[rounds]\noverlap_steps = 4\nalign = "blend"',
        '[outer]\noptimizer = "sgd"',
        "[inner]\nsteps = 1",
        '[task]\nwidth = 64\npaths = ["a"]\nrate = 0.5',
    ],
)
def test_a_run_config_survives_the_way_to_a_site(text: str, tmp_path: Path) -> None:
    config = run_with(text, tmp_path)
    dumped = config.model_dump(mode="json")
    for sent in (dumped, json.loads(json.dumps(dumped)), msgpack.unpackb(msgpack.packb(dumped))):
        received = received_run(sent)
        assert received == config
        assert received.model_dump(mode="json") == dumped


def test_a_received_run_config_is_checked_like_a_file(tmp_path: Path) -> None:
    dumped = run_with("", tmp_path).model_dump(mode="json")
    dumped["inner"]["lr"] = math.nan
    with pytest.raises(ConfigError, match=r"^the coordinator's run config: \[inner\] lr: got nan"):
        received_run(dumped)
    dumped["inner"] = {"lr": 1e-3, "newer_key": 1}
    with pytest.raises(ConfigError, match=r"\[inner\] newer_key: unknown key"):
        received_run(dumped)


# ---- site.toml


def test_the_whole_site_file_of_the_design_parses(tmp_path: Path) -> None:
    config = site_with(SITE, tmp_path)
    assert config.site.name == "eu-west"
    assert config.task is not None
    assert config.task.use == "mine.py:Mine"
    assert config.metrics.port == 9471


def test_a_minimal_site_file_gets_defaults(tmp_path: Path) -> None:
    config = site_with('[site]\nname = "a"\ncoordinator = "http://127.0.0.1:8470"', tmp_path)
    assert config.task is None
    assert config.data == {}
    assert config.site.token_file == ""
    assert config.devices.device == ""
    assert config.devices.throttle == 1.0
    assert config.metrics.port == 9471
    assert config.metrics.host == "127.0.0.1"


def test_paths_of_a_site_file_count_from_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sites").mkdir()
    (tmp_path / "elsewhere").mkdir()
    config = site_with(SITE, tmp_path / "sites")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert config.path(config.site.token_file) == tmp_path / "sites" / "eu-west.token"
    assert config.path("../up") == tmp_path / "up"
    assert config.path("/absolute") == Path("/absolute")


def test_a_path_from_a_relative_site_file_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site_with(SITE, tmp_path)
    monkeypatch.chdir(tmp_path)
    config = load_site(Path("site.toml"))
    monkeypatch.chdir("/")
    assert config.path("eu-west.token") == tmp_path / "eu-west.token"


def test_home_is_expanded_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert site_with(SITE, tmp_path).path("~/token") == tmp_path / "home" / "token"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('ca = ""', 'client_cert = "c.pem"'), "[site] client_cert and client_key go together: name both, or neither"),
        (('ca = ""', 'client_key = "k.pem"'), "[site] client_cert and client_key go together: name both, or neither"),
        (('ca = ""', 'tokn_file = ""'), '[site] tokn_file: unknown key; did you mean "token_file"?'),
        (
            ("https://coordinator.example:8470", "coordinator.example:8470"),
            '[site] coordinator: got "coordinator.example:8470" (text); '
            "the coordinator's URL, https://host:port would do",
        ),
        (
            ("https://coordinator.example:8470", "https://h/path"),
            '[site] coordinator: got "https://h/path" (text); the coordinator\'s URL, https://host:port would do',
        ),
        (
            ('"eu-west"\n', '"EU West"\n'),
            "[site] name: got \"EU West\" (text); letters a-z, digits, '.', '_' and '-', at most 64 would do",
        ),
        (("port = 9471", "port = 70000"), "[metrics] port: got 70000 (a whole number); a port; 0: off would do"),
        (("[devices]", "[devices]\nthrottle = 0"), None),
        (("[devices]", "[device]"), '[device]: unknown table; did you mean "devices"?'),
        (('use = "mine.py:Mine"', "uze = 3"), None),
        (
            ("[metrics]", '[base]\nx = "/"\n[metrics]'),
            "[base]: unknown table; it may have: site, devices, data, task, metrics",
        ),
        (('[task]\nuse = "mine.py:Mine"', ""), ""),
    ],
)
def test_a_bad_site_key_is_told_in_one_sentence(change: tuple[str, str], said: str | None, tmp_path: Path) -> None:
    text = SITE.replace(*change)
    assert text != SITE
    if said == "":
        site_with(text, tmp_path)
        return
    with pytest.raises(ConfigError) as caught:
        site_with(text, tmp_path)
    assert_one_sentence(str(caught.value))
    if said is not None:
        assert str(caught.value) == f"site.toml: {said}"


def devices_with(line: str) -> DevicesTable:
    site = {"name": "a", "coordinator": "http://127.0.0.1:8470"}
    return parse(SiteConfig, {"site": site, "devices": tomllib.loads(line)}, "site.toml").devices


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ('device = ["cpu", "cuda:1"]', "device", ["cpu", "cuda:1"]),
        ('group = "fast"', "group", "fast"),
        ('group = ["910b", "", "h-20"]', "group", ["910b", "", "h-20"]),
        ("throttle = [1.0, 0.25]", "throttle", [1.0, 0.25]),
        ('precision = "fp16"', "precision", "fp16"),
        ("micro_batch = 4", "micro_batch", 4),
        ("compile = true", "compile", True),
        ("recompute = true", "recompute", True),
        ('parallel = "fsdp"', "parallel", "fsdp"),
        ('mixed = "learners"', "mixed", "learners"),
    ],
)
def test_what_devices_do_can_be_said(line: str, key: str, value: object) -> None:
    assert getattr(devices_with(line), key) == value
    assert getattr(devices_with(""), key) != value, "and is not so by itself"


DEVICE = '"cpu", "cuda", "cuda:0", or a list of them; empty: every accelerator found, else the CPU would do'
THROTTLE = "a share of full speed to train at, above 0 to 1, or a list of such numbers would do"
GROUP = "a name of letters a-z, digits and '-', at most 32, that sets devices apart, or a list of names would do"
PRECISION = 'one of "auto", "fp32", "bf16", "fp16" would do'
MICRO_BATCH = "a number of sequences, the most of a pass on a device; 0: as many as fit would do"
TRUTH = "true or false would do"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("device = 3", f"device: got 3 (a whole number); {DEVICE}"),
        ('device = ["cpu", 3]', f"device: got ['cpu', 3] (a list); {DEVICE}"),
        ("threads = -1", "threads: got -1 (a whole number); a number of CPU threads for torch; 0: torch's own choice"),
        ("throttle = 0", f"throttle: got 0 (a whole number); {THROTTLE}"),
        ("throttle = [1.0, 2.0]", f"throttle: got [1.0, 2.0] (a list); {THROTTLE}"),
        ("throttle = true", f"throttle: got true (a truth value); {THROTTLE}"),
        ('group = "Fast"', f'group: got "Fast" (text); {GROUP}'),
        ('group = ["fast", "a b"]', f"group: got ['fast', 'a b'] (a list); {GROUP}"),
        (f'group = "{"a" * 33}"', f'group: got "{"a" * 33}" (text); {GROUP}'),
        ('precision = "fp8"', f'precision: got "fp8" (text); {PRECISION}'),
        ("precision = 16", f"precision: got 16 (a whole number); {PRECISION}"),
        ("micro_batch = -1", f"micro_batch: got -1 (a whole number); {MICRO_BATCH}"),
        ('micro_batch = "auto"', f'micro_batch: got "auto" (text); {MICRO_BATCH}'),
        ('compile = "yes"', f'compile: got "yes" (text); {TRUTH}'),
        ("recompute = 2", f"recompute: got 2 (a whole number); {TRUTH}"),
        ('parallel = "tp"', 'parallel: got "tp" (text); one of "auto", "ddp", "fsdp" would do'),
        ('mixed = "both"', 'mixed: got "both" (text); one of "auto", "average", "learners" would do'),
        ('mixd = "auto"', 'mixd: unknown key; did you mean "mixed"?'),
        ('devices = ["cpu"]', 'devices: unknown key; did you mean "device"?'),
    ],
)
def test_a_wrong_value_of_devices_is_told_in_one_sentence(line: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        devices_with(line)
    assert str(caught.value).startswith(f"site.toml: [devices] {said}")
    assert_one_sentence(str(caught.value))


def test_both_halves_of_a_client_certificate_will_do(tmp_path: Path) -> None:
    config = site_with(SITE.replace('ca = ""', 'client_cert = "c"\nclient_key = "k"'), tmp_path)
    assert config.site.client_key == "k"


def test_no_hint_names_what_would_be_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        site_with(SITE + "\n[bases]", tmp_path)
    assert '"base"' not in str(caught.value)


@pytest.mark.parametrize(("key", "line"), [("task", "task = 3"), ("data", "data = 3")])
def test_a_table_is_asked_for_where_a_value_stands(key: str, line: str) -> None:
    values = {**tomllib.loads(SITE), **tomllib.loads(line)}
    with pytest.raises(ConfigError) as caught:
        parse(SiteConfig, values, "site.toml")
    assert str(caught.value) == f"site.toml: [{key}]: got 3 (a whole number); a table would do"


# ---- several coordinators


def with_coordinators(*urls: str, fragments: int = 4) -> str:
    listed = ", ".join(f'"{url}"' for url in urls)
    return MINIMAL.replace("tokens", f"coordinators = [{listed}]\ntokens", 1) + f"[rounds]\nfragments = {fragments}\n"


def test_coordinators_are_named_by_their_urls(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(with_coordinators("https://a:8470", "http://b:1/"))
    assert load_run(tmp_path / "run.toml").run.coordinators == ["https://a:8470", "http://b:1/"]
    (tmp_path / "run.toml").write_text(MINIMAL)
    assert load_run(tmp_path / "run.toml").run.coordinators == []


@pytest.mark.parametrize(
    ("urls", "fragments", "says"),
    [
        (["https://a:1", "b:2"], 4, "[run] coordinators: got "),
        (["https://a:1", "https://a:1/"], 4, "each once"),
        (["https://a:1", "https://b:1", "https://c:1"], 2, "[rounds] fragments = 2 leaves some without a fragment"),
    ],
)
def test_coordinators_that_cannot_be_are_refused(tmp_path: Path, urls: list[str], fragments: int, says: str) -> None:
    (tmp_path / "run.toml").write_text(with_coordinators(*urls, fragments=fragments))
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_run(tmp_path / "run.toml")
