"""How much memory a site needs on each device: with literals, worked out by hand."""

from __future__ import annotations

import pytest

from shared.fragments import Fragment, Layout, TensorSpec
from site_agent.core.memory import Needed, memory_needed

LAYOUT = Layout(
    (
        Fragment(0, (TensorSpec("a.weight", (10, 30)), TensorSpec("a.bias", (100,)))),  # 400
        Fragment(1, (TensorSpec("b.weight", (20, 10)),)),  # 200
        Fragment(2, (TensorSpec("c.weight", (2, 5, 10)),)),  # 100
        Fragment(3, (TensorSpec("scale", ()), TensorSpec("d.bias", (99,)))),  # 100
    )
)


def needed(optimizer: str = "adamw", feedback: bool = True, overlap: int | None = 2, **given: int) -> Needed:
    values = {"steps": 20, **given}
    return memory_needed(LAYOUT, optimizer, feedback=feedback, overlap=overlap, **values)  # type: ignore[arg-type]


def test_one_device_holds_everything() -> None:
    assert needed() == Needed(3200, 3200, 6400, 3200, 1600, 6400)
    assert needed().total == 3200 + 3200 + 6400 + 3200 + 1600 + 6400


@pytest.mark.parametrize(("optimizer", "size"), [("adamw", 6400), ("muon", 600 * 4 + 200 * 8), ("sgd", 0)])
def test_what_an_inner_optimizer_holds(optimizer: str, size: int) -> None:
    assert needed(optimizer).optimizer == size


def test_error_feedback_is_held_where_the_run_keeps_it() -> None:
    assert needed(feedback=False).feedback == 0
    assert needed(feedback=False).total == needed().total - 3200


@pytest.mark.parametrize(
    ("overlap", "steps", "elements"),
    [
        (0, 20, 400),
        (4, 20, 400),  # aligned before the next is due
        (5, 20, 600),  # with the next one
        (9, 20, 600),
        (10, 20, 700),
        (19, 20, 800),
        (2, 11, 600),  # due 2 or 3 steps apart
        (0, 3, 800),  # several are due at one step
        (None, 1000, 800),
    ],
)
def test_snapshots_are_as_many_as_can_be_on_their_way_and_the_largest(
    overlap: int | None, steps: int, elements: int
) -> None:
    assert needed(overlap=overlap, steps=steps).snapshots == 4 * elements


def test_a_sharded_model_and_shared_fragments_are_parts() -> None:
    assert needed(shards=4) == Needed(800, 800, 1600, 3200, 1600, 6400)
    assert needed(holders=4) == Needed(3200, 3200, 6400, 800, 400, 1600)
    assert needed(shards=3, holders=3) == Needed(1067, 1067, 2134, 1067, 534, 2134), "the largest part counts"


GIGABYTES = Needed(2_100_000_000, 2_100_000_000, 4_200_000_000, 0, 500_000_000, 1_900_000_000)


def test_the_sum_is_said_with_its_parts_and_what_it_lacks() -> None:
    assert GIGABYTES.sentence() == (
        "at least 10.8 GB on each device without activations (weights 2.1, gradients 2.1, optimizer 4.2, snapshots "
        "0.5, alignment 1.9)"
    )
    assert Needed(2_000_000, 0, 0, 0, 0, 500_000).sentence() == (
        "at least 2.5 MB on each device without activations (weights 2.0, alignment 0.5)"
    )


def test_a_device_that_is_too_small_is_told_with_what_to_do() -> None:
    assert GIGABYTES.shortage("cuda:0", 10_800_000_000) is None
    assert GIGABYTES.shortage("cuda:0", 10_700_000_000) == (
        f"needs {GIGABYTES.sentence()}, cuda:0 has 10.7 GB free: share the model among more devices, or train a "
        'smaller one, or use an [inner] optimizer that holds less ("muon": one vector for matrices; "sgd": none)'
    )
    fragments = Needed(1_000_000_000, 1_000_000_000, 0, 0, 1_000_000_000, 4_000_000_000)
    assert fragments.shortage("npu:1", 0) == (
        f"needs {fragments.sentence()}, npu:1 has 0.0 GB free: raise [rounds] fragments, or share the model among "
        "more devices, or train a smaller one"
    )
