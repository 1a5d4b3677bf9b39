"""An outer round end to end: a real coordinator (process, HTTP on loopback, state on disk), K sites that do not train.

A round begins when all sites begin to send and ends when the last one has the new delta. Every site sends its whole
contribution in parts and is acknowledged once it is durable; the coordinator merges, publishes, and every site
receives the delta over its long poll. Medians over the rounds of a row; each row has a coordinator of its own.

`merge_seconds` is what the coordinator's merges took, `tcp_seconds` what the same bytes take between plain sockets on
this machine (K streams in, then K out), measured beside it. `loop_lag_seconds` is the longest lag of the coordinator's
event loop, `idle_lag_seconds` that of a process beside it which only sleeps; `peak_rss_bytes` is the coordinator's peak
memory, `cpu_seconds` its processor time for a round. `bound_fraction` is the merge's (see benchmarks.merge) over the
whole round.

Where the time goes is sampled in as many rounds more (see benchmarks.profiler; null without perf), in the coordinator
and in the sites, which is both ends of the kernel's TCP: `share_kernels` is that of the numba kernels, `share_digests`
of the XXH3 of what they wrote, `share_tcp` of the network; `kernel_share` is the three together. The rest is
`share_files` (spool, blobs, their syncs), `share_names` (BLAKE3 of what comes and goes), `share_python` (both ends),
`share_other`.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.apart import status_bytes
from benchmarks.machine import IdleLag, arguments, copy_bytes_per_second, report, touch_memory
from benchmarks.merge import STATE_BYTES
from benchmarks.processes import free_port, write_toml
from benchmarks.profiler import KINDS, Profile
from benchmarks.stubs import RECEIVE_BYTES, Stub
from coordinator.lag import WINDOW_SECONDS
from lab.fleet import Child, Fleet, coordinator_status
from shared.codecs import codec_named
from shared.fragments import CHUNK_ELEMENTS

TASK = '''
import torch
from torch import nn
from shared.task import Task

class Flat(Task):
    """Matrices of zeros, as many as it takes; nobody trains them."""

    def __init__(self, options):
        self._layers = int(options["layers"])

    def build_model(self):
        return nn.ParameterList([nn.Parameter(torch.zeros(1024, 1024)) for _ in range(self._layers)])

    def train_batches(self, shard, batch_size):
        raise NotImplementedError

    def eval_batches(self, batch_size):
        return None

    def loss(self, model, batch):
        raise NotImplementedError
'''
TCP_SERVER = """
import socket, sys, threading
listener = socket.create_server(("127.0.0.1", 0), backlog=128)
print(listener.getsockname()[1], flush=True)
block = memoryview(bytearray(1 << 20))

def serve(peer):
    buffer = memoryview(bytearray(1 << 20))
    while order := peer.recv(16, socket.MSG_WAITALL):
        up, down = int.from_bytes(order[:8], "big"), int.from_bytes(order[8:], "big")
        while up:
            up -= peer.recv_into(buffer, min(up, len(buffer)))
        while down:
            down -= peer.send(block[:min(down, len(block))])

while True:
    peer, _ = listener.accept()
    threading.Thread(target=serve, args=(peer,), daemon=True).start()
"""
SETTLE_SECONDS = 0.5
"""Until perf has begun."""
TOUCHED_BYTES = 6 << 30
"""More than the files of a row's rounds."""
SPENT_WELL = ("kernels", "digests", "tcp")


def measure(layers: int, sites: int, upload: str, publish: str, rounds: int) -> dict[str, Any]:
    """One row; the first round is not counted."""
    with tempfile.TemporaryDirectory(prefix="isthmus-round-") as directory, Fleet(Path(directory)) as fleet:
        port = free_port()
        child = _start(fleet, port, layers, sites, upload, publish)
        sections = _sections(layers, upload)
        stubs = [Stub(f"site-{n:03d}", port, sections, upload, _lanes(sites)) for n in range(sites)]
        with ThreadPoolExecutor(sites) as pool:
            list(pool.map(Stub.join, stubs))
            _until_started(port)
            _round(pool, stubs, port, child)
            time.sleep(WINDOW_SECONDS)  # the largest lag of what went before is forgotten
            touch_memory(TOUCHED_BYTES)
            with IdleLag() as idle:
                found = [_round(pool, stubs, port, child) for _ in range(rounds)]
            with Profile([child.process.pid, os.getpid()], Path(directory)) as profile:
                time.sleep(SETTLE_SECONDS)
                touch_memory(TOUCHED_BYTES)
                windows = [_round(pool, stubs, port, child)["window"] for _ in range(rounds)]
            for stub in stubs:
                stub.close()
        shares = profile.shares(windows)
        up, down = found[0]["up"], found[0]["down"]
        parameters, seconds = layers << 20, statistics.median(each["seconds"] for each in found)
        tcp = statistics.median(_tcp(sites, up // sites, down // sites) for _ in range(rounds))
        merge = statistics.median(each["merge"] for each in found)
        return {
            "params": parameters,
            "contributions": sites,
            "upload": upload,
            "publish": publish,
            "merge": "mean",
            "seconds": seconds,
            "merge_seconds": merge,
            "tcp_seconds": tcp,
            "kernel_share": sum(shares[kind] for kind in SPENT_WELL) if shares else None,
            **{f"share_{kind}": shares.get(kind) for kind in KINDS if kind != "zstd"},
            "params_per_second": parameters / seconds,
            "bytes_moved": up + STATE_BYTES * parameters + down // sites,
            "bytes_up_per_param": up / sites / parameters,
            "bytes_down_per_param": down / sites / parameters,
            "loop_lag_seconds": max(each["lag"] for each in found),
            "idle_lag_seconds": idle.seconds,
            "cpu_seconds": statistics.median(each["cpu"] for each in found),
            "peak_rss_bytes": status_bytes("VmHWM", child.process.pid),
        }


def _lanes(sites: int) -> int:
    """Connections of a site: as in production where there are few, and not more than a machine has use for."""
    return max(1, min(4, 8 // sites))


def _start(fleet: Fleet, port: int, layers: int, sites: int, upload: str, publish: str) -> Child:
    (fleet.directory / "flat.py").write_text(TASK, encoding="utf-8")
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "round", "tokens": 10**9, "min_sites": sites},
        "task": {"use": "flat.py:Flat", "layers": layers},
        "inner": {"batch_size": 1, "steps": 1},
        "rounds": {"fragments": 1, "quorum": "all", "overlap_steps": 0},
        "wire": {"upload": upload, "publish": publish, "zstd_level": 0},
    }
    write_toml(fleet.directory / "run.toml", tables)
    serve = ["coordinator", "serve", "run.toml", "--state", "state", "--port", str(port), "--insecure"]
    child = fleet.start("coordinator", ["isthmus", *serve])
    while coordinator_status(f"http://127.0.0.1:{port}") is None:
        fleet.check()
        time.sleep(0.05)
    return child


def _sections(layers: int, upload: str) -> list[memoryview]:
    """A contribution of normal values; the same chunk again and again, which costs as much to decode as others."""
    x = 1e-3 * np.random.default_rng(0).standard_normal(CHUNK_ELEMENTS, dtype=np.float32)
    section = codec_named(upload).encode(x).data
    return [section] * (layers * (1 << 20) // CHUNK_ELEMENTS)


def _until_started(port: int) -> None:
    while (coordinator_status(f"http://127.0.0.1:{port}") or {}).get("state") != "training":
        time.sleep(0.05)


def _round(pool: ThreadPoolExecutor, stubs: list[Stub], port: int, child: Child) -> dict[str, Any]:
    sizes = list(pool.map(Stub.prepare, stubs))
    list(pool.map(lambda stub: stub.beat("training"), stubs))
    before, cpu = _metric(port, "isthmus_merge_seconds_sum"), _cpu_seconds(child)
    began = time.monotonic()

    def go(stub: Stub) -> int:
        stub.contribute()
        return stub.follow()

    received = list(pool.map(go, stubs))
    ended = time.monotonic()
    return {
        "seconds": ended - began,
        "window": (began, ended),
        "up": sum(sizes),
        "down": sum(received),
        "merge": _metric(port, "isthmus_merge_seconds_sum") - before,
        "lag": _metric(port, "isthmus_event_loop_lag_seconds"),
        "cpu": _cpu_seconds(child) - cpu,
    }


def _metric(port: int, name: str) -> float:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        f"http://127.0.0.1:{port}/metrics"
    ) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.split()[0] == name)


def _cpu_seconds(child: Child) -> float:
    fields = Path(f"/proc/{child.process.pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _tcp(streams: int, up: int, down: int) -> float:
    """Seconds that plain sockets take for `streams` times `up` bytes to another process, and then `down` bytes back."""
    with _tcp_server() as port:
        peers = [socket.create_connection(("127.0.0.1", port)) for _ in range(streams)]
        block = memoryview(bytearray(RECEIVE_BYTES))
        sent = threading.Barrier(streams)

        def exchange(peer: socket.socket) -> None:
            buffer, left = memoryview(bytearray(RECEIVE_BYTES)), up
            peer.sendall(up.to_bytes(8, "big") + down.to_bytes(8, "big"))
            while left:
                left -= peer.send(block[: min(left, len(block))])
            sent.wait()
            left = down
            while left:
                left -= peer.recv_into(buffer, min(left, len(buffer)))

        with ThreadPoolExecutor(streams) as pool:
            began = time.perf_counter()
            list(pool.map(exchange, peers))
            seconds = time.perf_counter() - began
        for peer in peers:
            peer.close()
        return seconds


@contextmanager
def _tcp_server() -> Iterator[int]:
    server = subprocess.Popen([sys.executable, "-c", TCP_SERVER], stdout=subprocess.PIPE, text=True)
    try:
        if server.stdout is None:
            raise AssertionError("a pipe was asked for")
        yield int(server.stdout.readline())
    finally:
        server.kill()
        server.wait()


def main() -> None:
    """Prints the table, and with --json writes it."""
    options = arguments(__doc__ or "").parse_args()
    copy = copy_bytes_per_second()
    cases = [(10, k, "int4", "int8") for k in (2, 4, 8, 32)] + [(48, k, "int4", "int8") for k in (2, 4, 8, 32)]
    cases += [(10, 4, "fp32", "fp32")]
    rounds = 3 if options.quick else 7
    rows = []
    for layers, sites, upload, publish in cases:
        row = measure(layers, sites, upload, publish, rounds)
        row["bound_fraction"] = row["bytes_moved"] / copy / row["seconds"]
        rows.append(row)
    report(f"an outer round on loopback, medians of {rounds}", copy, rows, options.json)


if __name__ == "__main__":
    main()
