"""Action selection: greedy, epsilon-greedy or from a Boltzmann policy, with action masks.

Called by `module.DQN`. Legend: N envs, A actions.
"""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from lightning_dqn.networks import MLP

# largest number of observations for which NumPy is faster than torch
FEW_OBSERVATIONS = 32


def as_batch(observation: Any, space: gym.Space[Any], name: str = "observation") -> tuple[NDArray[Any], bool]:
    """Convert one observation, or an array of N, to an array (N, ...).

    Args:
        observation: one observation, or an array (N, ...).
        space: space of one observation.
        name: name of the observation in errors.

    Returns:
        Observations (N, ...) of the space's dtype, and whether there was only one.

    Raises:
        ValueError: if the shape is neither that of one observation nor that of N.
    """
    shape = space.shape or ()
    if type(observation) is np.ndarray and observation.shape[1:] == shape and observation.ndim == len(shape) + 1:
        return observation, False
    try:
        array = np.asarray(observation, space.dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected an array of shape {shape} and dtype {space.dtype} ({error})") from error
    if array.shape == shape:
        return array[None], True
    if array.shape[1:] != shape or not array.ndim:
        raise ValueError(f"{name}: has shape {array.shape}, expected {shape}, or a batch of N x {shape}")
    return array, False


def act(
    module: Any,
    observation: NDArray[Any],
    rng: np.random.Generator | None,
    action_mask: NDArray[np.bool_] | None,
) -> NDArray[np.int64]:
    """Return the actions (N,) of a `DQN`, in the action space of the environment; see `DQN.act`."""
    action = choose_actions(
        lambda: compute_q_values(module, observation, noisy=rng is not None),
        len(observation),
        module.num_actions,
        epsilon=0.0 if rng is None else module.read_epsilon(),
        temperature=module.boltzmann_temperature,
        action_mask=action_mask,
        rng=rng,
    )
    first_action: int = module.first_action
    return action + first_action


def compute_q_values(module: Any, observation: NDArray[Any], *, noisy: bool) -> NDArray[Any]:
    """Return the Q-values (N, A) of the policy net, by NumPy for few observations and an MLP, else by torch.

    Args:
        module: a `DQN`.
        observation: (N, ...) observations.
        noisy: whether noisy layers use their noise.
    """
    net = module.policy_net
    silenced = module.is_noisy and net.training and not noisy
    if silenced:
        net.eval()
    try:
        few = len(observation) <= FEW_OBSERVATIONS and observation.dtype == np.float32
        prepare = None if module.normalizer is None else module.normalizer.forward_numpy
        values: NDArray[Any] | None = net.forward_numpy(observation, prepare) if few and type(net) is MLP else None
        if values is None:
            with torch.no_grad():
                # torch warns of read-only arrays and rejects negative strides; uint8 stays uint8
                shown = torch.from_numpy(np.require(observation, requirements=("C", "W"))).to(module.device)
                values = module(shown).float().cpu().numpy()
    finally:
        if silenced:
            net.train()
    return values


def choose_actions(
    compute_values: Callable[[], NDArray[np.floating]],
    count: int,
    num_actions: int,
    *,
    epsilon: float,
    temperature: float | None,
    action_mask: NDArray[np.bool_] | None,
    rng: np.random.Generator | None,
) -> NDArray[np.int64]:
    """Choose one action per row.

    Args:
        compute_values: returns Q-values (N, A); called only if an action depends on them.
        count: number of rows, N.
        num_actions: number of actions, A.
        epsilon: probability of a uniformly random action.
        temperature: temperature T of a Boltzmann policy, softmax(Q / T); None for the greedy action.
        action_mask: (N, A) allowed actions; None if all are.
        rng: random generator; None for greedy actions.

    Returns:
        Action indices (N,) in 0 .. A-1.
    """
    explores = (rng.random(count) < epsilon).nonzero()[0] if rng is not None else ()
    action = np.zeros(count, np.int64)
    if len(explores) < count:
        values = compute_values()
        if action_mask is not None:
            values = np.where(action_mask, values, -np.inf)
        if rng is not None and temperature is not None:
            # argmax(Q / T + Gumbel noise) is distributed as softmax(Q / T)
            values = values / temperature + rng.gumbel(size=values.shape)
        action = values.argmax(1)
    if rng is not None and len(explores):
        if action_mask is None:
            action[explores] = rng.integers(num_actions, size=len(explores))
        else:
            uniform = rng.random((len(explores), num_actions))
            action[explores] = np.where(action_mask[explores], uniform, -1.0).argmax(1)
    return action
