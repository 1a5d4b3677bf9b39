"""Training data that the coordinator leases: shards in the order in which they came, each from where it was left.

A shard's sequences are trained in an order that follows from (seed, epoch, shard) alone and is the same at every site,
whatever its libraries: its k-th sequence is (offset + k · stride) modulo its size.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from shared.files import DISK, Disk
from shared.protocol import MOST_LEASES, DataOrders, DataReport
from shared.task import Batch, Manifest
from shared.wire import MOST_PROGRESS

log = logging.getLogger(__name__)

GOLDEN = (math.sqrt(5) - 1) / 2
NAME = "leases.json"


@dataclass
class Lease:
    """A shard in an epoch at this site; `position` counts sequences of its order. `number` is the lease's own, as the
    coordinator gave it: later ones are higher."""

    number: int
    epoch: int
    shard: int
    position: int

    @property
    def key(self) -> tuple[int, int]:
        return self.epoch, self.shard


@lru_cache(maxsize=16)
def order_of(size: int, seed: int, epoch: int, shard: int) -> tuple[int, int]:
    """(offset, stride) of the order in which a shard of `size` sequences is trained; the stride has no factor in
    common with the size, so that each comes once."""
    drawn = sha256(f"{seed}/{epoch}/{shard}".encode()).digest()
    offset, jitter = int.from_bytes(drawn[:8], "big") % size, int.from_bytes(drawn[8:16], "big")
    stride = max(1, round(size * GOLDEN) + jitter % max(1, size // 8))
    while math.gcd(stride, size) != 1:
        stride += 1
    return offset, stride % size or 1


class LeasedStream:
    """A `BatchStream` over leases. There is a next batch only while `ready`.

    What is leased is written to `directory` before it is used: a site that is killed, and trains the steps since its
    last checkpoint again, trains them on the same data. `settled` is the newest lease that every kept checkpoint knows:
    what came before need not be written down.
    """

    def __init__(
        self,
        task: Any,
        manifest: Manifest,
        batch_size: int,
        seed: int,
        directory: Path,
        disk: Disk = DISK,
        run: str = "",
        settled: Callable[[], int] = lambda: -1,
    ) -> None:
        self.sizes, self._want = list(manifest.sizes), batch_size
        self._task, self._batch_size, self._seed = task, batch_size, seed
        self._directory, self._disk, self._run, self._settled = directory, disk, run, settled
        self._leases: list[Lease] = []
        self._finished: list[Lease] = []
        self._known = self._written_down()
        self._newest = -1

    # -- batches

    def __iter__(self) -> Iterator[Batch]:
        return self

    @property
    def ready(self) -> bool:
        return self._left() >= min(self._batch_size, sum(self.sizes))

    def __next__(self) -> Batch:
        """The next sequences of the leases in their order."""
        sequences = []
        for epoch, shard, position in self._take():
            size = self.sizes[shard]
            offset, stride = order_of(size, self._seed, epoch, shard)
            sequences.append((shard, (offset + position * stride) % size))
        return self._task.leased_batch(sequences)

    def _take(self) -> list[tuple[int, int, int]]:
        """(epoch, shard, position) of a batch."""
        taken: list[tuple[int, int, int]] = []
        while len(taken) < self._batch_size and self._leases:
            lease = self._leases[0]
            end = min(self.sizes[lease.shard], lease.position + self._batch_size - len(taken))
            taken += [(*lease.key, position) for position in range(lease.position, end)]
            lease.position = end
            if end == self.sizes[lease.shard]:
                self._finished.append(self._leases.pop(0))
        return taken

    def want(self, sequences: float) -> None:
        """So many sequences should be there in advance."""
        self._want = min(10**12, max(self._batch_size, math.ceil(sequences)))

    def _left(self) -> int:
        return sum(self.sizes[lease.shard] - lease.position for lease in self._leases)

    # -- leases

    def report(self) -> DataReport:
        return DataReport(
            want=self._want,
            least=self._batch_size,
            left=self._left(),
            newest=self._newest,
            holding=[lease.number for lease in self._leases[:MOST_LEASES]],
            finished=[lease.number for lease in self._finished[-MOST_LEASES:]],
        )

    def obey(self, orders: DataOrders) -> None:
        """Takes up new leases, gives up those that are another's, and forgets those that are done. Orders may overtake
        each other on their way: older ones change nothing."""
        withdrawn = set(orders.withdrawn)
        for lease in [lease for lease in self._leases if lease.number in withdrawn]:
            log.warning("shard %d of epoch %d went to another site at sequence %d", *lease.key[::-1], lease.position)
            self._leases.remove(lease)
        listed = {lease.number for lease in orders.leases}
        self._finished = [
            lease for lease in self._finished if lease.number in listed or lease.number >= orders.next_number
        ]
        new = [
            Lease(each.number, each.epoch, each.shard, each.start)
            for each in orders.leases
            if each.number > self._newest
        ]
        if new:
            self._remember(new)
            self._newest = max(lease.number for lease in new)
            # (A shard that it has already was leased anew: to one of the two that is news.)
            again = {lease.key for lease in new}
            self._leases = [lease for lease in self._leases if lease.key not in again] + new
            self._finished = [lease for lease in self._finished if lease.key not in again]

    def begin(self) -> None:
        """There is nothing to go on with: what was written down before is of another time."""
        self._known.clear()
        self._remember([])

    def progress(self) -> list[tuple[int, int, int]]:
        """(epoch, shard, position) of what is trained and not known to be all in the model."""
        begun = [lease for lease in (*self._finished, *self._leases) if lease.position]
        return [(lease.epoch, lease.shard, lease.position) for lease in begun[:MOST_PROGRESS]]

    # -- restarts

    def state_dict(self) -> dict[str, Any]:
        return {
            "newest": self._newest,
            "leases": [asdict(lease) for lease in self._leases],
            "finished": [asdict(lease) for lease in self._finished],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a checkpoint, with the leases that came after it as they were written down."""
        self._leases = [Lease(**lease) for lease in state["leases"]]
        self._finished = [Lease(**lease) for lease in state["finished"]]
        # A shard that was given up and leased again is what it was leased as last.
        later = {lease.key: replace(lease) for lease in self._known if lease.number > state["newest"]}
        self._leases = [lease for lease in self._leases if lease.key not in later] + list(later.values())
        self._finished = [lease for lease in self._finished if lease.key not in later]
        self._newest = max([state["newest"], *(lease.number for lease in later.values())])

    def _remember(self, new: Sequence[Lease]) -> None:
        """Before they are used, and as they are now."""
        settled = self._settled() if new else -1
        self._known = [lease for lease in self._known if lease.number > settled] + [replace(lease) for lease in new]
        known = json.dumps({"run": self._run, "leases": [asdict(lease) for lease in self._known]})
        text = f"{sha256(known.encode()).hexdigest()}\n{known}\n"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._disk.put(self._directory / NAME, lambda beside: _write_text(beside, text))
        except OSError as error:
            log.error("%s cannot be written (%s); if this site is killed now, it repeats or skips data", NAME, error)

    def _written_down(self) -> list[Lease]:
        try:
            seal, _, known = (self._directory / NAME).read_text(encoding="utf-8").rstrip("\n").partition("\n")
            if seal != sha256(known.encode()).hexdigest():
                raise ValueError("it is damaged")
            content = json.loads(known)
            return [Lease(**each) for each in content["leases"]] if content["run"] == self._run else []
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("%s cannot be read (%s); what was leased since the checkpoint is asked for again", NAME, error)
            return []


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
