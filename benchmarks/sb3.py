"""Stable-Baselines3's runs of the same workloads, with its DQN class and callbacks."""

import time
from collections.abc import Callable

import torch
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from benchmarks.marks import RateMarks, SolveRecord
from benchmarks.settings import (
    ENV_ID,
    EVAL_EVERY_ENV_STEPS,
    TEXTBOOK,
    ZOO,
    ZOO_ENV_STEPS,
    ZOO_STEPS_PER_ITERATION,
    ZOO_UPDATES_PER_ITERATION,
    Job,
    Result,
    textbook_epsilon,
)

# more env steps than a run takes before its callback ends it
ENDLESS = 10**9


class RateClock(BaseCallback):
    """Reads the counters after every step of the environments and ends the run when the time is over."""

    def __init__(self, marks: RateMarks) -> None:
        super().__init__()
        self.marks = marks

    def _on_step(self) -> bool:
        return not self.marks.over(self.num_timesteps, self.model._n_updates)


class SolveClock(BaseCallback):
    """Evaluates between the updates and the next env steps."""

    def __init__(self, record: SolveRecord) -> None:
        super().__init__()
        self.record = record

    def _on_training_start(self) -> None:
        self.record.start()

    def _on_rollout_start(self) -> None:
        self.record.visit(self.model.num_timesteps, lambda seen: self.model.predict(seen, deterministic=True)[0])

    def _on_training_end(self) -> None:
        self.record.visit(self.model.num_timesteps, lambda seen: self.model.predict(seen, deterministic=True)[0])
        self.record.stop(self.model.num_timesteps)

    def _on_step(self) -> bool:
        return True


class FirstUpdateClock(BaseCallback):
    """Records the time of the first update, in seconds since the Unix epoch, and ends the run."""

    def __init__(self) -> None:
        super().__init__()
        self.done_at = 0.0

    def _on_rollout_start(self) -> None:
        if self.model._n_updates and not self.done_at:
            self.done_at = time.time()

    def _on_step(self) -> bool:
        return not self.done_at


def rates(job: Job) -> Result:
    """Env steps/s and updates/s of the textbook work with N environments and N updates per iteration."""
    marks = RateMarks(job.seconds, finisher(job.device))
    model = _textbook_model(job)
    model.learn(ENDLESS, RateClock(marks))
    return marks.result(float(model.q_net(torch.zeros(1, 4, device=model.device)).max()))


def startup(job: Job) -> Result:
    """Seconds from the start of the process to the end of the first update."""
    clock = FirstUpdateClock()
    _textbook_model(job).learn(ENDLESS, clock)
    return {"figures": {"startup_s": clock.done_at - job.launched_at}, "notes": {}}


def solve(job: Job) -> Result:
    """Training time and env steps to solve CartPole with the settings of RL Zoo, and of all 50,000 env steps."""
    model = DQN(
        "MlpPolicy",
        make_vec_env(ENV_ID),
        learning_rate=ZOO.learning_rate,
        buffer_size=ZOO.memory_capacity,
        learning_starts=ZOO.learning_starts,
        batch_size=ZOO.batch_size,
        tau=ZOO.tau,
        gamma=ZOO.gamma,
        train_freq=ZOO_STEPS_PER_ITERATION,
        gradient_steps=ZOO_UPDATES_PER_ITERATION,
        target_update_interval=10,
        exploration_initial_eps=ZOO.epsilon_start,
        exploration_final_eps=ZOO.epsilon_end,
        exploration_fraction=ZOO.epsilon_decay / ZOO_ENV_STEPS,
        policy_kwargs={"net_arch": list(ZOO.hidden_sizes)},
        seed=job.seed,
        device=job.device,
    )
    record = SolveRecord(job.seed, EVAL_EVERY_ENV_STEPS, finisher(job.device))
    model.learn(ZOO_ENV_STEPS, SolveClock(record))
    return record.result()


def _textbook_model(job: Job) -> DQN:
    """The model of the textbook workload; with N environments it updates the target net only every N updates."""
    model = DQN(
        "MlpPolicy",
        make_vec_env(ENV_ID, job.num_envs),
        learning_rate=TEXTBOOK.learning_rate,
        buffer_size=TEXTBOOK.memory_capacity,
        learning_starts=TEXTBOOK.learning_starts,
        batch_size=TEXTBOOK.batch_size,
        tau=TEXTBOOK.tau,
        gamma=TEXTBOOK.gamma,
        train_freq=1,
        gradient_steps=job.num_envs,
        target_update_interval=1,
        # it always clips the norm: here at a value without effect
        max_grad_norm=1e9,
        policy_kwargs={
            "net_arch": list(TEXTBOOK.hidden_sizes),
            "optimizer_class": torch.optim.AdamW,
            "optimizer_kwargs": {"amsgrad": True},
        },
        seed=job.seed,
        device=job.device,
    )
    # a function of the remaining fraction of the run, since its own schedule is linear
    model.exploration_schedule = lambda left: textbook_epsilon((1 - left) * ENDLESS)
    return model


def finisher(device: str) -> Callable[[], None]:
    """The function that synchronizes with a device."""
    return torch.cuda.synchronize if device == "cuda" else _nothing


def _nothing() -> None:
    """The CPU needs no synchronization."""
