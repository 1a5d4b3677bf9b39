from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shared.errors import ConfigError
from shared.task import BatchStream, Task, build_model, check_fingerprint, fingerprint_of, load_task

WHOLE = """
class Mine:
    def __init__(self, options):
        self.options = options
    def build_model(self): ...
    def train_batches(self, shard, batch_size): ...
    def loss(self, model, batch): ...
"""


def written(directory: Path, text: str, name: str = "mine.py") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


# ---- finding a task


def test_a_task_is_found_by_its_registered_name() -> None:
    task = load_task("byte-lm", {"width": 32, "layers": 1, "heads": 2, "context": 8})
    assert isinstance(task, Task)


def test_a_task_is_found_in_a_file_and_given_its_options(tmp_path: Path) -> None:
    path = written(tmp_path, WHOLE)
    assert load_task(f"{path}:Mine", {"width": 3}).options == {"width": 3}


def test_a_relative_file_counts_from_the_base_and_then_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    written(tmp_path / "here", WHOLE + "    place = 'here'\n")
    assert load_task("mine.py:Mine", {}, tmp_path / "base").place == "here"
    written(tmp_path / "base", WHOLE + "    place = 'base'\n")
    assert load_task("mine.py:Mine", {}, tmp_path / "base").place == "base"
    assert load_task("mine.py:Mine", {}).place == "here"


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (
            "nothing",
            r'^\[task\] use: no task \'nothing\' is installed; one of .*byte-lm.* would do, or "file\.py:Class" ',
        ),
        (
            "nothing.py:Mine",
            r"^\[task\] use: no file .*nothing\.py; write the path of a Python file as file\.py:Class$",
        ),
        ("mine.py:Theirs", r"^\[task\] use: .*mine\.py has no class 'Theirs'$"),
        ("mine.py:", r"^\[task\] use: .*mine\.py has no class ''$"),
        ("mine.py:a_function", r"^\[task\] use: .*mine\.py has no class 'a_function'$"),
        (
            "mine.py:Half",
            r"^\[task\] use: 'mine\.py:Half' lacks build_model, train_batches; see Task in shared/task\.py$",
        ),
        ("notes.txt:Mine", r"^\[task\] use: .*notes\.txt is not a Python file$"),
        (
            "broken.py:Mine",
            r"^\[task\] use: .*broken\.py cannot be imported: ModuleNotFoundError: No module named 'no_such_'?",
        ),
        ("syntax.py:Mine", r"^\[task\] use: .*syntax\.py cannot be imported: SyntaxError: "),
    ],
)
def test_a_task_that_cannot_be_had_is_told_with_what_would_do(use: str, said: str, tmp_path: Path) -> None:
    written(tmp_path, WHOLE + "class Half:\n    def loss(self, model, batch): ...\ndef a_function(): ...\n")
    written(tmp_path, "hello", "notes.txt")
    written(tmp_path, "import no_such_", "broken.py")
    written(tmp_path, "def", "syntax.py")
    with pytest.raises(ConfigError, match=said) as caught:
        load_task(use, {}, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_task_class_that_leaves_methods_out_is_told_which(tmp_path: Path) -> None:
    written(tmp_path, "from shared.task import Task\nclass Half(Task):\n    def loss(self, model, batch): ...\n")
    with pytest.raises(ConfigError, match="lacks build_model, train_batches"):
        load_task("mine.py:Half", {}, tmp_path)


def test_a_task_file_may_hold_dataclasses_with_postponed_annotations(tmp_path: Path) -> None:
    settings = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass S:\n    a: int = 1\n"
    )
    written(tmp_path, settings + WHOLE)
    assert load_task("mine.py:Mine", {}, tmp_path).options == {}


# ---- building its model


class Random(Task):
    def build_model(self) -> nn.Module:
        return nn.Linear(3, 2)

    def train_batches(self, shard: object, batch_size: int) -> Any: ...
    def loss(self, model: nn.Module, batch: Any) -> Any: ...


def weights(seed: int) -> list[float]:
    return [float(v) for p in build_model(Random({}), seed).parameters() for v in p.detach().flatten()]


def test_a_model_is_the_same_under_the_same_seed_and_another_under_another() -> None:
    torch.manual_seed(1)
    first = weights(7)
    torch.manual_seed(2)
    assert weights(7) == first
    assert weights(8) != first


def test_building_a_model_does_not_disturb_the_random_state() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    weights(7)
    np.testing.assert_array_equal(torch.get_rng_state().numpy(), before.numpy())


def test_a_task_copies_its_options_and_has_harmless_defaults() -> None:
    options = {"a": 1}
    task = Random(options)
    task.options["a"] = 2
    assert options == {"a": 1}
    assert task.eval_batches(4) is None
    assert task.hf_files() is None
    assert task.fingerprint() == {}
    assert task.pretrained(Path()) is None
    with pytest.raises(ConfigError, match="task Random does not generate text"):
        task.generate(nn.Linear(1, 1), "x", 1, 0)


class Says(Random):
    """A task with this fingerprint."""

    def __init__(self, said: Any) -> None:
        super().__init__({})
        self.said = said

    def fingerprint(self) -> Any:
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


def test_a_task_that_says_nothing_of_itself_has_an_empty_fingerprint(tmp_path: Path) -> None:
    assert fingerprint_of(Random({})) == {}
    assert fingerprint_of(load_task(f"{written(tmp_path, WHOLE)}:Mine", {})) == {}


@pytest.mark.parametrize(
    "said",
    [
        None,
        "91bc",
        ["tokenizer"],
        {"tokenizer": 1},
        {"tokenizer": b"91bc"},
        {1: "91bc"},
        {"": "91bc"},
        {"x" * 33: "91bc"},
        {"x": "y" * 129},
        {str(n): "" for n in range(17)},
    ],
)
def test_a_fingerprint_that_could_not_travel_is_refused(said: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^\[task\] use: Says\.fingerprint gives .*, not at most 16 texts of up to 128"
    ):
        fingerprint_of(Says(said))


def test_the_largest_fingerprint_travels() -> None:
    most = {f"{n:x<32}": "y" * 128 for n in range(16)}
    assert fingerprint_of(Says(most)) == most


def test_a_fingerprint_that_cannot_be_had_is_told_as_the_tasks_fault() -> None:
    with pytest.raises(ConfigError, match=r"Says\.fingerprint failed: OSError: no tokenizer\.json"):
        fingerprint_of(Says(OSError("no tokenizer.json")))
    with pytest.raises(ConfigError, match=r"^as the task says it$"):
        fingerprint_of(Says(ConfigError("as the task says it")))


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        ({"a": "1", "t": "3fa0"}, {"a": "1", "t": "91bc"}, "the t here is not the run's (here 3fa0, the run has 91bc)"),
        ({"t": "3fa0"}, {}, "the t here is not the run's (here 3fa0, the run has none)"),
        ({}, {"t": "91bc"}, "the t here is not the run's (here none, the run has 91bc)"),
        ({"t": "3fa0" * 8}, {"t": "91bc" * 8}, "(here 3fa03fa03fa0…, the run has 91bc91bc91bc…)"),
        ({"t": "0123456789ab/1"}, {"t": "0123456789ab/2"}, "(here 0123456789ab/1, the run has 0123456789ab/2)"),
    ],
)
def test_a_fingerprint_that_is_not_the_runs_is_refused_by_the_fact_that_differs(
    ours: dict[str, str], theirs: dict[str, str], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_fingerprint(ours, theirs)
    assert f"{told}: use the run's own file" in str(caught.value)
    check_fingerprint(ours, dict(ours))


def test_a_batch_stream_is_an_iterator_that_knows_where_it_is() -> None:
    class Stream:
        def __iter__(self) -> Iterator[int]:
            return iter([])

        def __next__(self) -> int:
            return 0

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    assert isinstance(Stream(), BatchStream)
    assert not isinstance(iter([]), BatchStream)


def test_the_option_paths_counts_from_the_directory_of_its_config_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "class Mine:\n"
        "    def __init__(self, options): self.options = options\n"
        "    def build_model(self): ...\n"
        "    def train_batches(self, shard, batch_size): ...\n"
        "    def loss(self, model, batch): ...\n"
    )

    def paths(given: object) -> object:
        return load_task("mine.py:Mine", {"paths": given, "rows": 3}, tmp_path).options["paths"]

    assert paths("texts") == str(tmp_path / "texts")
    assert paths(["texts", "/srv/more"]) == [str(tmp_path / "texts"), "/srv/more"]
    assert paths(["a", 3]) == ["a", 3]  # the task refuses it in its own words


def test_a_task_says_which_options_are_paths(tmp_path: Path) -> None:
    written(tmp_path, WHOLE + "    path_options = ('paths', 'tokenizer')\n")
    given = {"paths": "texts", "tokenizer": "t.json", "model": "m", "empty": ""}
    options = load_task("mine.py:Mine", given, tmp_path).options
    here = {"paths": str(tmp_path / "texts"), "tokenizer": str(tmp_path / "t.json")}
    assert options == {**given, **here}
    assert load_task("mine.py:Mine", {"tokenizer": ""}, tmp_path).options == {"tokenizer": ""}


def test_what_a_task_raises_is_told_as_its_fault(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "class Bad:\n"
        "    def __init__(self, options): self.width = options['width']\n"
        "    def build_model(self): raise RuntimeError('no such layer')\n"
        "    def train_batches(self, shard, batch_size): ...\n"
        "    def loss(self, model, batch): ...\n"
    )
    with pytest.raises(ConfigError, match="does not take its options: KeyError: 'width'"):
        load_task("bad.py:Bad", {}, tmp_path)
    with pytest.raises(ConfigError, match=r"Bad\.build_model failed: RuntimeError: no such layer"):
        build_model(load_task("bad.py:Bad", {"width": 1}, tmp_path), 0)
