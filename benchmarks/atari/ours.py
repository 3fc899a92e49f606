"""This package's runs of Pong: typical user code plus the clocks of the benchmark."""

import itertools
import time

import lightning.pytorch as pl
import torch

from benchmarks.atari import work
from benchmarks.atari.proof import moved, weights
from benchmarks.first_update import FirstUpdateClock
from benchmarks.lightning_clocks import RateClock, TimedDQN
from benchmarks.marks import RateMarks
from benchmarks.ours import finisher, make_trainer
from benchmarks.settings import Job, Result
from lightning_dqn import DQN, DQNDataModule, EpsilonDecay, NatureCNN, SoftTargetUpdate
from lightning_dqn.envs import EnvSettings, make_vector_env
from lightning_dqn.monitoring.episode_statistics import EpisodeStatistics


def rates(job: Job) -> Result:
    """Env steps/s and updates/s with one update every 4 env steps, and the share of time outside `training_step`."""
    pl.seed_everything(job.seed, verbose=False)
    data = make_data(job, work.LEARNING_STARTS)
    model = make_model(data, TimedDQN, compiled=job.compiled)
    start = weights(model.policy_net)
    marks = RateMarks(job.seconds, finisher(job.device), work.WARMUP_ENV_STEPS)
    clock = RateClock(marks)
    make_trainer(job, [*schedules(work.EPSILON), EpisodeStatistics(), clock]).fit(model, data)
    result = marks.rates({"weights_moved": moved(start, weights(model.policy_net))})
    if job.device == "cpu":
        result["figures"]["outside_step_share"] = 1 - clock.seconds_in_updates() / result["notes"]["seconds"]
    return result


def fill(job: Job) -> Result:
    """Fill the memory by random actions, then do one update, to measure the peak memory of the process."""
    pl.seed_everything(job.seed, verbose=False)
    data = make_data(job, work.MEMORY_CAPACITY)
    model = make_model(data, DQN, compiled=job.compiled)
    make_trainer(job, [*schedules(1.0), EpisodeStatistics(), FirstUpdateClock()]).fit(model, data)
    assert data.train_dataset is not None
    return {"figures": {}, "notes": {"rows": len(data.train_dataset.memory), "env_steps": data.env_steps}}  # type: ignore[union-attr]


def stepping(job: Job) -> Result:
    """Env steps/s of the games with random actions; steps that only reset a game do not count."""
    envs = make_vector_env(EnvSettings(work.ENV_ID, work.ENV_KWARGS, frame_stack=work.FRAME_STACK), job.num_envs)
    envs.reset(seed=job.seed)
    envs.action_space.seed(job.seed)
    actions = itertools.cycle([envs.action_space.sample() for _ in range(1_000)])
    for _ in range(100):
        *_, terminated, truncated, _ = envs.step(next(actions))
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < job.seconds:
        playing = ~(terminated | truncated)
        *_, terminated, truncated, _ = envs.step(next(actions))
        count += int(playing.sum())
    envs.close()
    return {"figures": {"env_steps_per_s": count / elapsed}, "notes": {"seconds": elapsed, "env_steps": count}}


def make_data(job: Job, warmup_env_steps: int) -> DQNDataModule:
    """Environments and memory; an iteration steps several games once, or one game for all env steps of an update."""
    return DQNDataModule(
        env_id=work.ENV_ID,
        env_kwargs=work.ENV_KWARGS,
        frame_stack=work.FRAME_STACK,
        num_envs=job.num_envs,
        steps_per_iteration=work.ENV_STEPS_PER_UPDATE // job.num_envs,
        overlap=True,
        batch_size=work.BATCH_SIZE,
        memory_capacity=work.MEMORY_CAPACITY,
        warmup_env_steps=warmup_env_steps,
        gamma=work.GAMMA,
        epoch_env_steps=250_000,
        save_memory=False,
    )


def make_model(data: DQNDataModule, learner: type[DQN], *, compiled: bool) -> DQN:
    """The model for these games."""
    return learner(
        data.observation_space,
        data.action_space,
        network=NatureCNN,
        optimizer=lambda params: torch.optim.Adam(params, lr=work.LEARNING_RATE),
        clip_grad_value=None,
        compile=compiled,
    )


def schedules(epsilon: float) -> list[pl.Callback]:
    target = SoftTargetUpdate(tau=1.0, every_n_env_steps=work.TARGET_ENV_STEPS)
    return [target, EpsilonDecay(start=epsilon, end=epsilon, decay_env_steps=1, schedule="linear")]
