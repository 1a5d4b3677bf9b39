"""The command line: whatever goes wrong ends in one sentence, the right exit code, and no damage."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import site_agent.cli
from coordinator.service import Coordinator
from coordinator.store.state_dir import StateDir
from coordinator.tokens import check_token
from isthmus import app
from shared.config import load_run
from shared.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
TASK = """
import torch
from torch import nn


class Tiny:
    def __init__(self, options):
        pass

    def build_model(self):
        model = nn.Module()
        model.w = nn.Parameter(torch.ones(3))
        return model

    def train_batches(self, shard, batch_size):
        raise NotImplementedError

    def loss(self, model, batch):
        raise NotImplementedError
"""
RUN = """
[run]
name = "tiny"
tokens = 100
[task]
use = "task.py:Tiny"
[rounds]
fragments = 1
"""
SITE = """
[site]
name = "eu"
coordinator = "http://127.0.0.1:{port}"
patience_seconds = 0
[devices]
device = "cpu"
[metrics]
port = 0
"""


@dataclass
class Ended:
    """How a command ended: its exit code and what it said on stderr."""

    code: int
    said: str
    out: str


def isthmus(*arguments: object) -> Ended:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # in a terminal this is a traceback
    return Ended(result.exit_code, result.stderr, result.stdout)


def assert_one_sentence(ended: Ended, code: int, *says: str) -> None:
    lines = ended.said.splitlines()
    assert len(lines) == 1, ended.said
    assert lines[0].startswith("isthmus: ")
    for text in says:
        assert text in lines[0]
    assert ended.code == code
    assert ended.out == ""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory with a task, a run.toml and nothing else."""
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path


def serve(here: Path, *more: object, state: str = "state") -> Ended:
    return isthmus("coordinator", "serve", here / "run.toml", "--state", here / state, "--port", 0, *more)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as once:
        once.bind(("127.0.0.1", 0))
        return int(once.getsockname()[1])


@pytest.fixture
def served(here: Path) -> Path:
    """A state directory that belongs to the run `tiny`: a coordinator opened it once."""

    async def open_and_stop() -> None:
        await (await Coordinator.open(load_run(here / "run.toml"), here / "state", here)).stop()

    asyncio.run(open_and_stop())
    return here / "state"


def quietly(command: Callable[[], Ended]) -> Ended:
    """`command` without its log lines: what is left on stderr is for the person who typed it."""
    before = os.environ.get("ISTHMUS_LOG")
    os.environ["ISTHMUS_LOG"] = "error"
    try:
        return command()
    finally:
        os.environ.pop("ISTHMUS_LOG")
        if before is not None:
            os.environ["ISTHMUS_LOG"] = before


def contents(directory: Path) -> dict[str, bytes]:
    """Every file that matters below `directory`; the database's own helpers and the lock come and go."""
    ignored = ("-wal", "-shm", "lock")
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and not path.name.endswith(ignored))
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


# ---- coordinator serve


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("tokens = 100", "tokens = -1"), "[run] tokens: got -1"),
        (("tokens = 100", 'tokens = "many"'), "[run] tokens"),
        (("tokens = 100", "tokns = 100"), 'did you mean "tokens"?'),
        (("tokens = 100", ""), "[run] tokens: missing"),
        (('name = "tiny"', 'name = "Tiny Run"'), "[run] name"),
        (("fragments = 1", "fragments = 0"), "[rounds] fragments: got 0"),
        (("fragments = 1", 'quorum = "most"'), "[rounds] quorum"),
        (("fragments = 1", "deadline_seconds = nan"), "[rounds] deadline_seconds"),
        (("fragments = 1", "blend = 0.5"), "[rounds] blend has no effect"),
        (("[rounds]", "[round]"), "unknown table"),
        (("[run]", "[run"), "is not TOML"),
    ],
)
def test_a_bad_run_config_is_refused_by_its_key_before_anything_starts(
    here: Path, change: tuple[str, str], says: str
) -> None:
    (here / "run.toml").write_text(RUN.replace(*change))
    assert_one_sentence(serve(here), 2, "run.toml", says)
    assert not (here / "state").exists()


def sharded(fragments: int = 2) -> str:
    """The run with two coordinators, and as many tensors as it has fragments."""
    urls = 'tokens = 100\ncoordinators = ["http://127.0.0.1:1", "http://127.0.0.1:2"]'
    return RUN.replace("tokens = 100", urls).replace("fragments = 1", f"fragments = {fragments}")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--shard is missing"),
        (["--shard", 2], "--shard 2 is none of the 2"),
        (["--shard", -1], "--shard -1 is none"),
    ],
)
def test_one_of_several_coordinators_says_which_it_is(here: Path, options: list[object], says: str) -> None:
    (here / "run.toml").write_text(sharded())
    assert_one_sentence(serve(here, *options), 2, says)
    assert not (here / "state").exists()


def test_a_shard_of_a_run_that_has_none_is_refused(here: Path) -> None:
    assert_one_sentence(serve(here, "--shard", 0), 2, "--shard 0 without [run] coordinators")
    assert not (here / "state").exists()


def test_more_coordinators_than_fragments_are_refused(here: Path) -> None:
    (here / "run.toml").write_text(sharded(fragments=1))
    assert_one_sentence(serve(here, "--shard", 0), 2, "run.toml", "leaves some without a fragment")
    assert not (here / "state").exists()


def test_a_run_config_that_is_not_there_is_told(here: Path) -> None:
    ended = isthmus("coordinator", "serve", here / "none.toml", "--state", here / "state")
    assert_one_sentence(ended, 2, "none.toml: no such file")
    assert_one_sentence(isthmus("coordinator", "serve", here, "--state", here / "state"), 2, "cannot be read")
    (here / "run.toml").write_bytes(b"\xff\xfe")
    assert_one_sentence(serve(here), 2, "cannot be read")
    assert not (here / "state").exists()


@pytest.mark.parametrize(
    ("use", "says"),
    [
        ("none.py:Tiny", "no file"),
        ("task.py:Other", "has no class 'Other'"),
        ("broken.py:Tiny", "cannot be imported: NameError"),
        ("no-such-task", "no task 'no-such-task' is installed"),
        ("task.py:Empty", "lacks build_model"),
    ],
)
def test_a_task_that_cannot_be_had_is_told(here: Path, use: str, says: str) -> None:
    (here / "broken.py").write_text("undefined")
    (here / "task.py").write_text(TASK + "\n\nclass Empty:\n    pass\n")
    (here / "run.toml").write_text(RUN.replace("task.py:Tiny", use))
    assert_one_sentence(serve(here), 2, "[task] use", says)


def test_more_fragments_than_tensors_are_refused(here: Path) -> None:
    (here / "run.toml").write_text(RUN.replace("fragments = 1", "fragments = 2"))
    assert_one_sentence(serve(here), 2, "[rounds] fragments: 2 are too many")


def test_initial_weights_that_do_not_fit_are_refused(here: Path) -> None:
    (here / "run.toml").write_text(RUN.replace("tokens = 100", 'tokens = 100\ninit = "w.safetensors"'))
    assert_one_sentence(serve(here), 2, "[run] init", "cannot be read")
    (here / "w.safetensors").write_bytes(b"garbage")
    assert_one_sentence(serve(here), 2, "[run] init", "cannot be read")


def test_a_port_in_use_is_told(here: Path, taken_port: int) -> None:
    ended = quietly(lambda: serve(here, "--port", taken_port))
    assert_one_sentence(ended, 2, f"port 127.0.0.1:{taken_port} is in use", "--port")
    assert not (here / "state").exists()


def test_an_interrupt_ends_a_start_at_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recovery may take minutes, and can be broken off anywhere; Python's own handler would wait for its thread."""
    before, during = signal.getsignal(signal.SIGINT), []

    async def opening(*_: object, **__: object) -> None:
        during.append(signal.getsignal(signal.SIGINT))
        raise ConfigError("enough")

    monkeypatch.setattr(Coordinator, "open", opening)
    assert_one_sentence(serve(here), 2, "enough")
    assert during == [signal.SIG_DFL]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_host_that_cannot_be_had_is_told(here: Path) -> None:
    ended = quietly(lambda: serve(here, "--host", "192.0.2.1", "--port", 0))
    assert_one_sentence(ended, 2, "cannot listen on 192.0.2.1:0", "--host")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", ""])
def test_insecure_is_refused_beyond_loopback(here: Path, host: str) -> None:
    assert_one_sentence(serve(here, "--insecure", "--host", host), 2, "--insecure", "loopback only")
    assert not (here / "state").exists()


def test_half_of_the_tls_options_is_refused(here: Path) -> None:
    (here / "pem").write_text("not a certificate")
    pem = here / "pem"
    for options, says in (
        (["--tls-cert", pem], "go together"),
        (["--tls-key", pem], "go together"),
        (["--client-ca", pem], "--client-ca needs"),
        (["--tls-cert", pem, "--tls-key", pem], "cannot be used"),
        (["--tls-cert", here / "none", "--tls-key", pem], "cannot be used"),
    ):
        assert_one_sentence(serve(here, *options), 2, "--tls-cert", says)
    assert not (here / "state").exists()


def test_a_state_directory_that_is_held_names_its_holder_and_is_left_alone(here: Path, served: Path) -> None:
    before = contents(served)
    holder = StateDir.hold(served)
    try:
        ended = serve(here, "--port", 0)
    finally:
        holder.close()
    assert_one_sentence(ended, 2, "held by another live coordinator", f"process {os.getpid()}")
    assert contents(served) == before


def test_the_state_directory_of_another_run_is_refused_and_left_alone(here: Path, served: Path) -> None:
    before = contents(served)
    (here / "run.toml").write_text(RUN.replace('name = "tiny"', 'name = "other"'))
    assert_one_sentence(serve(here, "--port", 0), 2, "belongs to another run", "[run] name", "'tiny'", "'other'")
    assert contents(served) == before


def test_a_state_that_is_a_file_is_told(here: Path) -> None:
    assert_one_sentence(serve(here, state="run.toml"), 2, "cannot be made", "--state")


def test_a_corrupt_journal_is_a_fault_and_is_left_as_it_is(here: Path) -> None:
    (here / "state").mkdir()
    (here / "state" / "journal.sqlite").write_bytes(b"garbage " * 1000)
    assert_one_sentence(serve(here), 4, "journal.sqlite is corrupt", "restore")
    assert (here / "state" / "journal.sqlite").read_bytes() == b"garbage " * 1000


def test_a_broken_checkpoint_is_a_fault_that_names_the_file(here: Path, served: Path) -> None:
    (checkpoint,) = (served / "checkpoints").glob("*.safetensors")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1] + b"\x77")
    ended = quietly(lambda: serve(here))
    assert ended.code == 4
    assert ended.said.splitlines()[-1].startswith("isthmus: checkpoint ")
    assert checkpoint.name in ended.said
    assert "Traceback" not in ended.said


# ---- coordinator export, token, status


def test_an_export_of_something_else_is_told_and_writes_nothing(here: Path) -> None:
    for path in (here, here / "nowhere", here / "run.toml"):
        ended = isthmus("coordinator", "export", path, here / "out.safetensors")
        assert_one_sentence(ended, 2, "is not a coordinator's state directory")
    assert not (here / "out.safetensors").exists()
    assert not (here / "nowhere").exists()


def test_an_export_of_a_run_works_and_one_that_cannot_be_written_is_told(here: Path, served: Path) -> None:
    before = contents(served)
    assert isthmus("coordinator", "export", served, here / "out.safetensors").code == 0
    assert (here / "out.safetensors").is_file()
    ended = isthmus("coordinator", "export", served, here / "run.toml" / "out.safetensors")
    assert_one_sentence(ended, 2, "cannot be written")
    assert contents(served) == before


def test_a_sharded_model_is_exported_from_all_its_directories_or_not_at_all(here: Path) -> None:
    (here / "task.py").write_text(
        TASK.replace("        return model", "        model.v = nn.Parameter(torch.ones(2))\n        return model")
    )
    (here / "run.toml").write_text(sharded())

    async def open_and_stop(shard: int) -> None:
        config = load_run(here / "run.toml")
        await (await Coordinator.open(config, here / str(shard), here, shard=shard)).stop()

    for shard in (0, 1):
        asyncio.run(open_and_stop(shard))
    ended = isthmus("coordinator", "export", here / "1", here / "w.safetensors", "--with", here / "0")
    assert (ended.code, "versions [0, 0]" in ended.out) == (0, True)
    for command in (["coordinator", "export", here / "1", here / "x"], ["sample", here / "1", "--prompt", "x"]):
        assert_one_sentence(isthmus(*command), 2, "name with --with the state directory of coordinator 0")
    assert not (here / "x").exists()


def test_an_export_of_a_directory_without_a_run_is_told(here: Path) -> None:
    isthmus("coordinator", "token", "add", "eu", "--state", here / "state")
    ended = isthmus("coordinator", "export", here / "state", here / "out.safetensors")
    assert_one_sentence(ended, 2, "no run yet")


def test_tokens_are_added_listed_replaced_and_revoked(here: Path) -> None:
    state = ("--state", here / "state")
    first = isthmus("coordinator", "token", "add", "eu", *state)
    second = isthmus("coordinator", "token", "add", "eu", *state)
    assert (first.code, second.code) == (0, 0)
    assert first.out != second.out
    assert len(first.out.strip()) == 43
    assert isthmus("coordinator", "token", "list", *state).out == "eu\tvalid\n"
    assert isthmus("coordinator", "token", "revoke", "eu", *state).code == 0
    assert isthmus("coordinator", "token", "list", *state).out == "eu\trevoked\n"
    assert_one_sentence(isthmus("coordinator", "token", "revoke", "eu", *state), 2, "no valid token")


def test_one_token_serves_at_every_coordinator(here: Path) -> None:
    made = isthmus("coordinator", "token", "add", "eu", "--state", here / "first")
    (here / "eu.token").write_text(made.out)
    taken = isthmus("coordinator", "token", "add", "eu", "--state", here / "second", "--token-file", here / "eu.token")
    assert (taken.code, taken.out) == (0, "")
    for state in ("first", "second"):
        store = StateDir(here / state, read_only=True)
        assert check_token(store.journal, "eu", made.out.strip())
        store.close()
    ended = isthmus("coordinator", "token", "add", "eu", "--state", here / "third", "--token-file", here / "run.toml")
    assert_one_sentence(ended, 2, "does not hold what `isthmus coordinator token add` printed")
    assert not (here / "third").exists()


@pytest.mark.parametrize("name", ["EU", "eu west", "../eu", "e" * 65])
def test_a_token_for_a_name_that_cannot_be_is_refused(here: Path, name: str) -> None:
    ended = isthmus("coordinator", "token", "add", name, "--state", here / "state")
    assert_one_sentence(ended, 2, "cannot be a site's name")


def test_tokens_of_something_else_are_told_and_nothing_is_made(here: Path) -> None:
    for command in (["list"], ["revoke", "eu"]):
        ended = isthmus("coordinator", "token", *command, "--state", here / "nowhere")
        assert_one_sentence(ended, 2, "is not a coordinator's state directory")
    assert not (here / "nowhere").exists()


@contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """A port on which whatever is asked is answered with these bytes, once."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def talk() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        thread = threading.Thread(target=talk, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def http(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


def test_the_status_of_a_coordinator_that_is_not_there_is_a_fault(closed_port: int) -> None:
    ended = isthmus("coordinator", "status", "--url", f"http://127.0.0.1:{closed_port}")
    assert_one_sentence(ended, 4, f"no coordinator answers at http://127.0.0.1:{closed_port}", "--url")


@pytest.mark.parametrize(
    ("url", "code"),
    [("nonsense", 2), ("127.0.0.1:8470", 2), ("ftp://127.0.0.1:1/x", 2), ("http://", 4), ("http://[::1", 4)],
)
def test_the_status_of_an_address_that_is_none_is_told(url: str, code: int) -> None:
    assert_one_sentence(isthmus("coordinator", "status", "--url", url), code, "--url")


def test_a_start_that_is_refused_leaves_nothing(here: Path) -> None:
    (here / "run.toml").write_text(RUN.replace("fragments = 1", "fragments = 2"))
    assert serve(here).code == 2
    assert not (here / "state").exists()
    (here / "empty").mkdir()
    assert serve(here, state="empty").code == 2
    assert list((here / "empty").iterdir()) == []


def test_a_start_that_is_refused_keeps_the_tokens_that_were_there(here: Path) -> None:
    assert isthmus("coordinator", "token", "add", "eu", "--state", here / "state").code == 0
    (here / "run.toml").write_text(RUN.replace("fragments = 1", "fragments = 2"))
    assert serve(here).code == 2
    assert "eu\tvalid" in isthmus("coordinator", "token", "list", "--state", here / "state").out


def test_the_program_says_its_version() -> None:
    ended = isthmus("--version")
    assert (ended.code, ended.out.split()[0]) == (0, "isthmus")


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"a": 1}', b"\xff"])
def test_the_status_of_something_else_is_a_fault(body: bytes) -> None:
    with answering(http(body)) as port:
        assert_one_sentence(isthmus("coordinator", "status", "--url", f"http://127.0.0.1:{port}"), 4, "--url")


def test_the_status_of_a_server_that_hangs_up_is_a_fault() -> None:
    with answering(b"") as port:
        assert_one_sentence(isthmus("coordinator", "status", "--url", f"http://127.0.0.1:{port}"), 4, "--url")


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_the_status_of_a_server_that_refuses_is_a_fault() -> None:
    with answering(http(b"nothing here", "404 Not Found")) as port:
        assert_one_sentence(isthmus("coordinator", "status", "--url", f"http://127.0.0.1:{port}"), 4, "--url")
    gc.collect()  # urllib's error holds the connection, and nobody closes it: a matter of this test, not of the next


def test_the_status_of_a_port_that_is_no_number_is_a_fault() -> None:
    assert_one_sentence(isthmus("coordinator", "status", "--url", "http://127.0.0.1:http"), 4, "--url")


def test_the_status_of_a_server_that_does_not_speak_http_is_a_fault() -> None:
    with answering(b"SSH-2.0-OpenSSH_9.6\r\n") as port:
        assert_one_sentence(isthmus("coordinator", "status", "--url", f"http://127.0.0.1:{port}"), 4, "--url")


def test_the_status_of_another_program_that_has_runs_is_a_fault() -> None:
    with answering(http(json.dumps({"run": "of another kind"}).encode())) as port:
        assert_one_sentence(isthmus("coordinator", "status", "--url", f"http://127.0.0.1:{port}"), 4, "--url")


# ---- site run, site check


def site_toml(here: Path, port: int, *change: str) -> Path:
    path = here / "site.toml"
    path.write_text(SITE.format(port=port).replace(*change) if change else SITE.format(port=port))
    return path


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (('name = "eu"', 'name = "EU West"'), "[site] name"),
        (('name = "eu"', ""), "[site] name: missing"),
        (("http://", "tcp://"), "[site] coordinator"),
        (("patience_seconds = 0", "patience = 0"), "[site] patience: unknown key"),
        (("patience_seconds = 0", 'client_cert = "x"'), "client_cert and client_key go together"),
        (("[devices]", "[device]"), "unknown table"),
        (("[site]", "[site"), "is not TOML"),
    ],
)
def test_a_bad_site_config_is_refused_by_its_key(
    here: Path, closed_port: int, command: str, change: tuple[str, str], says: str
) -> None:
    ended = isthmus("site", command, site_toml(here, closed_port, *change))
    assert_one_sentence(ended, 2, "site.toml", says)


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_site_config_that_is_not_there_is_told(here: Path, command: str) -> None:
    assert_one_sentence(isthmus("site", command, here / "none.toml"), 2, "none.toml: no such file")


@pytest.mark.parametrize("content", [None, "", "two words", b"\xff\xfe"])
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_token_file_that_holds_no_token_is_told(
    here: Path, closed_port: int, command: str, content: str | bytes | None
) -> None:
    if content is not None:
        (here / "t").write_bytes(content.encode() if isinstance(content, str) else content)
    path = site_toml(here, closed_port, "patience_seconds = 0", 'patience_seconds = 0\ntoken_file = "t"')
    ended = isthmus("site", command, path)
    assert (ended.code, "[site] token_file" in ended.said) == (2, True)
    assert "Traceback" not in ended.said
    assert len(ended.said.splitlines()) == 1


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_coordinator_that_cannot_be_reached_is_a_fault(here: Path, closed_port: int, command: str) -> None:
    ended = isthmus("site", command, site_toml(here, closed_port))
    assert ended.code == 4
    assert len(ended.said.splitlines()) == 1
    assert f"the coordinator at http://127.0.0.1:{closed_port} cannot be reached" in ended.said
    assert not (here / "state").exists(), "nothing was written"


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_coordinator_that_is_something_else_is_told(here: Path, command: str) -> None:
    with answering(http(b"<html>not found</html>", "404 Not Found")) as port:
        ended = isthmus("site", command, site_toml(here, port))
    assert ended.code == 3
    assert len(ended.said.splitlines()) == 1
    assert "not from a coordinator" in ended.said


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("device", ['"abacus"', '"cuda"', '["cpu", "cuda:7"]'])
def test_a_device_that_is_not_here_is_told(here: Path, closed_port: int, command: str, device: str) -> None:
    if device == '"cuda"' and torch.cuda.is_available():
        pytest.skip("here it is")
    ended = isthmus("site", command, site_toml(here, closed_port, '"cpu"', device))
    assert_one_sentence(ended, 2, "[devices] device", '"cpu"')


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_list_of_devices_that_lacks_an_entry_is_told_before_a_start(
    here: Path, closed_port: int, command: str
) -> None:
    ended = isthmus("site", command, site_toml(here, closed_port, '"cpu"', '["cpu", "cpu"]\nthrottle = [0.5]'))
    assert_one_sentence(ended, 2, "[devices] throttle: a list of 1 for 2 devices")


@pytest.mark.parametrize("command", ["run", "check"])
def test_of_several_processes_one_says_what_is_wrong_with_the_config(
    here: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(torchrun has started them.)"""
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(site_agent.cli, "SAYING_SECONDS", 0.0)
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    assert isthmus("site", command, here / "none.toml").said == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "none.toml: no such file" in isthmus("site", command, here / "none.toml").said
    assert ended == [75, 2]


# ---- usage, and the shape of the tree


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["coordinator", "serve"],
        ["coordinator", "serve", "run.toml"],
        ["coordinator", "serve", "run.toml", "--state", "s", "--port", "99999"],
        ["coordinator", "export", "s", "o", "--format", "pickle"],
        ["coordinator", "token", "add"],
        ["site", "run"],
        ["demo", "--sites", "0"],
        ["link", "--listen", ":1"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    ended = isthmus(*arguments)
    assert ended.code == 2
    assert "Traceback" not in ended.said


def test_imports_point_one_way() -> None:
    """shared ← coordinator | site_agent ← lab; coordinator and site_agent never import each other."""
    program = Path(sys.executable).with_name("lint-imports")
    ended = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1 kept, 0 broken" in ended.stdout
