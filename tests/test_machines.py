"""The ways to start a run of several ranks that docs/devices.md names: what torchrun and SLURM start is one run."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import clean_environment

from lightning_dqn.cli import main
from lightning_dqn.resume.checkpoint_io import AtomicCheckpointIO

SLURM_SCRIPT = Path(__file__).parent.parent / "configs" / "slurm.sh"
SMALL = "--trainer.accelerator cpu --trainer.logger false --video.episodes 0 --data.eval_episodes 2"
SHORT = f"{SMALL} --data.epoch_env_steps 300 --trainer.max_epochs 1".split()
# what srun is to its tasks, on one machine; seconds pass between them, by which runs are named
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
export SLURM_STEP_NUM_TASKS=$SLURM_NTASKS
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i SLURM_NODEID=$i SLURM_LOCALID=0 "$@" > "task-$i.txt" 2>&1 &
  echo $! > "task-$i.pid"
  sleep 3
done
for ((i = 0; i < SLURM_NTASKS; i++)); do wait "$(< "task-$i.pid")" || code=$?; done
exit "${code:-0}"
"""
# a callback of one's own, which asks each rank for the folder of the run
ASKING = """
from lightning.pytorch import Callback
class Asking(Callback):
    def on_train_start(self, trainer, pl_module):
        print("rank", trainer.global_rank, "means", trainer.default_root_dir)
"""


@dataclass
class Machine:
    """What runs on one machine, and the file that all it says goes to."""

    process: subprocess.Popen
    output: Path

    def wait(self, seconds=180):
        """Its exit code, and its output."""
        try:
            return self.process.wait(seconds), self.output.read_text()
        finally:
            self.close()

    def close(self):
        """End what still runs: torchrun takes its processes along, which are no longer of its group."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, signum)
                self.process.wait(40)


def start(folder, name, *command, **environment):
    """Start a machine's part of a run."""
    output = folder / f"{name}.txt"
    env = clean_environment(folder, **environment)
    with output.open("w") as file:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=folder, env=env, start_new_session=True, **pipes)
    return Machine(process, output)


def torchrun(folder, name, *words, ranks, devices):
    """torchrun, with its own words first."""
    fit = ["-m", "lightning_dqn", "fit", "--trainer.strategy", "ddp", *SHORT, "--trainer.devices", str(devices)]
    num_nodes = ["--trainer.num_nodes", str(ranks // devices)]
    return start(folder, name, sys.executable, "-m", "torch.distributed.run", *words, *fit, *num_nodes)


def the_one_run(folder, *reported):
    """The folder of the run of two ranks with this output: only the first reports, and only to one folder."""
    text = "\n".join(reported)
    assert sorted(re.findall(r"GLOBAL_RANK: \d, MEMBER: \d/\d", text)) == [
        "GLOBAL_RANK: 0, MEMBER: 1/2",
        "GLOBAL_RANK: 1, MEMBER: 2/2",
    ]
    assert text.count("Finished: ") == 1
    [run] = folder.glob("runs/*/*")
    assert {"checkpoints", "config.yaml"} <= {path.name for path in run.iterdir()}
    assert {"best.ckpt", "last.ckpt"} <= {path.name for path in (run / "checkpoints").iterdir()}
    return run


@pytest.mark.ranks
def test_torchrun_starts_one_run_on_one_machine(tmp_path):
    machine = torchrun(tmp_path, "machine", "--standalone", "--nproc_per_node", "2", ranks=2, devices=2)
    code, text = machine.wait()
    assert code == 0, text
    the_one_run(tmp_path, text)


@pytest.mark.ranks
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_torchruns_are_one_run(tmp_path, rendezvous):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--nnodes", "2", "--nproc_per_node", "1"]
    if rendezvous == "static":
        where = [f"--master_addr 127.0.0.1 --master_port {port} --node_rank {rank}".split() for rank in (1, 0)]
    else:
        where = [f"--rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{port} --rdzv_id 1".split()] * 2
    machines = [torchrun(tmp_path, f"machine-{i}", *words, *where[i], ranks=2, devices=1) for i in range(len(where))]
    reported = [machine.wait() for machine in machines]
    assert [code for code, _ in reported] == [0, 0], reported
    run = the_one_run(tmp_path, *(text for _, text in reported))
    if rendezvous == "static":
        # the files are made where --node_rank 0 was given, and that one was the second to start
        assert str(run.relative_to(tmp_path)) in reported[1][1]
        assert "Finished" not in reported[0][1]


def slurm(folder, **extra):
    """What SLURM says to a batch script on the first of two machines, with an srun and an scontrol of our own."""
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/sh\necho "$@" > requeued.txt\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "lightning_dqn", "SLURM_NODELIST": "localhost", **extra}
    job |= {"SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    return {**job, "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.mark.ranks
def test_the_slurm_script_starts_one_run_in_the_first_ranks_folder(tmp_path):
    (tmp_path / "asking.py").write_text(ASKING)
    words = ["bash", SLURM_SCRIPT, *SHORT, "--trainer.callbacks+=asking.Asking"]
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code, text = start(tmp_path, "job", *words, **slurm(tmp_path, PYTHONPATH=paths)).wait()
    reported = [(tmp_path / f"task-{rank}.txt").read_text() for rank in range(2)]
    assert code == 0, [text, *reported]
    run = the_one_run(tmp_path, *reported)
    assert run.name.endswith("_job-77")
    for rank in range(2):
        assert f"rank {rank} means {run.relative_to(tmp_path)}\n" in reported[rank]


def wait_for(path, machine):
    """Until a file is there."""
    end = time.monotonic() + 180
    while not list(machine.output.parent.glob(path)):
        assert machine.process.poll() is None, machine.output.read_text()
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.1)


@pytest.mark.ranks
def test_a_requeued_slurm_job_of_two_machines_resumes_in_its_folder(tmp_path):
    words = ["bash", SLURM_SCRIPT, *SMALL.split(), "--data.epoch_env_steps", "400", "--model.compile", "false"]
    job = start(tmp_path, "job", *words, "--trainer.max_epochs", "5000", **slurm(tmp_path))
    try:
        wait_for("runs/*/*/checkpoints/last.ckpt", job)
        pids = [int((tmp_path / f"task-{rank}.pid").read_text()) for rank in range(2)]
        for pid in pids:
            os.kill(pid, signal.SIGUSR1)
        wait_for("requeued.txt", job)
        # what becomes of a job that goes back to the queue
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        code, _ = job.wait(60)
    finally:
        job.close()
    assert code == 143
    assert (tmp_path / "requeued.txt").read_text() == "requeue 77\n"
    [run] = tmp_path.glob("runs/*/*")
    [checkpoint] = run.glob("hpc_ckpt_*.ckpt")
    epochs = AtomicCheckpointIO().load_checkpoint(checkpoint)["epoch"] + 2
    again = [*words, "--trainer.max_epochs", str(epochs)]
    code, text = start(tmp_path, "again", *again, **slurm(tmp_path, SLURM_RESTART_COUNT="1")).wait()
    reported = [(tmp_path / f"task-{rank}.txt").read_text() for rank in range(2)]
    assert code == 0, [text, *reported]
    assert the_one_run(tmp_path, *reported) == run
    assert f"Restoring states from the checkpoint path at {checkpoint.relative_to(tmp_path)}" in reported[0]
    assert f"Finished: {400 * epochs:,} env steps" in reported[0]
    assert "exists and is not empty" not in reported[0]


@pytest.mark.integration
def test_ranks_that_lightning_starts_are_told_which_checkpoint_is_meant(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["fit", *SHORT])
    (checkpoint,) = Path("runs").glob("*/*/checkpoints/last.ckpt")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["lightning_dqn", "test", "--ckpt_path", "last", "--print_config"])
    with pytest.raises(SystemExit):
        main()
    # Lightning hands these on
    assert sys.argv[1:] == ["test", "--ckpt_path", "last", "--print_config", "--ckpt_path", str(checkpoint)]
    assert f"ckpt_path: {checkpoint}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, id="torchrun"),
        pytest.param({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, id="srun"),
    ],
)
def test_processes_that_would_each_train_as_a_single_process_are_rejected(tmp_path, monkeypatch, capfd, environment):
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        main(["fit", *SHORT, "--trainer.devices", "1"])
    assert left.value.code == 2
    error = capfd.readouterr().err
    assert "error: trainer.devices=1, trainer.num_nodes=1: " in error
    assert "has started 2 processes" in error
    assert not list(tmp_path.glob("runs/*/*"))
