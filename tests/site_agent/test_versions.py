"""A version that came is the anchor moved along, on all cores, and is what its digest says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shared.errors import FormatError
from shared.files import DISK
from shared.fragments import CHUNK_ELEMENTS, F32, Fragment, TensorSpec, digest_flat
from shared.wire import Header, encode_flat, open_container, tensor_table
from site_agent.contribution import Address, Anchor
from site_agent.history import History
from site_agent.versions import Versions

FRAGMENT = Fragment(0, (TensorSpec("a", (2 * CHUNK_ELEMENTS + 7,)), TensorSpec("b", (3, 5))))
ADDRESS = Address("run", FRAGMENT)


def values(seed: int) -> F32:
    return np.random.default_rng(seed).standard_normal(FRAGMENT.size, dtype=np.float32)


def body(kind: str, codec: str, flat: F32, digest: str) -> bytes:
    fields = {"kind": kind, "run": "run", "site": "", "fragment": 0, "base_version": 3, "version": 4, "digest": digest}
    fields |= {"codec": codec, "zstd": True, "chunk": CHUNK_ELEMENTS, "tensors": tensor_table(FRAGMENT)}
    header = Header.model_validate({**fields, "tokens": 80, "steps": 0, "sizes": []})
    return encode_flat(header, FRAGMENT, flat, 1)


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    return Versions([], "int8", History(tmp_path, DISK), lambda: None)


def test_a_delta_moves_a_copy_of_the_anchor(versions: Versions) -> None:
    anchor = Anchor(3, "0" * 32, 0, values(0))
    moved = values(0)
    with open_container(body("delta", "int8", values(1), "0" * 32), FRAGMENT) as container:
        container.add_to(moved)
    digest = digest_flat(moved, FRAGMENT.chunks())
    came = versions._apply(ADDRESS, anchor, body("delta", "int8", values(1), digest))
    assert (came.version, came.digest, came.tokens) == (4, digest, 80)
    assert came.flat.tobytes() == moved.tobytes()
    assert anchor.flat.tobytes() == values(0).tobytes()


def test_a_snapshot_is_the_version(versions: Versions) -> None:
    digest = digest_flat(values(2), FRAGMENT.chunks())
    assert versions._apply(ADDRESS, None, body("snapshot", "fp32", values(2), digest)).flat.tobytes() == (
        values(2).tobytes()
    )


def test_other_bits_than_the_digest_says_are_refused(versions: Versions) -> None:
    with pytest.raises(FormatError, match="came out as"):
        versions._apply(ADDRESS, None, body("snapshot", "fp32", values(2), "0" * 32))
