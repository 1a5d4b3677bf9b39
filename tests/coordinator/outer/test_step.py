"""One outer step: against torch, whatever the threads, and the published weights that follow the master."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from coordinator.core.rounds import Contribution, Policy
from coordinator.core.rounds import weights as weights_of
from coordinator.outer import merge
from coordinator.outer.merge import Weighted
from coordinator.outer.optimizers import OuterRule
from coordinator.outer.step import OuterState, Stepped, outer_step
from shared.errors import FormatError
from shared.fragments import CHUNK_ELEMENTS, Fragment, TensorSpec, digest_flat
from shared.wire import Header, encode_flat, open_container, tensor_table

F32 = NDArray[np.float32]
SMALL = Fragment(0, (TensorSpec("a", (7, 9)), TensorSpec("b", (100,))))
LARGE = Fragment(3, (TensorSpec("w", (CHUNK_ELEMENTS + 5,)), TensorSpec("x", (3, 1000))))  # three chunks
NESTEROV = OuterRule("nesterov", lr=0.7, momentum=0.9, codec="fp32", zstd_level=1)
SGD = OuterRule("sgd", lr=0.4, momentum=0.0, codec="fp32", zstd_level=0)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def values(seed: int, fragment: Fragment = SMALL) -> F32:
    return np.random.default_rng(seed).standard_normal(fragment.size).astype(np.float32)


def sent(flat: F32, fragment: Fragment = SMALL, codec: str = "fp32", weight: float = 1.0) -> Weighted:
    """`flat` as a site would send it."""
    header = Header(
        kind="contribution",
        run="r",
        site="s",
        fragment=fragment.index,
        base_version=0,
        version=0,
        digest="0" * 32,
        codec=codec,
        zstd=True,
        chunk=CHUNK_ELEMENTS,
        tensors=tensor_table(fragment),
        tokens=1,
        steps=1,
        sizes=[],
    )
    norm = float(np.linalg.norm(flat.astype(np.float64)))
    return Weighted(open_container(encode_flat(header, fragment, flat, 1), fragment), weight, norm)


def states(fragment: Fragment = SMALL) -> OuterState:
    return OuterState.initial(fragment, values(99, fragment))


def step(state: OuterState, contributions: Sequence[Weighted], rule: OuterRule, pool: ThreadPoolExecutor) -> Stepped:
    return outer_step(state, contributions, rule, "r", 10, pool)


# ---- the optimizers, against torch.optim


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_nesterov_is_that_of_torch_over_many_steps(momentum: float, pool: ThreadPoolExecutor) -> None:
    state = states()
    parameter = torch.nn.Parameter(torch.from_numpy(state.master.copy()))
    optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=momentum, nesterov=momentum > 0)
    for seed in range(8):
        parameter.grad = torch.from_numpy(values(seed))
        optimizer.step()
        step(state, [sent(values(seed))], replace(NESTEROV, momentum=momentum), pool)
        np.testing.assert_allclose(state.master, parameter.detach().numpy(), rtol=2e-6, atol=2e-6)


def test_sgd_is_that_of_torch_over_many_steps(pool: ThreadPoolExecutor) -> None:
    state = states()
    parameter = torch.nn.Parameter(torch.from_numpy(state.master.copy()))
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    for seed in range(8):
        parameter.grad = torch.from_numpy(values(seed))
        optimizer.step()
        step(state, [sent(values(seed))], SGD, pool)
        np.testing.assert_allclose(state.master, parameter.detach().numpy(), rtol=1e-6, atol=1e-6)
    assert state.slots == {}


# ---- the merge


def test_values_1_and_3_with_weights_1_and_2_merge_to_seven_thirds(pool: ThreadPoolExecutor) -> None:
    fragment = Fragment(0, (TensorSpec("scalar", ()),))
    rows = [Contribution("x", "a", 0, 0, 1, 1), Contribution("y", "b", 0, 0, 2, 1)]
    merged = [
        sent(np.full(1, value, np.float32), fragment, weight=weight)
        for value, weight in zip((1.0, 3.0), weights_of(rows, Policy(None, 0.0, 600.0, 8, "tokens"), 1), strict=True)
    ]
    state = OuterState.initial(fragment, np.full(1, 10.0, np.float32))
    stepped = step(state, merged, replace(SGD, lr=1.0), pool)
    assert state.master[0] == pytest.approx(10 - 7 / 3, rel=1e-6)
    assert stepped.merged_norm == pytest.approx(7 / 3, rel=1e-6)


def test_contributions_are_summed_in_the_order_given(pool: ThreadPoolExecutor) -> None:
    # In fp32 (1e8 + 1) − 1e8 = 0 and (1e8 − 1e8) + 1 = 1: the order can be read off the result.
    fragment = Fragment(0, (TensorSpec("scalar", ()),))
    big, one, minus = (sent(np.full(1, value, np.float32), fragment) for value in (1e8, 1.0, -1e8))
    for order, merged in (((big, one, minus), 0.0), ((big, minus, one), 1.0)):
        state = OuterState.initial(fragment, np.zeros(1, np.float32))
        step(state, order, replace(SGD, lr=1.0), pool)
        assert state.master[0] == -merged


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_the_merge_is_the_weighted_sum_of_what_was_decoded(codec: str, pool: ThreadPoolExecutor) -> None:
    merged = [sent(values(1), codec=codec, weight=0.25), sent(values(2), codec=codec, weight=0.75)]
    state = states()
    expected = np.zeros(SMALL.size, np.float32)
    for each in merged:
        expected += np.float32(each.weight) * each.container.decode()
    expected = state.master - np.float32(1) * expected
    step(state, merged, replace(SGD, lr=1.0), pool)
    assert state.master.tobytes() == expected.tobytes()


@pytest.mark.parametrize("group", [1, merge.GROUP_BYTES])
def test_contributions_of_many_codecs_are_summed_in_order_however_they_are_grouped(
    group: int, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense ones side by side, topk2's as they come, first, between and last."""
    monkeypatch.setattr(merge, "GROUP_BYTES", group)
    for codecs in (["int4"] * 3, ["topk2-256", "int8", "int8", "topk2-256", "fp32"], ["bf16", "topk2-64"]):
        merged = [sent(values(n), codec=codec, weight=0.1 * (n + 1)) for n, codec in enumerate(codecs)]
        total = np.zeros(SMALL.size, np.float32)
        for each in merged:
            for section, chunk in enumerate(SMALL.chunks()):
                each.container.accumulate(section, each.weight, total[chunk.start : chunk.stop])
        state = states()
        wanted = state.master - np.float32(0.4) * total
        step(state, merged, SGD, pool)
        assert state.master.tobytes() == wanted.tobytes()


def test_a_contribution_that_is_cut_short_stops_the_step(pool: ThreadPoolExecutor) -> None:
    whole = sent(values(1))
    flipped = bytearray(whole.container._source.read(0, whole.container._source.size))
    flipped[-1] ^= 1
    broken = Weighted(open_container(bytes(flipped), SMALL), 1.0, 1.0)
    with pytest.raises(FormatError, match="section 1"):
        step(states(), [whole, broken], NESTEROV, pool)


# ---- what is published


@pytest.mark.parametrize("publish", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_a_site_that_applies_the_delta_holds_the_published_weights_bit_for_bit(
    publish: str, pool: ThreadPoolExecutor
) -> None:
    state, rule = states(), replace(NESTEROV, codec=publish)
    anchor = state.published.copy()
    for version in range(1, 4):
        stepped = step(state, [sent(values(version))], rule, pool)
        with open_container(b"".join(stepped.delta), SMALL) as delta:
            header = delta.header
            delta.add_to(anchor)
        assert anchor.tobytes() == state.published.tobytes()
        assert (header.kind, header.base_version, header.version) == ("delta", version - 1, version)
        assert header.digest == stepped.digests.published == digest_flat(anchor, SMALL.chunks()) == state.digest
        assert (state.version, state.tokens, header.tokens) == (version, 10 * version, 10 * version)
        assert state.digests() == stepped.digests


def gap(state: OuterState) -> float:
    """The largest element of |Θ − Θ̂|."""
    return float(np.abs(state.master - state.published).max())


@pytest.mark.parametrize("publish", ["bf16", "int8", "int4"])
def test_what_a_lossy_publish_loses_goes_out_with_the_next_delta(publish: str, pool: ThreadPoolExecutor) -> None:
    state, rule = states(), replace(NESTEROV, codec=publish)
    gaps = []
    for seed in range(30):
        step(state, [sent(values(seed))], rule, pool)
        gaps.append(gap(state))
    assert gaps[0] > 0
    assert max(gaps) < 1.5, "the loss does not build up: it stays within a quantisation step of one delta"
    # Nothing more comes in, without momentum: each delta carries what the one before lost.
    still = replace(SGD, codec=publish)
    shrinking = [gap(state)]
    for _ in range(4):
        step(state, [], still, pool)
        shrinking.append(gap(state))
    assert all(later < earlier / 2 or later < 1e-6 for earlier, later in pairwise(shrinking))
    assert shrinking[-1] < 1e-3


def test_the_initial_version_is_published_as_it_is() -> None:
    weights = values(5)
    state = OuterState.initial(SMALL, weights)
    weights[0] = 0.0
    assert state.master[0] != 0, "a copy, not a view of the caller's array"
    assert state.master.tobytes() == state.published.tobytes()
    assert state.slots == {}
    assert state.version == state.tokens == 0
    assert state.digest == digest_flat(state.published, SMALL.chunks())


# ---- threads


def test_the_result_is_the_same_for_one_and_for_four_threads() -> None:
    results = []
    for threads in (1, 4):
        state = states(LARGE)
        with ThreadPoolExecutor(threads) as pool:
            deltas = [
                step(
                    state,
                    [
                        sent(values(2 * v, LARGE), LARGE, "int4", 0.4),
                        sent(values(2 * v + 1, LARGE), LARGE, "int8", 0.6),
                    ],
                    replace(NESTEROV, codec="int8"),
                    pool,
                )
                for v in range(2)
            ]
        results.append(([each.delta for each in deltas], state.digests(), [each.merged_norm for each in deltas]))
    assert results[0] == results[1]


def test_the_merged_norm_is_that_of_the_whole_fragment(pool: ThreadPoolExecutor) -> None:
    stepped = step(states(LARGE), [sent(np.ones(LARGE.size, np.float32), LARGE)], SGD, pool)
    assert stepped.merged_norm == pytest.approx(math.sqrt(LARGE.size), rel=1e-12)
