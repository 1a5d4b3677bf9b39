"""What a profile makes of the samples that perf prints."""

from __future__ import annotations

import pytest

from benchmarks.profiler import KINDS, _samples, kind_of, shares

PRINTED = """
python  100  12.000100:
\tffffffff81234567 _copy_to_iter ([kernel.kallsyms])
\tffffffff81234568 tcp_recvmsg_locked ([kernel.kallsyms])
\t    7f0000000001 [unknown] (/usr/lib/libc.so.6)

chunks_0  101  12.000600:
\t    7f0000000002 [unknown] ([JIT] tid 100)

chunks_1  102  99.000000:
\t    7f0000000002 [unknown] ([JIT] tid 100)
"""


@pytest.mark.parametrize(
    ("frames", "kind"),
    [
        (["1 _copy_to_iter ([kernel.kallsyms])", "2 tcp_recvmsg ([kernel.kallsyms])"], "tcp"),
        (["1 _copy_to_iter ([kernel.kallsyms])", "2 filemap_read ([kernel.kallsyms])"], "files"),
        (["1 finish_task_switch ([kernel.kallsyms])", "2 futex_wait ([kernel.kallsyms])"], "other"),
        (["1 [unknown] (/tmp/perf-12.map)", "2 x (/usr/lib/libpython3.11.so.1.0)"], "kernels"),
        (["1 XXHL128 (/a/_xxhash.cpython-311-x86_64-linux-gnu.so)"], "digests"),
        (["1 hash_many (/a/blake3.cpython-311-x86_64-linux-gnu.so)"], "names"),
        (["1 _PyEval_EvalFrameDefault (/usr/lib/libpython3.11.so.1.0)"], "python"),
        (["1 memmove (/usr/lib/libc.so.6)"], "other"),
        ([], "other"),
    ],
)
def test_a_stack_is_one_kind_of_work(frames: list[str], kind: str) -> None:
    assert kind_of(frames) == kind


def test_shares_are_of_the_samples_within_the_windows() -> None:
    samples = list(_samples(PRINTED))
    assert [at for at, _ in samples] == [12.0001, 12.0006, 99.0]
    found = shares(samples, [(12.0, 13.0)])
    assert found == {**dict.fromkeys(KINDS, 0.0), "tcp": 0.5, "kernels": 0.5}
    assert shares(samples, [(13.0, 14.0)]) == {}
