from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError
from shared.fragments import (
    CHUNK_ELEMENTS,
    Chunk,
    Fragment,
    Layout,
    TensorSpec,
    build_layout,
    combine_digests,
    digest_chunk,
    digest_flat,
)


def specs(**sizes: int) -> list[TensorSpec]:
    return [TensorSpec(name, (size,)) for name, size in sizes.items()]


def names(layout: Layout) -> list[list[str]]:
    return [[tensor.name for tensor in fragment.tensors] for fragment in layout.fragments]


TRANSFORMER = [
    TensorSpec(name, shape)
    for name, shape in [
        ("embed.weight", (8, 4)),
        ("blocks.0.norm.weight", (4,)),
        ("blocks.0.mlp.weight", (4, 4)),
        ("blocks.1.norm.weight", (4,)),
        ("blocks.1.mlp.weight", (4, 4)),
        ("blocks.2.norm.weight", (4,)),
        ("blocks.2.mlp.weight", (4, 4)),
        ("final.weight", (4,)),
        ("final.bias", (4,)),
        ("temperature", ()),
    ]
]


# ---- which tensor lies in which fragment


def test_balanced_puts_the_largest_first_into_the_lightest_fragment() -> None:
    layout = build_layout(specs(a=1, b=10, c=7, d=4, e=4), 2, "balanced")
    # b → 0 (10), c → 1 (7), d → 1 (11), e → 0 (14), a → 1 (12)
    assert names(layout) == [["b", "e"], ["a", "c", "d"]]
    assert [fragment.size for fragment in layout.fragments] == [14, 12]
    assert layout.parameters == 26


def test_balanced_breaks_ties_by_name_whatever_the_order_of_the_model() -> None:
    wanted = [["a", "d"], ["b"], ["c"]]
    assert names(build_layout(specs(a=2, b=2, c=2, d=2), 3, "balanced")) == wanted
    assert names(build_layout(specs(d=2, c=2, b=2, a=2), 3, "balanced")) == wanted


def test_strided_gives_layer_i_to_fragment_i_mod_p_in_the_order_of_the_model() -> None:
    assert names(build_layout(TRANSFORMER, 3, "strided")) == [
        ["blocks.2.mlp.weight", "blocks.2.norm.weight", "embed.weight"],
        ["blocks.0.mlp.weight", "blocks.0.norm.weight", "final.bias", "final.weight"],
        ["blocks.1.mlp.weight", "blocks.1.norm.weight", "temperature"],
    ]


def test_strided_counts_a_layer_by_its_first_number() -> None:
    tensors = specs(**{"h.0.experts.0.w": 3, "h.0.experts.1.w": 3, "h.1.experts.0.w": 3})
    assert names(build_layout(tensors, 2, "strided")) == [
        ["h.0.experts.0.w", "h.0.experts.1.w"],
        ["h.1.experts.0.w"],
    ]


@pytest.mark.parametrize(
    ("count", "kind", "have"),
    [(11, "balanced", "10 tensors"), (7, "strided", "6 blocks"), (4096, "strided", "6 blocks")],
)
def test_a_fragment_without_tensors_is_refused(count: int, kind: str, have: str) -> None:
    said = (
        rf"^\[rounds\] fragments: {count} are too many for a model of {have} "
        rf'with layout = "{kind}"; use fewer fragments$'
    )
    with pytest.raises(ConfigError, match=said):
        build_layout(TRANSFORMER, count, kind)  # type: ignore[arg-type]
    build_layout(TRANSFORMER, int(have.split()[0]), kind)  # type: ignore[arg-type]


def test_a_tensor_without_elements_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"^tensor hole has no elements; leave it out of the model's parameters$"):
        build_layout([TensorSpec("a", (2,)), TensorSpec("hole", (3, 0))], 1, "balanced")


shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)
models = st.dictionaries(
    st.from_regex(r"[a-c](\.[0-9]){0,2}(\.[wb])?", fullmatch=True), shapes, min_size=1, max_size=12
).map(lambda table: [TensorSpec(name, shape) for name, shape in table.items()])


@given(models, st.integers(1, 5), st.sampled_from(["balanced", "strided"]))
def test_every_tensor_lies_in_exactly_one_fragment(tensors: list[TensorSpec], count: int, kind: str) -> None:
    try:
        layout = build_layout(tensors, count, kind)  # type: ignore[arg-type]
    except ConfigError:
        assert len(tensors) < count or kind == "strided"
        return
    dealt = [tensor for fragment in layout.fragments for tensor in fragment.tensors]
    assert sorted(dealt, key=lambda t: t.name) == sorted(tensors, key=lambda t: t.name)
    assert len(layout.fragments) == count
    assert [fragment.index for fragment in layout.fragments] == list(range(count))
    assert layout.parameters == sum(tensor.size for tensor in tensors)
    for fragment in layout.fragments:
        own = [tensor.name for tensor in fragment.tensors]
        assert own
        assert own == sorted(own)
    if kind == "balanced":
        sizes = [fragment.size for fragment in layout.fragments]
        assert max(sizes) - min(sizes) <= max(tensor.size for tensor in tensors)
    layout.check_model(tensors)


@given(models, st.data())
def test_strided_never_splits_a_layer(tensors: list[TensorSpec], data: st.DataObject) -> None:
    try:
        layout = build_layout(tensors, data.draw(st.integers(1, 4)), "strided")
    except ConfigError:
        return
    home: dict[str, int] = {}
    for fragment in layout.fragments:
        for tensor in fragment.tensors:
            head, _, rest = tensor.name.partition(".")
            if rest[:1].isdigit():
                assert home.setdefault(f"{head}.{rest[0]}", fragment.index) == fragment.index


# ---- the layout as both sides compare it


def test_a_layout_survives_the_wire() -> None:
    layout = build_layout(TRANSFORMER, 3, "balanced")
    assert Layout.from_wire(layout.to_wire()) == layout
    assert Layout.from_wire(layout.to_wire()).digest == layout.digest


def test_equal_layouts_alone_have_equal_digests() -> None:
    base = build_layout(TRANSFORMER, 3, "balanced")
    renamed = [TensorSpec(t.name.replace("final", "last"), t.shape) for t in TRANSFORMER]
    turned = [TensorSpec(t.name, t.shape[::-1]) for t in TRANSFORMER]
    others = [
        build_layout(TRANSFORMER, 2, "balanced"),
        build_layout(TRANSFORMER, 3, "strided"),
        build_layout(renamed, 3, "balanced"),
        build_layout(turned, 3, "balanced"),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 5
    assert base.digest == build_layout(TRANSFORMER[::-1], 3, "balanced").digest
    assert len(base.digest) == 32


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (specs(a=2), r"^the model of this task lacks the run's tensor b; use the task and the options of the run$"),
        (specs(a=2, b=3, aa=1), r"^the model of this task has a tensor aa that the run lacks; use the task "),
        (specs(a=2, b=4), r"^tensor b is \[4\] in this task and \[3\] in the run; use the task "),
        ([TensorSpec("a", (2,)), TensorSpec("b", (1, 3))], r"^tensor b is \[1, 3\] in this task and \[3\] in the run"),
        (specs(b=4), r"^the model of this task lacks the run's tensor a;"),
    ],
)
def test_another_model_is_told_its_first_difference(tensors: list[TensorSpec], said: str) -> None:
    layout = build_layout(specs(a=2, b=3), 2, "balanced")
    layout.check_model(specs(b=3, a=2))
    with pytest.raises(ConfigError, match=said):
        layout.check_model(tensors)


# ---- the flat vector


FRAGMENT = Fragment(0, (TensorSpec("a", (2, 3)), TensorSpec("b", ()), TensorSpec("c", (5,))))


def test_a_scalar_is_one_element() -> None:
    assert TensorSpec("s", ()).size == 1
    assert FRAGMENT.size == 12
    assert FRAGMENT.offsets == {"a": (0, 6), "b": (6, 7), "c": (7, 12)}


def test_flatten_lays_tensors_end_to_end_and_unflatten_takes_them_apart() -> None:
    arrays = {
        "c": np.arange(7, 12, dtype=np.float32),
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(6, dtype=np.float32),
    }
    flat = FRAGMENT.flatten(arrays)
    assert flat.dtype == np.float32
    assert flat.tolist() == list(range(12))
    back = FRAGMENT.unflatten(flat)
    assert {name: array.shape for name, array in back.items()} == {"a": (2, 3), "b": (), "c": (5,)}
    for name, array in back.items():
        np.testing.assert_array_equal(array, arrays[name])


def test_flatten_reads_arrays_in_row_order_whatever_their_memory() -> None:
    one = Fragment(0, (TensorSpec("a", (2, 3)),))
    assert one.flatten({"a": np.array([[0, 3], [1, 4], [2, 5]], np.float32).T}).tolist() == [0, 1, 2, 3, 4, 5]


def test_unflatten_gives_views() -> None:
    flat = np.zeros(12, np.float32)
    parts = FRAGMENT.unflatten(flat)
    parts["b"][...] = 1
    parts["a"][1, 2] = 2
    assert flat.tolist() == [0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0]


def test_chunks_never_cross_tensors() -> None:
    assert FRAGMENT.chunks(4) == [Chunk(0, 4), Chunk(4, 6), Chunk(6, 7), Chunk(7, 11), Chunk(11, 12)]
    assert FRAGMENT.chunks(6) == [Chunk(0, 6), Chunk(6, 7), Chunk(7, 12)]
    assert FRAGMENT.chunks() == FRAGMENT.chunks(CHUNK_ELEMENTS) == FRAGMENT.chunks(6)


# ---- digests of versions


@given(st.integers(0, 11), st.integers(0, 31), st.integers(1, 7))
def test_any_changed_bit_changes_the_digest(at: int, bit: int, elements: int) -> None:
    flat = np.linspace(-1, 1, 12, dtype=np.float32)
    chunks = FRAGMENT.chunks(elements)
    before = digest_flat(flat, chunks)
    assert digest_flat(flat.copy(), chunks) == before
    flat.view(np.uint32)[at] ^= np.uint32(1 << bit)
    assert digest_flat(flat, chunks) != before


def test_even_the_sign_of_zero_changes_the_digest() -> None:
    zeros, chunks = np.zeros(12, np.float32), FRAGMENT.chunks()
    assert digest_flat(zeros, chunks) != digest_flat(-zeros, chunks)


def test_swapped_chunks_change_the_digest() -> None:
    flat, chunks = np.arange(12, dtype=np.float32), [Chunk(0, 6), Chunk(6, 12)]
    assert digest_flat(flat, chunks) != digest_flat(flat, chunks[::-1])


def test_the_digest_of_a_version_is_pinned() -> None:
    """Both sides must agree on it for ever: a changed digest reads as damaged weights."""
    flat = np.arange(12, dtype=np.float32)
    assert digest_flat(flat, FRAGMENT.chunks()) == "af46cfffd834dbf7ce7bcbe22b2c059a"
    assert (
        combine_digests(digest_chunk(flat[c.start : c.stop]) for c in FRAGMENT.chunks())
        == "af46cfffd834dbf7ce7bcbe22b2c059a"
    )
