"""Checks the unfinished episodes in the state of a `Collector`, and continues them in new environments.

Legend: N envs, A actions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from lightning_dqn.resume.content import check_array, check_counts, check_dict, check_tensor, invalid
from lightning_dqn.resume.env_state import Reached, restore_env_state

Mask = NDArray[np.bool_]
# result of `VectorEnv.step`
Outcome = tuple[NDArray[Any], NDArray[Any], Mask, Mask, dict[str, Any]]
BOOL, INT, FLOAT = np.dtype(np.bool_), np.dtype(np.int64), np.dtype(np.float64)


@dataclass
class Episodes:
    """The unfinished episodes of N environments.

    Attributes:
        observation: (N, ...) last observations.
        resetting: (N,) whether the next step of an environment only resets it.
        returns: (N,) sums of rewards so far.
        lengths: (N,) env steps so far.
        action_mask: (N, A) True for allowed actions; None without masks.
        policy_state: (N, S) state of the policy; None if it has none.
        first: (N,) whether an observation is the first of its episode.
        sent: (N,) actions of the step in progress; None without one.
        outcome: result of that step; None without one.
        cut: (N,) environments whose step in progress is truncated, because they did not repeat their episodes.
        missed: (N,) environments that did not repeat their episodes.
    """

    observation: NDArray[Any]
    resetting: Mask
    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    action_mask: Mask | None
    policy_state: Tensor | None
    first: Mask
    sent: NDArray[np.int64] | None
    outcome: Outcome | None
    cut: Mask
    missed: Mask


def restore_episodes(
    envs: VectorEnv[Any, Any, Any], state: Any, name: str, *, action_masks: bool, env_steps: int
) -> Episodes:
    """Continue the unfinished episodes of a saved collector.

    Args:
        envs: new environments, created with the same arguments as the saved ones.
        state: the entry `under_way` of `Collector.state_dict`.
        name: name of the state in the checkpoint.
        action_masks: whether the environments have action masks.
        env_steps: env steps of this rank when the state was saved.

    Raises:
        CheckpointError: naming the first value that does not fit these environments.
    """
    state = check_dict(state, name, ("envs", "observation", "resetting", "returns", "lengths"))
    count = (envs.num_envs,)
    observation = _check_observation(envs, state["observation"], f"{name}.observation")
    resetting = check_array(state["resetting"], f"{name}.resetting", dtype=BOOL, shape=count)
    returns = check_array(state["returns"], f"{name}.returns", dtype=FLOAT, shape=count)
    lengths = check_counts(state["lengths"], f"{name}.lengths", shape=count, high=env_steps)
    mask: Mask | None = None
    if action_masks:
        shape = (*count, int(envs.single_action_space.n))  # type: ignore[attr-defined]
        given = check_dict(state, name, ("action_mask",))["action_mask"]
        mask = check_array(given, f"{name}.action_mask", dtype=BOOL, shape=shape)
        if not (mask.any(1) | resetting).all():
            invalid(f"{name}.action_mask", "allows no action")
    none = np.zeros(envs.num_envs, np.bool_)
    policy_state, first = None, none
    if "policy_state" in state:
        policy_state = check_tensor(
            state["policy_state"], f"{name}.policy_state", dtype=torch.float32, shape=(envs.num_envs, None)
        )
        given = check_dict(state, name, ("first",))["first"]
        first = check_array(given, f"{name}.first", dtype=BOOL, shape=count)
    if "pending" not in state:
        reached = Reached(observation, returns, lengths, resetting)
        missed = restore_env_state(envs, state["envs"], f"{name}.envs", reached)
        resetting |= missed
        returns[missed] = 0
        lengths[missed] = 0
        return Episodes(observation, resetting, returns, lengths, mask, policy_state, first, None, None, none, missed)
    sent, outcome = _check_pending(envs, state["pending"], f"{name}.pending", action_masks=action_masks)
    seen, reward, terminated, truncated, _ = outcome
    ended = terminated | truncated
    after = Reached(seen, np.where(ended, 0, returns + reward), np.where(ended, 0, lengths + ~resetting), ended)
    missed = restore_env_state(envs, state["envs"], f"{name}.envs", after)
    # the step in progress is truncated, not the one before it
    cut = missed & ~ended
    truncated |= cut
    return Episodes(observation, resetting, returns, lengths, mask, policy_state, first, sent, outcome, cut, missed)


def _check_observation(envs: VectorEnv[Any, Any, Any], value: Any, name: str) -> NDArray[Any]:
    space = envs.observation_space
    assert space.dtype is not None
    return check_array(value, name, dtype=space.dtype, shape=space.shape or ())


def _check_pending(
    envs: VectorEnv[Any, Any, Any], state: Any, name: str, *, action_masks: bool
) -> tuple[NDArray[np.int64], Outcome]:
    """The actions of the step in progress, and its outcome."""
    flags = ("terminated", "truncated")
    state = check_dict(state, name, ("action", "reward", "observation", *flags))
    count = (envs.num_envs,)
    action = check_array(state["action"], f"{name}.action", dtype=INT, shape=envs.action_space.shape or count)
    if not envs.action_space.contains(action):
        invalid(f"{name}.action", "has actions that the environment doesn't take")
    reward = check_array(state["reward"], f"{name}.reward", dtype=FLOAT, shape=count)
    terminated, truncated = (check_array(state[k], f"{name}.{k}", dtype=BOOL, shape=count) for k in flags)
    info = {}
    if action_masks:
        state = check_dict(state, name, ("action_mask", "has_action_mask"))
        shape = (*count, int(envs.single_action_space.n))  # type: ignore[attr-defined]
        info["action_mask"] = check_array(state["action_mask"], f"{name}.action_mask", dtype=BOOL, shape=shape)
        has_mask = check_array(state["has_action_mask"], f"{name}.has_action_mask", dtype=BOOL, shape=count)
        info["_action_mask"] = has_mask
    observation = _check_observation(envs, state["observation"], f"{name}.observation")
    return action, (observation, reward, terminated, truncated, info)
