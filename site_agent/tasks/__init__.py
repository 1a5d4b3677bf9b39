"""Built-in tasks. `Task` and its companions live in `shared.task`; they are here for task authors too."""

from shared.task import Batch, BatchStream, Shard, Task

__all__ = ["Batch", "BatchStream", "Shard", "Task"]
