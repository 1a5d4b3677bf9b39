"""deploy/slurm without Slurm: its commands are small scripts here, which note how they were called. What Slurm itself
makes of the scripts is deploy/slurm/verify.sh's business."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared.config import SiteTable
from tests.support.command_line import parse, parse_torchrun

SLURM = Path(__file__).parents[2] / "deploy" / "slurm"
SCRIPTS = sorted(path for path in SLURM.iterdir() if path.suffix in (".sbatch", ".sh"))
JOBS = ("site.sbatch", "two-makes.sbatch")
HERE = {
    "SLURM_JOB_ID": "41234",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_CPUS_PER_TASK": "16",
    "SLURM_JOB_NUM_NODES_HET_GROUP_0": "3",
    "SLURM_JOB_NUM_NODES_HET_GROUP_1": "1",
    "SLURM_CPUS_PER_TASK_HET_GROUP_0": "16",
    "SLURM_CPUS_PER_TASK_HET_GROUP_1": "8",
    "FIRST": "/environments/cuda",
    "SECOND": "/environments/rocm",
    "FIRST_PROCESSES": "8",
    "SECOND_PROCESSES": "2",
}
UNTIL_STOPPED = """
part=0
case "$*" in *--het-group=1*) part=1 ;; *) kill -USR1 "$PPID" ;; esac
read -r _ <"$FIFO.$part"
exit 1
"""
"""A step that ends when it is stopped; the first one has its job told that the time is up."""


class Job:
    """`script` as Slurm would start it, where srun does `step`; `called` is what it called, word by word, each with
    the first entry of its PATH."""

    def __init__(self, directory: Path, script: str, step: str, preempted: str = "None") -> None:
        commands, notes, fifo = directory / "bin", directory / "called", directory / "fifo"
        commands.mkdir()
        fifos = [f"{fifo}.{part}" for part in range(2 if script == "two-makes.sbatch" else 1)]
        for path in fifos:
            os.mkfifo(path)
        bodies = {
            "srun": step,
            "scancel": "".join(f'echo stop >"{path}"\n' for path in fifos),
            "scontrol": f'[ "$1" = requeue ] || echo "PreemptTime={preempted}"',
            "hostname": "echo first-node",
        }
        for name, body in bodies.items():
            note = f'printf "%q " "{name}" "$@" "PATH=${{PATH%%:*}}" >"$NOTES.$$"; echo >>"$NOTES.$$"'
            kept = 'cat "$NOTES.$$" >>"$NOTES"'  # in one piece: two steps begin at once
            (commands / name).write_text(f"#!/usr/bin/env bash\n{note}\n{kept}\n{body}\n", encoding="utf-8")
            (commands / name).chmod(0o755)
        environment = {**os.environ, **HERE, "NOTES": str(notes), "FIFO": str(fifo)}
        environment["PATH"] = f"{commands}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", SLURM / script, "a site.toml"], env=environment, capture_output=True, text=True, check=False
        )
        self.status, self.errors = done.returncode, done.stderr
        self.called = [shlex.split(line) for line in notes.read_text(encoding="utf-8").splitlines()]

    def calls(self, command: str) -> list[list[str]]:
        return [call[1:] for call in self.called if call[0] == command]

    @property
    def requeued(self) -> bool:
        return any(call[:2] == ["requeue", "41234"] for call in self.calls("scontrol"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_and_can_be_executed(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck here; it comes with the extra dev")
    done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", JOBS)
def test_a_site_has_the_time_to_leave(script: str) -> None:
    text = (SLURM / script).read_text(encoding="utf-8")
    (notice,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.MULTILINE)
    (shutdown,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-(\d+)\}", text)
    assert SiteTable.model_fields["stop_seconds"].default < int(shutdown) < int(notice)


def test_the_nodes_of_a_site_meet_at_the_first_and_run_the_site(tmp_path: Path) -> None:
    job = Job(tmp_path, "site.sbatch", "exit 0")
    assert job.status == 0, job.errors
    (call,) = job.calls("srun")
    before, command = call[: call.index("torchrun")], call[call.index("torchrun") + 1 :]
    assert "--cpus-per-task=16" in before
    parsed = parse_torchrun(command[:-1])  # without the note of PATH
    assert (parsed.nnodes, parsed.nproc_per_node) == ("2", "4")
    assert (parsed.rdzv_backend, parsed.rdzv_id) == ("c10d", "41234")
    assert parsed.rdzv_endpoint == "first-node:21234"
    assert (parsed.module, parsed.training_script) == (True, "isthmus")
    assert parse(parsed.training_script_args)["site"] == Path("a site.toml")


def test_both_parts_of_a_site_of_two_makes_join_one_rendezvous_from_their_own_environments(tmp_path: Path) -> None:
    job = Job(tmp_path, "two-makes.sbatch", "exit 0")
    assert job.status == 0, job.errors
    calls = sorted(job.calls("srun"))
    parsed = [parse_torchrun(call[call.index("torchrun") + 1 : -1]) for call in calls]
    assert [call[0] for call in calls] == ["--het-group=0", "--het-group=1"]
    assert ["--cpus-per-task=16" in calls[0], "--cpus-per-task=8" in calls[1]] == [True, True]
    assert [call[-1] for call in calls] == ["PATH=/environments/cuda/bin", "PATH=/environments/rocm/bin"]
    assert [each.nnodes for each in parsed] == ["4", "4"], "the sum"
    assert [each.nproc_per_node for each in parsed] == ["8", "2"]
    assert {(each.rdzv_id, each.rdzv_endpoint) for each in parsed} == {("41234", "first-node:21234")}


@pytest.mark.parametrize("script", JOBS)
def test_a_job_that_is_done_or_fails_ends_and_is_not_started_again(script: str, tmp_path: Path) -> None:
    (tmp_path / "done").mkdir()
    (tmp_path / "failed").mkdir()
    done, failed = Job(tmp_path / "done", script, "exit 0"), Job(tmp_path / "failed", script, "exit 3")
    assert (done.status, done.requeued) == (0, False)
    assert (failed.status, failed.requeued) == (3, False)


@pytest.mark.parametrize("script", JOBS)
def test_a_job_whose_time_is_up_stops_its_site_and_goes_back_into_the_queue(script: str, tmp_path: Path) -> None:
    job = Job(tmp_path, script, UNTIL_STOPPED)
    assert next(call[:2] for call in job.calls("scancel")) == ["--signal=TERM", "41234"]
    assert job.requeued, job.called
    assert job.status == 1


@pytest.mark.parametrize("script", JOBS)
def test_a_job_that_was_preempted_goes_back_into_the_queue(script: str, tmp_path: Path) -> None:
    job = Job(tmp_path, script, "exit 1", preempted="2026-01-01T10:00:00")
    assert job.calls("scancel") == []
    assert job.requeued


@pytest.mark.parametrize("script", JOBS)
def test_a_job_without_a_site_says_how_it_is_called(script: str) -> None:
    done = subprocess.run(
        ["bash", SLURM / script], env={**os.environ, **HERE}, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert f"usage: sbatch {script} SITE.toml" in done.stderr
