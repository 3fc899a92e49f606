"""Signals: a fit that is asked to stop does so between iterations and loses nothing."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import lightning.pytorch as pl
import pytest
import torch
from conftest import clean_environment, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment

from lightning_dqn import DQN, DQNDataModule, EpsilonDecay, SoftTargetUpdate
from lightning_dqn.resume.stop_on_signal import StopOnSignal

# 2 epochs of 200 env steps and as many iterations; updates from the 128th on
EPOCH = 200
STOPS = pytest.mark.parametrize("signum_and_code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])


class At(pl.Callback):
    """Does something once, in the middle of an iteration, of an evaluation, or at an iteration's end."""

    def __init__(self, act, *, batch=None, evaluation=False, end=None):
        self.act, self.batch, self.evaluation, self.end = act, batch, evaluation, end

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (0, self.batch):
            self.act(trainer)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.evaluation and trainer.current_epoch == 0 and batch_idx == 0:
            self.act(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.end:
            self.act(trainer)


def fit(folder, *callbacks, ckpt_path=None, steps_per_iteration=1, **kwargs):
    """A fit of 2 epochs from seed 0; its trainer and data."""
    pl.seed_everything(0)
    data = DQNDataModule(
        epoch_env_steps=EPOCH, eval_episodes=2, steps_per_iteration=steps_per_iteration, iterations_per_chunk=1
    )
    model = DQN(data.observation_space, data.action_space)
    chosen = [SoftTargetUpdate(), EpsilonDecay(), *callbacks]
    trainer = quiet_trainer(max_epochs=2, callbacks=chosen, default_root_dir=folder, **kwargs)
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer, data


def raise_in_this_process(signum):
    return lambda _: os.kill(os.getpid(), signum)


def handlers():
    return [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


def assert_same(one, other, where=""):
    """Two states are equal to the bit."""
    if isinstance(one, torch.Tensor):
        assert one.equal(other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        # in environments lie generators that nobody seeds or uses, those of their spaces
        for name in one.keys() - {"envs"}:
            assert_same(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert one == other, where


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    """The states of an uninterrupted run at the end of iteration 150, and of the second epoch's first one."""
    folder = tmp_path_factory.mktemp("unstopped")
    path = {end: folder / f"{end}.ckpt" for end in ((0, 150), (1, 0))}
    fit(folder, *(At(lambda t, p=p: t.save_checkpoint(p, weights_only=False), end=end) for end, p in path.items()))
    return {end: torch.load(p, weights_only=True) for end, p in path.items()}


@STOPS
@pytest.mark.parametrize(
    "moment",
    [{"batch": 150}, {"batch": EPOCH - 1}, {"evaluation": True}],
    ids=["mid-iteration", "last-iteration", "evaluation"],
)
def test_a_signal_saves_the_state_at_the_iterations_end(tmp_path, unstopped, capfd, signum_and_code, moment):
    signum, code = signum_and_code
    end = (0, 150) if moment.get("batch") == 150 else (1, 0)
    before = handlers()
    with pytest.raises(SystemExit) as left:
        fit(tmp_path, At(raise_in_this_process(signum), **moment), StopOnSignal())
    assert left.value.code == code
    assert handlers() == before
    path = tmp_path / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    for part in ("state_dict", "optimizer_states", "DQNDataModule", "global_step", "epoch", "loops"):
        assert_same(saved[part], unstopped[end][part], part)
    reported = [line for line in capfd.readouterr().err.splitlines() if "Stopped by" in line]
    assert len(reported) == 1
    assert signal.Signals(signum).name in reported[0]
    assert str(path) in reported[0]
    assert "--ckpt_path last" in reported[0]


def test_epochs_of_one_iteration_are_stopped_too(tmp_path):
    act = At(raise_in_this_process(signal.SIGTERM), batch=0)
    with pytest.raises(SystemExit) as left:
        fit(tmp_path, act, StopOnSignal(), steps_per_iteration=EPOCH)
    assert left.value.code == 143
    path = tmp_path / "checkpoints" / "last.ckpt"
    trainer, data = fit(tmp_path, StopOnSignal(), ckpt_path=path, steps_per_iteration=EPOCH)
    assert data.env_steps == 2 * EPOCH
    # one update in each iteration: 200 env steps are more than the 128 of the warm-up
    assert trainer.global_step == 2


def test_environments_are_closed_after_a_signal(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(DQNDataModule, "close", lambda self, close=DQNDataModule.close: (closed.append(1), close(self)))
    with pytest.raises(SystemExit):
        fit(tmp_path, At(lambda _: (closed.clear(), os.kill(os.getpid(), signal.SIGTERM)), batch=150), StopOnSignal())
    assert closed


def test_a_second_ctrl_c_ends_at_once_and_saves_nothing(tmp_path):
    before = handlers()

    def twice(_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as left:
        fit(tmp_path, At(twice, batch=150), StopOnSignal())
    assert isinstance(left.value.__context__, KeyboardInterrupt)
    assert not (tmp_path / "checkpoints").exists()
    assert handlers() == before


def test_the_signals_are_given_back_after_a_fit_that_ends_by_itself(tmp_path):
    before = handlers()
    fit(tmp_path, StopOnSignal())
    assert handlers() == before


def test_an_ignored_ctrl_c_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        trainer, _ = fit(tmp_path, At(raise_in_this_process(signal.SIGINT), batch=150), StopOnSignal())
        assert trainer.current_epoch == 2
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("moment", [{"batch": 150}, {"batch": EPOCH - 1}], ids=["mid-epoch", "last-iteration"])
def test_a_slurm_job_is_requeued_with_the_state_at_the_iterations_end(tmp_path, monkeypatch, unstopped, moment):
    # what SLURM's own command would do, noted
    command = tmp_path / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    plugins = [SLURMEnvironment(auto_requeue=True)]
    before = handlers()
    fit(tmp_path, At(raise_in_this_process(signal.SIGUSR1), **moment), StopOnSignal(), plugins=plugins)
    assert (tmp_path / "requeued").read_text() == "requeue 123\n"
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    of_then = unstopped[(0, 150) if moment["batch"] == 150 else (1, 0)]
    for part in ("state_dict", "optimizer_states", "DQNDataModule", "global_step", "epoch"):
        assert_same(saved[part], of_then[part], part)
    assert handlers() == before


def test_a_hand_made_trainer_saves_among_its_own_checkpoints(tmp_path):
    folder = tmp_path / "mine"
    checkpoint = ModelCheckpoint(dirpath=folder, monitor=None)
    with pytest.raises(SystemExit):
        fit(tmp_path, At(raise_in_this_process(signal.SIGTERM), batch=150), StopOnSignal(), checkpoint=checkpoint)
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]


# real processes

RUN = ("--data.epoch_env_steps", "300", "--trainer.max_epochs", "1000", "--data.eval_episodes", "2")
QUIET = ("--video.episodes", "0", "--trainer.enable_model_summary", "false", "--model.compile", "false")


@contextmanager
def process(folder, *words):
    """`python -m lightning_dqn` in a process group of its own, as a shell starts it."""
    command = [sys.executable, "-m", "lightning_dqn", *words]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    child = subprocess.Popen(command, cwd=folder, env=clean_environment(folder), start_new_session=True, **pipes)
    try:
        yield child
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()


def wait_for(condition, seconds=60):
    """What a condition finds, once it finds something."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing within the time"
        time.sleep(0.02)
    return found


def last_of(folder):
    return next(iter(folder.glob("runs/*/*/checkpoints/last.ckpt")), None)


@pytest.mark.faults
@STOPS
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_signal_to_a_process_ends_it_with_its_code(tmp_path, signum_and_code, vectorization):
    signum, code = signum_and_code
    environments = ("--data.num_envs", "2", "--data.vectorization", vectorization)
    with process(tmp_path, "fit", *RUN, *QUIET, *environments) as child:
        last = wait_for(lambda: last_of(tmp_path))
        time.sleep(0.1)
        # a terminal sends Ctrl-C, and torchrun or SLURM any signal, to all processes, the environments' included
        os.killpg(child.pid, signum)
        out, _ = child.communicate(timeout=60)
    assert child.returncode == code, out
    assert "Traceback" not in out
    (reported,) = re.findall(r"^Stopped by .*$", out, re.M)
    env_steps = torch.load(last, weights_only=True)["DQNDataModule"]["train"]["env_steps"]
    assert f"{env_steps:,} env steps" in reported
    assert str(last.relative_to(tmp_path)) in reported
    with process(tmp_path, "fit", "--ckpt_path", "last", "--trainer.max_epochs", str(env_steps // 300 + 1)) as child:
        out, _ = child.communicate(timeout=120)
    assert child.returncode == 0, out
    assert f"Resumed at {env_steps} env steps" in out


@pytest.mark.faults
@pytest.mark.parametrize("delay", [0.0, 0.001, 0.003, 0.01, 0.03, 0.1])
def test_two_ctrl_c_leave_the_last_checkpoint_whole(tmp_path, delay):
    with process(tmp_path, "fit", *RUN, *QUIET, "--trainer.logger", "false") as child:
        last = wait_for(lambda: last_of(tmp_path))
        time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        time.sleep(delay)
        child.send_signal(signal.SIGINT)
        out, _ = child.communicate(timeout=60)
    assert child.returncode == 130, out
    assert "Traceback" not in out
    assert torch.load(last, weights_only=True)["global_step"] > 0


@pytest.mark.faults
@STOPS
def test_an_evaluation_that_is_interrupted_reports_it_by_its_exit_code(tmp_path, signum_and_code):
    signum, code = signum_and_code
    with process(tmp_path, "test", "--data.eval_episodes", "1000000", *QUIET) as child:
        shown = ""
        while "Testing" not in shown:
            shown += child.stdout.read(1)
        time.sleep(0.5)
        child.send_signal(signum)
        out, _ = child.communicate(timeout=60)
    assert child.returncode == code, out
    assert "Traceback" not in out
