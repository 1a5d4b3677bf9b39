"""What tasks have in common whose data are one text, of bytes or of tokens, trained on window by window."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from shared.task import BatchStream, Manifest, Shard, Task
from site_agent.tasks.options import Partition
from site_agent.tasks.text import Text, WindowStream


class Windows(Protocol):
    """Options that such a task has."""

    @property
    def context(self) -> int: ...
    @property
    def partition(self) -> Partition: ...
    @property
    def eval_batches(self) -> int: ...


S = TypeVar("S", bound=Windows)


class WindowTask(Task, Generic[S]):
    """Next-token prediction on windows of `context` + 1. Batches are (B, T+1) int64, T the context."""

    settings: S

    @property
    @abstractmethod
    def text(self) -> Text:
        """The text, opened at the first use: a coordinator has none. Raises ConfigError without enough of it."""

    def train_batches(self, shard: Shard, batch_size: int) -> BatchStream:
        """Batches of this shard's training windows. Raises ConfigError without enough data."""
        parts = self.text.training_parts(shard, self.settings.partition)
        return WindowStream(self.text, parts, shard, batch_size)

    def manifest(self) -> Manifest | None:
        """The training windows by blocks, with `partition = "leased"`."""
        return self.text.manifest() if self.settings.partition == "leased" else None

    def leased_batch(self, sequences: Sequence[tuple[int, int]]) -> Tensor:
        """(B, T+1) int64."""
        return self.text.pick(sequences)

    def eval_batches(self, batch_size: int) -> Iterable[Any]:
        """Up to `eval_batches` batches, the last one perhaps smaller, evenly over the held-out text.

        The same at every site that has the same text; with `partition = "local"`, of the site's own text.
        """
        return self.text.held_out_batches(batch_size, self.settings.eval_batches)

    def sequence_tokens(self) -> int:
        """T: every byte or token of a window is a target."""
        return self.settings.context
