"""Stable-Baselines3's runs of Pong, with the settings and the wrappers of RL Zoo."""

from typing import Any

from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

from benchmarks.atari import work
from benchmarks.atari.proof import moved, weights
from benchmarks.marks import RateMarks
from benchmarks.sb3 import ENDLESS, FirstUpdateClock, RateClock, finisher
from benchmarks.settings import Job, Result


def rates(job: Job) -> Result:
    """Env steps/s and updates/s with one update every 4 env steps, with the buffer that stores frames twice."""
    model = _model(job, work.LEARNING_STARTS, work.EPSILON)
    start = weights(model.q_net)
    marks = RateMarks(job.seconds, finisher(job.device), work.WARMUP_ENV_STEPS)
    model.learn(ENDLESS, RateClock(marks))
    return marks.rates({"weights_moved": moved(start, weights(model.q_net))})


def fill(job: Job) -> Result:
    """Fill the buffer by random actions, then do one update, to measure the peak memory of the process."""
    return _fill(job)


def fill_lean(job: Job) -> Result:
    """The same with `optimize_memory_usage`, which treats truncated episodes as terminated."""
    return _fill(job, optimize_memory_usage=True, replay_buffer_kwargs={"handle_timeout_termination": False})


def _fill(job: Job, **memory: Any) -> Result:
    model = _model(job, work.MEMORY_CAPACITY, 1.0, **memory)
    model.learn(ENDLESS, FirstUpdateClock())
    assert model.replay_buffer is not None
    rows = model.replay_buffer.size() * model.replay_buffer.n_envs
    return {"figures": {}, "notes": {"rows": rows, "env_steps": model.num_timesteps}}


def _model(job: Job, learning_starts: int, epsilon: float, **memory: Any) -> DQN:
    """The model; an iteration takes the env steps of one update, over all games."""
    return DQN(
        "CnnPolicy",
        _games(job),
        learning_rate=work.LEARNING_RATE,
        buffer_size=work.MEMORY_CAPACITY,
        learning_starts=learning_starts,
        batch_size=work.BATCH_SIZE,
        gamma=work.GAMMA,
        train_freq=work.ENV_STEPS_PER_UPDATE // job.num_envs,
        gradient_steps=1,
        target_update_interval=work.TARGET_ENV_STEPS,
        exploration_initial_eps=epsilon,
        exploration_final_eps=epsilon,
        seed=job.seed,
        device=job.device,
        **memory,
    )


def _games(job: Job) -> VecEnv:
    # the import registers the games
    import ale_py  # noqa: F401, PLC0415

    return VecFrameStack(make_atari_env(work.RAW_ENV_ID, job.num_envs, job.seed), work.FRAME_STACK)
