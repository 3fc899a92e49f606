"""The workloads of the ranks: three typical runs, from a small update to one of millions of weights.

They have no evaluation, checkpoint or logger, and no epoch ends during a measurement.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import lightning.pytorch as pl

from benchmarks import ours
from benchmarks.atari import ours as atari
from benchmarks.atari import work
from benchmarks.settings import Job
from lightning_dqn import DQN, DQNDataModule

Run = tuple[DQN, DQNDataModule, list[pl.Callback]]
# longer than any measurement
EPOCH_ENV_STEPS = 10_000_000
# for Pong; large enough that draws come from RAM, and filled within a second
PONG_WARMUP_ENV_STEPS = 1_500


@dataclass(frozen=True)
class Workload:
    """One workload.

    Attributes:
        title: title in the tables.
        make: makes the model, the data and the schedules.
        skipped: iterations with updates before the measurement.
        measured: recorded iterations, one more than are evaluated.
    """

    title: str
    make: Callable[[Job], Run]
    skipped: int
    measured: int


def _textbook(job: Job) -> Run:
    return _cartpole(replace(job, num_envs=1))


def _vector(job: Job) -> Run:
    return _cartpole(replace(job, num_envs=16))


def _cartpole(job: Job) -> Run:
    data = ours.textbook_data(job, EPOCH_ENV_STEPS)
    return DQN(data.observation_space, data.action_space, compile=True), data, ours.textbook_schedules()


def _pong(job: Job) -> Run:
    data = atari.make_data(replace(job, num_envs=4), PONG_WARMUP_ENV_STEPS)
    return atari.make_model(data, DQN, compiled=True), data, atari.schedules(work.EPSILON)


WORKLOADS = {
    "textbook": Workload("CartPole, 1 env, 1 update", _textbook, 1_500, 3_000),
    "vector": Workload("CartPole, 16 envs, 16 updates", _vector, 100, 500),
    "pong": Workload("Pong, 4 envs, 1 update", _pong, 20, 300),
}
