"""Clocks that callbacks pass their counters to: rates between two marks, and time to a solution."""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.settings import ENV_ID, EVAL_EPISODES, EVAL_EVERY_ENV_STEPS, SOLVED_RETURN, WARMUP_ENV_STEPS, Result

# of the start after some 2,000 updates: learners are at 1.5, where the target net moves seldom, to 10 and more there
LEARNT_VALUE = 0.5
GreedyPolicy = Callable[[NDArray[Any]], NDArray[Any]]


class RateMarks:
    """Env steps and updates per second, from the end of the warm-up until the time is over.

    Args:
        seconds: time between the marks, in s.
        finish: synchronizes with the device; called at the marks only.
        warmup_env_steps: env steps before the first mark.
    """

    def __init__(
        self,
        seconds: float,
        finish: Callable[[], None] = lambda: None,
        warmup_env_steps: int = WARMUP_ENV_STEPS,
    ) -> None:
        self._seconds = seconds
        self._finish = finish
        self._warmup_env_steps = warmup_env_steps
        self._first: tuple[float, int, int] | None = None
        self._last: tuple[float, int, int] | None = None

    def over(self, env_steps: int, updates: int) -> bool:
        """Read the counters at the end of an iteration; returns whether the measurement is over."""
        if self._first is None:
            if env_steps >= self._warmup_env_steps:
                self._finish()
                self._first = (time.perf_counter(), env_steps, updates)
            return False
        if self._last is None and time.perf_counter() - self._first[0] >= self._seconds:
            self._finish()
            self._last = (time.perf_counter(), env_steps, updates)
        return self._last is not None

    @property
    def running(self) -> bool:
        """Whether the first mark has passed and the second has not."""
        return self._first is not None and self._last is None

    def result(self, start_value: float) -> Result:
        """Env steps/s, updates/s, and the counters that they are computed from.

        Args:
            start_value: max_a Q(0, a) after the run, about 0 if the loop does not learn.
        """
        if not start_value > LEARNT_VALUE:
            raise RuntimeError(
                f"the loop did not learn: the value of the initial state is {start_value:.3g} after the run"
            )
        return self.rates({"start_value": start_value})

    def rates(self, notes: dict[str, Any]) -> Result:
        """Env steps/s, updates/s, and the counters that they are computed from.

        Args:
            notes: evidence that the loop has learned.
        """
        if self._first is None or self._last is None:
            raise RuntimeError("training ended before the measurement did")
        seconds, env_steps, updates = (b - a for a, b in zip(self._first, self._last, strict=True))
        return {
            "figures": {"env_steps_per_s": env_steps / seconds, "updates_per_s": updates / seconds},
            "notes": {"seconds": seconds, "env_steps": env_steps, "updates": updates, **notes},
        }


class SolveRecord:
    """Training time and env steps until CartPole is solved and of the whole run, without evaluations.

    Args:
        seed: seed of the evaluation episodes.
        every: env steps between two evaluations.
        finish: synchronizes with the device before the time is read.
    """

    def __init__(self, seed: int, every: int = EVAL_EVERY_ENV_STEPS, finish: Callable[[], None] = lambda: None) -> None:
        self._seed = seed
        self._every = every
        self._finish = finish
        self._remaining_env_steps = every
        self._started = 0.0
        self._paused_at = 0.0
        self._paused = 0.0
        self._seconds = math.nan
        self._env_steps = 0
        # (training seconds, env steps, mean return) of each evaluation
        self.evaluations: list[tuple[float, int, float]] = []

    def start(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock."""
        self._finish()
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        """Continue the clock."""
        self._paused += time.perf_counter() - self._paused_at

    def visit(self, env_steps: int, policy: GreedyPolicy) -> None:
        """Evaluate if due, at the end of an iteration."""
        if env_steps < self._remaining_env_steps:
            return
        self._remaining_env_steps = (env_steps // self._every + 1) * self._every
        self.pause()
        seconds = self._paused_at - self._started - self._paused
        self.evaluations.append((seconds, env_steps, greedy_mean_return(policy, self._seed + len(self.evaluations))))
        self.resume()

    def stop(self, env_steps: int) -> None:
        """Stop the clock for good."""
        self._finish()
        self._seconds = time.perf_counter() - self._started - self._paused
        self._env_steps = env_steps

    def solved(self, times: int) -> tuple[float, float]:
        """Training time in s and env steps at the first of several consecutive good evaluations; inf if none."""
        good = [mean >= SOLVED_RETURN for _, _, mean in self.evaluations]
        for i in range(len(good) - times + 1):
            if all(good[i : i + times]):
                return self.evaluations[i][:2]
        return math.inf, math.inf

    def result(self) -> Result:
        """Training time in s and env steps to the first and to a stable solution."""
        first, stable = self.solved(1), self.solved(3)
        return {
            "figures": {
                "solve_s": first[0],
                "solve_env_steps": first[1],
                "stable_s": stable[0],
                "stable_env_steps": stable[1],
                "train_s": self._seconds,
            },
            "notes": {"env_steps": self._env_steps, "evaluations": self.evaluations},
        }


def greedy_mean_return(policy: GreedyPolicy, seed: int) -> float:
    """Mean return of `EVAL_EPISODES` parallel episodes, one per environment.

    Args:
        policy: (N, 4) observations to (N,) actions.
        seed: seed of the environments.
    """
    import gymnasium as gym  # noqa: PLC0415  # startup is measured, and jobs without evaluation pay nothing

    envs = gym.make_vec(ENV_ID, EVAL_EPISODES, "vector_entry_point")
    observation, _ = envs.reset(seed=1_000_003 + 1_000 * seed)
    returns, alive = np.zeros(EVAL_EPISODES), np.ones(EVAL_EPISODES, np.bool_)
    while alive.any():
        observation, reward, terminated, truncated, _ = envs.step(policy(observation))
        returns += reward * alive
        alive &= ~(terminated | truncated)
    envs.close()
    return float(returns.mean())
