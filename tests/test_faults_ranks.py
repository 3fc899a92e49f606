"""Two ranks: a signal to one, or a crash of one, stops both, and nothing is lost by it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import clean_environment, run_cli

pytestmark = pytest.mark.faults
QUIET = "--trainer.accelerator cpu --trainer.strategy ddp --trainer.logger false --video.episodes 0"
# an epoch takes seconds; the run would take hours
LONG = "fit --trainer.devices 2 --trainer.max_epochs 5000 --data.epoch_env_steps 400 --data.eval_episodes 2"


class TwoRanks:
    """A run of two ranks, of which Lightning starts the second from the first."""

    def __init__(self, folder, *words):
        self.folder = folder
        self.env = clean_environment(folder, OMP_NUM_THREADS="1")
        how = [*LONG.split(), *QUIET.split(), "--model.compile", "false", *words]
        command = [sys.executable, "-m", "lightning_dqn", *how]
        self.output = (folder / "output.txt").open("w+")
        self.first = subprocess.Popen(
            command, cwd=folder, env=self.env, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait_for_a_checkpoint(self):
        """Until the first epoch is over; the second rank's process."""
        end = time.monotonic() + 180
        while not list(self.folder.glob("runs/*/*/checkpoints/last.ckpt")):
            assert self.first.poll() is None, self.text
            assert time.monotonic() < end, self.text
            time.sleep(0.2)
        # and into the next one
        time.sleep(1)
        return self.second

    @property
    def second(self):
        """The number of the second rank's process."""
        children = Path(f"/proc/{self.first.pid}/task/{self.first.pid}/children").read_text().split()
        [found] = [int(child) for child in children if "lightning_dqn" in Path(f"/proc/{child}/cmdline").read_text()]
        return found

    @property
    def text(self):
        self.output.flush()
        return (self.folder / "output.txt").read_text()

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.first.pid, signal.SIGKILL)
        self.first.wait()
        self.output.close()


@pytest.fixture
def two_ranks(tmp_path):
    made = TwoRanks(tmp_path)
    yield made
    made.close()


def is_gone(pid):
    """Whether a process has ended, also if nobody has asked yet how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition, seconds):
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds
        time.sleep(0.1)


def wait_until_gone(pid, seconds):
    wait_until(lambda: is_gone(pid), seconds)


@pytest.mark.parametrize(
    ("whom", "signum", "code"),
    [("second", signal.SIGTERM, 143), ("first", signal.SIGTERM, 143), ("both", signal.SIGINT, 130)],
)
def test_a_stop_of_one_is_a_stop_of_both_and_loses_nothing(two_ranks, whom, signum, code):
    second = two_ranks.wait_for_a_checkpoint()
    if whom == "both":
        # as a terminal does
        os.killpg(two_ranks.first.pid, signum)
    else:
        os.kill(second if whom == "second" else two_ranks.first.pid, signum)
    assert two_ranks.first.wait(60) == code
    wait_until_gone(second, 10)
    text = two_ranks.text
    assert text.count("Stopped by") == 1, text
    assert "Traceback" not in text
    stopped_at = int(re.search(r"Stopped by SIG\w+ at ([\d,]+) env steps", text)[1].replace(",", ""))
    [last] = two_ranks.folder.glob("runs/*/*/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["DQNDataModule"]["train"]["all_env_steps"] == stopped_at
    epochs = str(stopped_at // 400 + 2)
    again = f"fit --trainer.devices 2 --trainer.max_epochs {epochs} --ckpt_path last".split()
    done = run_cli(two_ranks.folder, two_ranks.env, *again)
    assert done.exit_code == 0, done.text
    assert f"Resumed at {stopped_at} env steps" in done.text
    assert f"Finished: {int(epochs) * 400:,} env steps" in done.text


@pytest.mark.parametrize("whom", ["first", "second"])
def test_the_crash_of_one_ends_the_other_within_a_minute(two_ranks, whom):
    second = two_ranks.wait_for_a_checkpoint()
    victim, other = (two_ranks.first.pid, second) if whom == "first" else (second, two_ranks.first.pid)
    os.kill(victim, signal.SIGKILL)
    if whom == "first":
        two_ranks.first.wait(60)
        wait_until_gone(other, 60)
    else:
        assert two_ranks.first.wait(60) not in (0, None)
    # what is left is whole, and both resume from it
    before = two_ranks.text
    assert "a peer has exited" in before
    [last] = two_ranks.folder.glob("runs/*/*/checkpoints/last.ckpt")
    saved = torch.load(last, weights_only=True)["DQNDataModule"]["train"]["all_env_steps"]
    again = f"fit --trainer.devices 2 --trainer.max_epochs {saved // 400 + 2} --ckpt_path last".split()
    done = run_cli(two_ranks.folder, two_ranks.env, *again)
    assert done.exit_code == 0, done.text
    assert f"Resumed at {saved} env steps" in done.text


def test_a_crash_in_an_evaluation_is_reported_in_one_line_too(tmp_path):
    run = TwoRanks(tmp_path, "--data.eval_episodes", "8000")
    try:
        wait_until(lambda: "0/2000000 env steps" in run.text, 180)
        # an epoch of 200 iterations is over in less
        time.sleep(5)
        second = run.second
        # the other way round Lightning would kill the first before it can say anything
        run.first.kill()
        # it hears of it when its own half of the episodes is over
        wait_until_gone(second, 60)
        assert "rank 1: a peer has exited" in run.text
        assert "Traceback" not in run.text
    finally:
        run.close()
