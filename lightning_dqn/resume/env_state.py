"""Captures and restores the state of a vector of training environments.

For environments that are stepped one by one, in this process or in workers, the state is the log of each environment
(`envs.episode_log.EpisodeLog`), which is replayed to restore it. For Gymnasium's own vector environments, which draw
all random numbers from one generator, the state is their arrays and that generator. Legend: N envs, T actions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, VectorEnv
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_dqn.resume.content import (
    MAX_COUNT,
    check_array,
    check_counts,
    check_dict,
    check_generator,
    check_int,
    invalid,
)

# longer logs are not replayed: 2 MB in a checkpoint, 3 s of CartPole, minutes of a slow simulator
MAX_LOGGED_ACTIONS = 250_000
# seconds of replay between two updates of the progress bar
SLICE = 0.5

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class EnvLog:
    """The content of an `EpisodeLog`, sufficient to replay its episodes.

    Attributes:
        seed: seed of the sequence of episodes.
        number: index of the episode in the sequence.
        actions: (T, width) actions since its seeded reset, int64.
        resets: number of actions before each later unseeded reset, ascending, int64.
    """

    seed: int
    number: int
    actions: NDArray[np.int64]
    resets: NDArray[np.int64]

    @property
    def is_full(self) -> bool:
        """Whether actions may be missing."""
        return len(self.actions) >= MAX_LOGGED_ACTIONS

    @property
    def length(self) -> int:
        """Env steps of the last episode."""
        return len(self.actions) - (int(self.resets[-1]) if len(self.resets) else 0)


@dataclass(frozen=True)
class Reached:
    """Outputs of N environments when their state was captured, which a replay must reproduce.

    Attributes:
        observation: (N, ...) last observations.
        returns: (N,) sums of rewards of the unfinished episodes, 0 for ended ones.
        lengths: (N,) env steps of the unfinished episodes, 0 for ended ones.
        ended: (N,) whether the episode has ended, so that the next step resets.
    """

    observation: NDArray[Any]
    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    ended: Mask


def unsupported_reason(envs: VectorEnv[Any, Any, Any]) -> str | None:
    """The reason why the state of these environments can't be captured; None if it can."""
    if _is_logged(envs):
        return None
    name = type(envs).__name__
    if not type(envs).__module__.startswith("gymnasium.envs."):
        return f"{name}, a vector form from outside of Gymnasium, can't be captured"
    for key, value in vars(envs).items():
        known = isinstance(value, (np.random.Generator, gym.Space, EnvSpec)) or _is_array(value)
        if not known and type(value) not in (bool, int, float, str, type(None)):
            return f"{name}.{key} is a {type(value).__name__}"
    return None


def _is_array(value: Any) -> bool:
    """Whether it is an array of bools or numbers."""
    return isinstance(value, np.ndarray) and value.dtype.kind in "biuf"


def _is_logged(envs: VectorEnv[Any, Any, Any]) -> bool:
    """Whether each environment has an `EpisodeLog`."""
    each = getattr(envs, "envs", ())
    return isinstance(envs, AsyncVectorEnv) or (
        len(each) > 0 and all(isinstance(env, gym.Env) and env.has_wrapper_attr("episode_log") for env in each)
    )


def env_state(envs: VectorEnv[Any, Any, Any]) -> dict[str, Any]:
    """The state of environments for which `unsupported_reason` returns None, as tensors and plain values."""
    if not _is_logged(envs):
        arrays, numbers = _native_parts(envs)
        return {
            "arrays": {name: torch.from_numpy(array.copy()) for name, array in arrays.items()},
            "numbers": numbers,
            "rng": envs.np_random.bit_generator.state,
        }
    logs = _call(envs, "episode_log")
    return {
        "seeds": [log.seed for log in logs],
        "numbers": [log.number for log in logs],
        "actions": [torch.from_numpy(log.actions) for log in logs],
        "resets": [torch.from_numpy(log.resets) for log in logs],
    }


def _call(envs: VectorEnv[Any, Any, Any], name: str, *args: Any) -> tuple[Any, ...]:
    """The results of an attribute or a method of each environment."""
    results: tuple[Any, ...] = envs.call(name, *args)  # type: ignore[attr-defined]
    return results


def too_long(state: Mapping[str, Any]) -> list[int]:
    """Environments whose episodes are too long to be replayed."""
    return [i for i, actions in enumerate(state.get("actions", ())) if len(actions) >= MAX_LOGGED_ACTIONS]


def restore_env_state(envs: VectorEnv[Any, Any, Any], state: Any, name: str, reached: Reached) -> Mask:
    """Restore the state of captured environments in new ones.

    Args:
        envs: the environments; they have not been stepped.
        state: result of `env_state`.
        name: name of the state in the checkpoint.
        reached: outputs that a replay must reproduce.

    Returns:
        (N,) True for environments that did not repeat their episodes; their next step starts new ones.

    Raises:
        CheckpointError: if the state does not fit the environments.
    """
    if not _is_logged(envs):
        _restore_native(envs, state, name)
        return np.zeros(envs.num_envs, np.bool_)
    logs = _check_logs(envs, state, name, reached)
    envs.set_attr("episode_log", logs)  # type: ignore[attr-defined]
    total = sum(1 + len(log.actions) for log in logs if not log.is_full)
    silent = rank_zero_only.rank != 0  # type: ignore[attr-defined]
    with tqdm(total=total, desc="Replaying episodes", unit="step", delay=2, leave=False, disable=silent) as bar:
        while any(left := _call(envs, "replay_for", SLICE)):
            bar.update(total - sum(left) - bar.n)
    results = _call(envs, "replay_result")
    missed = np.array([not _repeated(results[i], logs[i], reached, i) for i in range(envs.num_envs)], np.bool_)
    envs.set_attr("reset_next", (missed | reached.ended).tolist())  # type: ignore[attr-defined]
    envs.set_attr("reseed_next", missed.tolist())  # type: ignore[attr-defined]
    return missed


def _repeated(result: tuple[Any, float] | None, log: EnvLog, reached: Reached, i: int) -> bool:
    """Whether a replay has reproduced the last observation and the return of the episode."""
    if result is None:
        # an episode that has ended needs no replay
        return log.is_full and bool(reached.ended[i])
    observation, episode_return = result
    seen = np.asarray(observation).astype(reached.observation.dtype)
    return np.array_equal(seen, reached.observation[i]) and (
        bool(reached.ended[i]) or episode_return == reached.returns[i]
    )


def _check_logs(envs: VectorEnv[Any, Any, Any], state: Any, name: str, reached: Reached) -> list[EnvLog]:
    """The logs of a state.

    Raises:
        CheckpointError: naming the first value that does not fit these environments.
    """
    state = check_dict(state, name, ("seeds", "numbers", "actions", "resets"))
    for key in ("seeds", "numbers", "actions", "resets"):
        if type(state[key]) is not list or len(state[key]) != envs.num_envs:
            invalid(f"{name}.{key}", f"is not a list of {envs.num_envs}, one for each environment")
    width = int(np.prod(envs.single_action_space.shape or ()))
    logs, limits = [], _call(envs, "reseed_after")
    for i in range(envs.num_envs):
        seed = check_int(state["seeds"][i], f"{name}.seeds[{i}]", 0, 2**63)
        number = check_int(state["numbers"][i], f"{name}.numbers[{i}]", 0, MAX_COUNT)
        actions = check_array(
            state["actions"][i], f"{name}.actions[{i}]", dtype=np.dtype(np.int64), shape=(None, width)
        )
        resets = check_counts(state["resets"][i], f"{name}.resets[{i}]", shape=(None,), high=len(actions))
        if len(actions) > MAX_LOGGED_ACTIONS or not _in_space(actions, envs.single_action_space):
            invalid(f"{name}.actions[{i}]", "has actions that the environment doesn't take, or too many")
        if (np.diff(resets) < 1).any() or (resets >= limits[i]).any():
            invalid(f"{name}.resets[{i}]", "has resets at places where this environment makes none")
        log = EnvLog(seed, number, actions, resets)
        if not (reached.ended[i] or log.is_full or log.length == reached.lengths[i]):
            invalid(f"{name}.actions[{i}]", f"has {log.length} actions of an episode of {reached.lengths[i]} env steps")
        logs.append(log)
    return logs


def _in_space(actions: NDArray[np.int64], space: gym.Space[Any]) -> bool:
    """Whether all actions (T, width) are in the space."""
    if isinstance(space, spaces.Discrete):
        low, high = int(space.start), int(space.start + space.n)
        return bool(((low <= actions) & (actions < high)).all())
    if isinstance(space, spaces.MultiDiscrete):
        start, end = space.start.ravel(), (space.start + space.nvec).ravel()
        return bool(((start <= actions) & (actions < end)).all())
    raise TypeError(f"actions are {space}, which is not discrete")


def _native_parts(envs: VectorEnv[Any, Any, Any]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Arrays and numbers of a vector environment of Gymnasium: its state and its configuration."""
    kept = {name: value for name, value in vars(envs).items() if name != "_np_random_seed"}
    return {name: value for name, value in kept.items() if _is_array(value)}, {
        name: value for name, value in kept.items() if type(value) in (bool, int, float)
    }


def _restore_native(envs: VectorEnv[Any, Any, Any], state: Any, name: str) -> None:
    """Restore the arrays and the generator of a vector environment in a new one with the same arguments.

    Raises:
        CheckpointError: naming the first part that does not fit the environment.
    """
    # the first reset creates the arrays
    envs.reset(seed=0)
    state = check_dict(state, name, ("arrays", "numbers", "rng"))
    arrays, numbers = _native_parts(envs)
    found = check_dict(state["arrays"], f"{name}.arrays", tuple(arrays))
    for key in found.keys() - arrays.keys():
        invalid(f"{name}.arrays.{key}", "is unknown")
    saved = check_dict(state["numbers"], f"{name}.numbers", tuple(numbers))
    for key, value in saved.items():
        if key not in numbers or type(value) is not type(numbers[key]) or value != numbers[key]:
            invalid(f"{name}.numbers.{key}", f"is not {numbers.get(key)}, which this environment has")
    rng = check_generator(state["rng"], f"{name}.rng")
    restored = {
        key: check_array(found[key], f"{name}.arrays.{key}", dtype=array.dtype, shape=array.shape)
        for key, array in arrays.items()
    }
    for key, array in restored.items():
        setattr(envs, key, array)
    envs.np_random.bit_generator.state = rng
