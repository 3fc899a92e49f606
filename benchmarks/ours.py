"""This package's runs: typical user code plus the clocks of the benchmark."""

import time
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
import yaml

from benchmarks.first_update import FirstUpdateClock
from benchmarks.lightning_clocks import ConfigSolveClock, RateClock, SolveClock, TimedDQN
from benchmarks.marks import RateMarks, SolveRecord
from benchmarks.settings import (
    ENV_ID,
    EVAL_EVERY_ENV_STEPS,
    TEXTBOOK,
    ZOO,
    ZOO_ENV_STEPS,
    ZOO_STEPS_PER_ITERATION,
    ZOO_UPDATES_PER_ITERATION,
    AbsentError,
    Job,
    Result,
)
from lightning_dqn import DQN, MLP, DQNDataModule, EpsilonDecay, SoftTargetUpdate
from lightning_dqn.monitoring.episode_statistics import EpisodeStatistics


def rates(job: Job) -> Result:
    """Env steps/s and updates/s of the textbook work with N environments and N updates per iteration.

    Also the share of time outside `training_step`: environments, memory and Lightning.
    """
    pl.seed_everything(job.seed, verbose=False)
    data = textbook_data(job)
    model = TimedDQN(data.observation_space, data.action_space, compile=job.compiled)
    marks = RateMarks(job.seconds, finisher(job.device))
    clock = RateClock(marks)
    make_trainer(job, [*textbook_schedules(), EpisodeStatistics(), clock]).fit(model, data)
    result = marks.result(float(model.policy_net(torch.zeros(1, 4, device=model.device)).max()))
    if job.device == "cpu":
        result["figures"]["outside_step_share"] = 1 - clock.seconds_in_updates() / result["notes"]["seconds"]
    return result


def compilation(job: Job) -> Result:
    """Additional seconds of a compiled fit up to the first update, compared to an eager one in the same process."""
    seconds = []
    for compiled in (False, True):
        pl.seed_everything(job.seed, verbose=False)
        data = textbook_data(job)
        start = time.time()
        model = DQN(data.observation_space, data.action_space, compile=compiled)
        make_trainer(job, [*textbook_schedules(), FirstUpdateClock()]).fit(model, data)
        seconds.append(FirstUpdateClock.done_at - start)
    return {"figures": {"compile_s": seconds[1] - seconds[0]}, "notes": {"plain_s": seconds[0]}}


def solve(job: Job) -> Result:
    """Training time and env steps to solve CartPole with the settings of RL Zoo, and of all 50,000 env steps."""
    if job.config:
        return _solve_config(job)
    pl.seed_everything(job.seed, verbose=False)
    data = DQNDataModule(
        env_id=ENV_ID,
        steps_per_iteration=ZOO_STEPS_PER_ITERATION,
        updates_per_iteration=ZOO_UPDATES_PER_ITERATION,
        batch_size=ZOO.batch_size,
        memory_capacity=ZOO.memory_capacity,
        warmup_env_steps=ZOO.learning_starts,
        gamma=ZOO.gamma,
        epoch_env_steps=EVAL_EVERY_ENV_STEPS,
    )
    model = DQN(
        data.observation_space,
        data.action_space,
        network=lambda space, actions: MLP(space, actions, hidden_sizes=ZOO.hidden_sizes),
        optimizer=lambda params: torch.optim.Adam(params, lr=ZOO.learning_rate),
        # RL Zoo clips the norm at 10, this run the entries at 100, the default
        compile=job.compiled,
    )
    # RL Zoo copies the target net every 10 env steps, between updates, since 128 updates follow 256 env steps
    # at once: in effect, the target net is constant for 128 updates
    target = SoftTargetUpdate(tau=ZOO.tau, every_n_updates=ZOO_UPDATES_PER_ITERATION)
    epsilon = EpsilonDecay(
        start=ZOO.epsilon_start, end=ZOO.epsilon_end, decay_env_steps=ZOO.epsilon_decay, schedule="linear"
    )
    record = SolveRecord(job.seed, EVAL_EVERY_ENV_STEPS, finisher(job.device))
    clock = SolveClock(record, ZOO_ENV_STEPS)
    make_trainer(job, [target, epsilon, EpisodeStatistics(), clock]).fit(model, data)
    return record.result()


def _solve_config(job: Job) -> Result:
    """`solve` with a configuration of this package and its command line."""
    from lightning_dqn.cli import main  # noqa: PLC0415  # imports loggers and plots, which other jobs do not need

    if not Path(job.config).is_file():
        raise AbsentError(f"there is no {job.config} yet")
    data = yaml.safe_load(Path(job.config).read_text()).get("data", {})
    every = data.get("epoch_env_steps", EVAL_EVERY_ENV_STEPS)
    words = ["fit", "--config", job.config, "--seed_everything", str(job.seed), "--trainer.logger", "false"]
    words += ["--trainer.default_root_dir", job.scratch, "--trainer.enable_progress_bar", "false"]
    words += ["--trainer.accelerator", _accelerator(job), "--trainer.devices", "1", "--data.eval_episodes", "1"]
    words += [f"--trainer.callbacks+={ConfigSolveClock.__module__}.{ConfigSolveClock.__name__}"]
    words += [f"--trainer.callbacks.seed={job.seed}", f"--trainer.callbacks.every={every}"]
    main(words)
    return ConfigSolveClock.made.record.result()


def finisher(device: str) -> Callable[[], None]:
    """The function that synchronizes with a device."""
    return torch.cuda.synchronize if device == "cuda" else _nothing


def _nothing() -> None:
    """The CPU needs no synchronization."""


def textbook_data(job: Job, epoch_env_steps: int = EVAL_EVERY_ENV_STEPS) -> DQNDataModule:
    """Environments and memory of the textbook workload, with one update per environment in an iteration."""
    return DQNDataModule(
        env_id=ENV_ID,
        num_envs=job.num_envs,
        updates_per_iteration=job.num_envs,
        batch_size=TEXTBOOK.batch_size,
        memory_capacity=TEXTBOOK.memory_capacity,
        warmup_env_steps=TEXTBOOK.learning_starts,
        gamma=TEXTBOOK.gamma,
        epoch_env_steps=epoch_env_steps,
    )


def textbook_schedules() -> list[pl.Callback]:
    """The target update and the epsilon schedule."""
    epsilon = EpsilonDecay(
        start=TEXTBOOK.epsilon_start, end=TEXTBOOK.epsilon_end, decay_env_steps=TEXTBOOK.epsilon_decay
    )
    return [SoftTargetUpdate(tau=TEXTBOOK.tau), epsilon]


def make_trainer(job: Job, callbacks: list[pl.Callback], devices: int = 1) -> pl.Trainer:
    """A trainer without logging, checkpoints and evaluation, which runs until a callback stops it."""
    return pl.Trainer(
        accelerator=_accelerator(job),
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=1_000_000,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=job.scratch,
        callbacks=callbacks,
    )


def _accelerator(job: Job) -> str:
    return "gpu" if job.device == "cuda" else "cpu"
