"""What is known of the links of those who read."""

from __future__ import annotations

from coordinator.readers import LEAST_BYTES, REMEMBERED, Readers


def test_the_slowest_reader_counts_by_its_last_rate() -> None:
    readers = Readers()
    assert readers.slowest is None
    readers.received("eu", 10 << 20, 1.0)
    readers.received("us", 10 << 20, 10.0)
    assert readers.slowest == 1 << 20
    readers.received("us", 10 << 20, 0.5)
    assert readers.slowest == 10 << 20


def test_what_fits_the_kernels_buffers_says_nothing() -> None:
    readers = Readers()
    readers.received("eu", LEAST_BYTES - 1, 100.0)
    assert readers.slowest is None


def test_it_does_not_grow_with_names() -> None:
    readers = Readers()
    for n in range(REMEMBERED + 1):
        readers.received(f"site-{n}", LEAST_BYTES, float(1 + (n == 0) * 9))
    assert readers.slowest == LEAST_BYTES, "the first one is forgotten"
