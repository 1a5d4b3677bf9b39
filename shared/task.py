"""What is trained: the task contract, and how a task is found by the name in `run.toml`.

A task is either a name that an installed package registered in the entry-point group
`isthmus.tasks`, or `file.py:Class` on this machine's own disk. Code never crosses the network: the
coordinator sends the *name*, each machine resolves it by itself, and the tensor layout decides
whether both mean the same model.
"""

from __future__ import annotations

import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from shared.errors import ConfigError
from shared.protocol import FACT_NAME, FACT_VALUE, MOST_FACTS

ENTRY_POINT_GROUP = "isthmus.tasks"
SHOWN = 12
PATH_OPTIONS = ("paths",)
Batch = Any
"""One inner step's input; only the task that made it looks inside."""


@dataclass(frozen=True)
class Shard:
    """Which part of the data is this site's: part `index` of `count`, drawn under `seed`."""

    index: int
    count: int
    seed: int = 0


@runtime_checkable
class BatchStream(Protocol):
    """An endless iterator of batches that can say where it is and continue from there."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Manifest:
    """Data that can be leased: the sequences of each shard, and a digest (32 hexadecimal digits) that is the same where
    the data is."""

    digest: str
    sizes: Sequence[int]


class Task(ABC):
    """A model and its data. Subclasses read their own options (the `[task]` table, then `[data]`)."""

    path_options: ClassVar[tuple[str, ...]] = PATH_OPTIONS
    """Options that are paths, or lists of them: they count from the directory of the config file they stand in."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The model with its initial weights; deterministic under the torch seed set by the caller."""

    @abstractmethod
    def train_batches(self, shard: Shard, batch_size: int) -> BatchStream:
        """An endless stream over this shard's training data; `batch_size` counts sequences."""

    def eval_batches(self, batch_size: int) -> Iterable[Batch] | None:
        """The held-out set, the same at every site; None where the task has none."""
        return None

    def manifest(self) -> Manifest | None:
        """What the coordinator is to lease of the data; None: nothing, and `train_batches` is asked for batches."""
        return None

    def leased_batch(self, sequences: Sequence[tuple[int, int]]) -> Batch:
        """The batch of these sequences, each (shard, index within it), of the data that `manifest` describes."""
        raise NotImplementedError

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Mean loss over the batch (a scalar that can be differentiated) and the tokens it counts."""

    def sequence_tokens(self) -> int | None:
        """The most tokens that one sequence can count: a site that claims more is not believed. None where the task
        cannot say; sites are then compared with each other."""
        return None

    def fingerprint(self) -> Mapping[str, str]:
        """Facts that must be the same at every site and that the tensors' shapes do not show, such as the digest of a
        tokenizer, by a name for each: at most 16 of them, names of up to 32 characters, values of up to 128."""
        return {}

    def pretrained(self, directory: Path) -> nn.Module | None:
        """The model with the weights of this directory, where they are under other names there than in the model; None
        where the task knows no other names. Raises ConfigError where they do not fit."""
        return None

    def generate(self, model: nn.Module, prompt: str, tokens: int, seed: int) -> str:
        """`prompt` continued by `tokens` sampled tokens. Raises ConfigError where the task has no text."""
        raise ConfigError(f"task {type(self).__name__} does not generate text; sample another run")

    def hf_files(self) -> dict[str, bytes] | None:
        """Files beside the weights that make a Hugging Face directory; None where there is no such form."""
        return None


def manifest_of(task: Any) -> Manifest | None:
    """`task.manifest()`, where the task has such a thing."""
    manifest: Manifest | None = task.manifest() if hasattr(task, "manifest") else None
    return manifest


def fingerprint_of(task: Any) -> dict[str, str]:
    """`task.fingerprint()`, where the task has such a thing. Raises ConfigError where it cannot be had, or cannot
    travel."""
    name = type(task).__name__
    try:
        facts: Any = getattr(task, "fingerprint", dict)()
    except ConfigError:
        raise
    except Exception as error:  # a task's own code; its fault is told as such
        raise ConfigError(f"[task] use: {name}.fingerprint failed: {type(error).__name__}: {error}") from error
    if not (isinstance(facts, Mapping) and len(facts) <= MOST_FACTS and all(map(_is_fact, facts.items()))):
        raise ConfigError(
            f"[task] use: {name}.fingerprint gives {str(facts)[:80]}, not at most {MOST_FACTS} texts of up to "
            f"{FACT_VALUE} characters by names of up to {FACT_NAME}"
        )
    return dict(facts)


def _is_fact(fact: tuple[Any, Any]) -> bool:
    name, value = fact
    return isinstance(name, str) and isinstance(value, str) and 0 < len(name) <= FACT_NAME and len(value) <= FACT_VALUE


def check_fingerprint(ours: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    """Raises ConfigError naming the first fact of the run's task, `theirs`, that is another one here, or that only one
    side has."""
    for name in sorted(ours.keys() | theirs.keys()):
        here, there = ours.get(name), theirs.get(name)
        if here != there:
            whole = here is not None and there is not None and shortened(here) == shortened(there)
            told = ["none" if each is None else each if whole else shortened(each) for each in (here, there)]
            raise ConfigError(
                f"the {name} here is not the run's (here {told[0]}, the run has {told[1]}): use the run's own file"
            )


def shortened(value: str) -> str:
    """The beginning of a fact's value, for people: enough to tell two digests apart."""
    return value if len(value) <= SHOWN else f"{value[:SHOWN]}…"


_REQUIRED = ("build_model", "train_batches", "loss")


def load_task(use: str, options: Mapping[str, Any], base: Path | None = None) -> Any:
    """The task named `use`, built with `options`; relative paths count from `base` (a task's file, where it is not
    there, from the current directory).

    Raises ConfigError when the name, the file or the class is not there, or the options do not fit.
    """
    cls = _from_file(use, base or Path()) if ":" in use else _from_entry_point(use)
    abstract: frozenset[str] = getattr(cls, "__abstractmethods__", frozenset())
    missing = [name for name in _REQUIRED if name in abstract or not callable(getattr(cls, name, None))]
    if missing:
        raise ConfigError(f"[task] use: {use!r} lacks {', '.join(missing)}; see Task in shared/task.py")
    try:
        return cls(_absolute(options, getattr(cls, "path_options", PATH_OPTIONS), base or Path()))
    except ConfigError:
        raise
    except Exception as error:  # a task's own code; its fault is told as such
        raise ConfigError(f"[task] use: {use!r} does not take its options: {type(error).__name__}: {error}") from error


def build_model(task: Any, seed: int) -> nn.Module:
    """`task.build_model()` under `seed`, without disturbing the caller's random state. Raises ConfigError."""
    with torch.random.fork_rng(devices=[]):
        # The one that was forked; `torch.manual_seed` would seed every device besides.
        torch.default_generator.manual_seed(seed)
        try:
            model: nn.Module = task.build_model()
        except ConfigError:
            raise
        except Exception as error:  # a task's own code; its fault is told as such
            name = type(task).__name__
            raise ConfigError(f"[task] use: {name}.build_model failed: {type(error).__name__}: {error}") from error
    return model


def _absolute(options: Mapping[str, Any], keys: Iterable[str], base: Path) -> dict[str, Any]:
    """The options, those of `keys` counted from `base`, the directory of the config file that they stand in."""

    def absolute(path: str) -> str:
        return str(base.resolve() / Path(path).expanduser())

    resolved = dict(options)
    for key in keys:
        match resolved.get(key):
            case str(one) if one:
                resolved[key] = absolute(one)
            case list(many) if all(isinstance(each, str) for each in many):
                resolved[key] = [absolute(each) for each in many]
    return resolved


def _from_entry_point(name: str) -> type:
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in found:
        raise ConfigError(
            f"[task] use: no task {name!r} is installed; one of {', '.join(sorted(found)) or 'none'} would do, "
            'or "file.py:Class" for a file on this machine'
        )
    try:
        loaded: type = found[name].load()
    except Exception as error:  # an installed task's fault, told as such
        raise ConfigError(f"[task] use: {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    return loaded


def _from_file(use: str, base: Path) -> type:
    file, _, class_name = use.rpartition(":")
    path = (base / Path(file).expanduser()).resolve()
    if not path.is_file():
        path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"[task] use: no file {path}; write the path of a Python file as file.py:Class")
    spec = importlib.util.spec_from_file_location(f"isthmus_task_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"[task] use: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling of a module's classes look it up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises is told as that file's fault
        del sys.modules[spec.name]
        raise ConfigError(f"[task] use: {path} cannot be imported: {type(error).__name__}: {error}") from error
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type):
        raise ConfigError(f"[task] use: {path} has no class {class_name!r}")
    return cls
