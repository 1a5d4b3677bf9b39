from __future__ import annotations

import os
import threading

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankError, run_ranks


def summed(values: torch.Tensor) -> torch.Tensor:
    mine = values * (dist.get_rank() + 1)
    dist.all_reduce(mine)
    return mine


def second_fails() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the second one fails")
    dist.barrier()


def second_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(1)
    dist.barrier()


def waits_for_ever() -> None:
    threading.Event().wait()


def place() -> tuple[str, str, bool]:
    return os.environ["RANK"], os.environ["WORLD_SIZE"], dist.is_initialized()


def test_ranks_share_a_group_and_their_results_come_back_in_order() -> None:
    for result in run_ranks(2, summed, torch.arange(3.0)):
        assert torch.equal(result, torch.tensor([0.0, 3.0, 6.0]))


def test_ranks_can_do_without_a_group() -> None:
    assert run_ranks(2, place, group=False) == [("0", "2", False), ("1", "2", False)]


def test_the_traceback_of_the_rank_that_failed_is_told() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*second_fails.*the second one fails"):
        run_ranks(2, second_fails)


def test_a_rank_that_dies_is_told_and_nobody_waits_for_it() -> None:
    with pytest.raises(RankError, match="rank"):
        run_ranks(2, second_dies)


def test_ranks_that_take_too_long_are_killed() -> None:
    with pytest.raises(RankError, match=r"ranks \[0\]"):
        run_ranks(1, waits_for_ever, timeout=3.0, group=False)
