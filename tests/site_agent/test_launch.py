"""The processes of a machine, and what becomes of the site when they end. torch's launcher is replaced by a fake: what
it does itself is in tests/e2e/test_ranks.py."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from shared.config import SiteConfig, parse
from shared.errors import ConfigError
from site_agent import launch as launch_module
from site_agent.launch import SOUND_SECONDS, TRIES, launch, processes_of

LOST = 75


def config(**devices: Any) -> SiteConfig:
    site = {"name": "eu", "coordinator": "http://127.0.0.1:1", "stop_seconds": 12}
    return parse(SiteConfig, {"site": site, "devices": {"device": ["cpu", "cpu"], **devices}}, "site.toml")


class Fake:
    """A launcher whose runs end as they are told to, each after so many seconds."""

    def __init__(self, *ends: Exception | None, seconds: float = 1.0) -> None:
        self.ends, self.seconds, self.now = iter(ends), seconds, 0.0
        self.settings: list[Any] = []
        self.started: list[tuple[str, ...]] = []

    def __call__(self, settings: Any, program: str) -> Callable[..., None]:
        self.settings.append(settings)

        def run(*arguments: str) -> None:
            self.started.append(arguments)
            self.now += self.seconds
            if (end := next(self.ends)) is not None:
                raise end

        return run


def died(*codes: int) -> ChildFailedError:
    """Processes that ended with these codes, in the order of their ranks; negative by a signal."""
    failures = {rank: ProcessFailure(rank, 100 + rank, code, "no file") for rank, code in enumerate(codes)}
    return ChildFailedError("isthmus", failures)


def stopped(number: signal.Signals) -> SignalException:
    return SignalException("stopped", number)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Fake]]:
    """Replaces torch's launcher by one whose runs end like this."""
    for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "set")  # and as it was afterwards
        monkeypatch.delenv(name)
    elastic = {name: logging.getLogger(name).level for name in loggers()}

    def replaced(*ends: Exception | None, seconds: float = 1.0) -> Fake:
        fake = Fake(*ends, seconds=seconds)
        monkeypatch.setattr(launch_module, "elastic_launch", fake)
        monkeypatch.setattr(time, "monotonic", lambda: fake.now)
        return fake

    yield replaced
    for name, level in elastic.items():
        logging.getLogger(name).setLevel(level)


def loggers() -> list[str]:
    return [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]


def test_a_process_is_started_for_each_device(ends: Callable[..., Fake]) -> None:
    fake = ends(None)
    assert launch(config(device=["cpu"] * 3), ["site", "run", "site.toml"]) == 0
    (settings,) = fake.settings
    assert (settings.nproc_per_node, settings.min_nodes, settings.max_restarts) == (3, 1, 0)
    assert settings.shutdown_timeout > 12, "more than [site] stop_seconds"
    assert fake.started == [("-m", "isthmus", "site", "run", "site.toml")]


def test_torch_says_nothing_about_it(ends: Callable[..., Fake]) -> None:
    ends(None)
    launch(config(), [])
    assert loggers()
    assert not any(logging.getLogger(name).isEnabledFor(logging.ERROR) for name in loggers())


@pytest.mark.parametrize("code", [2, 3, 4, 130, 143])
def test_exit_codes_that_a_new_start_does_not_help_are_passed_on(ends: Callable[..., Fake], code: int) -> None:
    fake = ends(died(code), None)
    assert launch(config(), []) == code
    assert len(fake.started) == 1


@pytest.mark.parametrize("codes", [(2, LOST), (LOST, 2)])
def test_the_exit_code_of_the_process_that_knows_why_counts(ends: Callable[..., Fake], codes: tuple[int, int]) -> None:
    fake = ends(died(*codes), None)
    assert launch(config(), []) == 2
    assert len(fake.started) == 1


@pytest.mark.parametrize(
    ("codes", "says"),
    [
        ((-9,), "killed, as for want of memory"),
        ((LOST, -9), "killed, as for want of memory"),
        ((1, -9), "killed, as for want of memory"),
        ((-11, LOST), "signal 11"),
        ((LOST, 1), "exit code 1"),
        ((143, -9), "killed, as for want of memory"),  # another learner, which the launcher stopped for it
        ((143, LOST), f"exit code {LOST}"),
        ((1,), "exit code 1"),
    ],
)
def test_all_are_started_again_when_one_has_died(
    ends: Callable[..., Fake], caplog: pytest.LogCaptureFixture, codes: tuple[int, ...], says: str
) -> None:
    fake = ends(died(*codes), None)
    assert launch(config(), ["site", "run", "site.toml"]) == 0
    assert len(fake.started) == 2
    assert f"a process of this site died ({says}); starting all again from the last checkpoint" in caplog.text


def test_it_is_given_up_when_processes_die_several_times_in_a_row(
    ends: Callable[..., Fake], caplog: pytest.LogCaptureFixture
) -> None:
    fake = ends(*[died(-9)] * TRIES, None)
    assert launch(config(), []) == 4
    assert len(fake.started) == TRIES
    assert "3 times in a row; giving up" in caplog.text


def test_who_has_trained_for_long_has_all_tries_again(ends: Callable[..., Fake]) -> None:
    fake = ends(*[died(-9)] * 5 * TRIES, None, seconds=SOUND_SECONDS)
    assert launch(config(), []) == 0
    assert len(fake.started) == 5 * TRIES + 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_is_passed_on_as_a_shell_would_say_it(
    ends: Callable[..., Fake], number: signal.Signals, code: int
) -> None:
    fake = ends(stopped(number), None)
    assert launch(config(), []) == code
    assert len(fake.started) == 1


def test_a_check_is_never_started_again(ends: Callable[..., Fake], caplog: pytest.LogCaptureFixture) -> None:
    fake = ends(died(-9), None)
    assert launch(config(), ["site", "check", "site.toml"], again=False) == 4
    assert len(fake.started) == 1
    assert "a process of this site died (killed, as for want of memory)" in caplog.text
    assert "again" not in caplog.text


@pytest.mark.parametrize("key", ["group", "throttle"])
@pytest.mark.parametrize("length", [1, 3])
def test_a_list_that_is_not_as_long_as_the_devices_is_refused_before_a_start(key: str, length: int) -> None:
    entries: list[Any] = (["a", "b", "c"] if key == "group" else [1.0, 0.5, 0.5])[:length]
    with pytest.raises(ConfigError, match=rf"\[devices\] {key}: a list of {length} for 2 devices; write an entry"):
        processes_of(config(**{key: entries}))
    assert processes_of(config(device=["cpu"] * length, **{key: entries})) == length


def test_a_list_for_one_device_has_one_entry() -> None:
    with pytest.raises(ConfigError, match="for one device"):
        processes_of(config(device="cpu", throttle=[1.0, 0.5]))
