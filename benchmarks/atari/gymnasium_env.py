"""One Atari environment with Gymnasium's wrappers, stepped in Python."""

import itertools
import time

import ale_py  # noqa: F401  # registers the games
import gymnasium as gym
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from benchmarks.atari import work
from benchmarks.settings import Job, Result


def stepping(job: Job) -> Result:
    """Env steps/s of one game with random actions; resets do not count."""
    game = gym.make(work.ENV_ID, frameskip=1, repeat_action_probability=0.0)
    env = FrameStackObservation(AtariPreprocessing(game, screen_size=work.SIZE), work.FRAME_STACK)
    env.reset(seed=job.seed)
    env.action_space.seed(job.seed)
    actions = itertools.cycle([env.action_space.sample() for _ in range(1_000)])
    for _ in range(100):
        env.step(next(actions))
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < job.seconds:
        *_, terminated, truncated, _ = env.step(next(actions))
        count += 1
        if terminated or truncated:
            env.reset()
    env.close()
    return {"figures": {"env_steps_per_s": count / elapsed}, "notes": {"seconds": elapsed, "env_steps": count}}
