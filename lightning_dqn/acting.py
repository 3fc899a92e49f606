"""How an agent chooses: greedily, epsilon-greedily, or by Boltzmann's chances, among the actions that are allowed.

Asked by `module.DQN.act`. Legend: N envs, A actions.
"""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from lightning_dqn.networks import MLP

# observations for which the calls of a forward pass cost more than its arithmetic
FEW_OBSERVATIONS = 32


def as_batch(observation: Any, space: gym.Space[Any], name: str = "observation") -> tuple[NDArray[Any], bool]:
    """An observation, or an array of them, as an array of N.

    Args:
        observation: what an environment gives, or an array with a first dimension of N.
        space: of one observation.
        name: of the observation, for errors.

    Returns:
        (N, ...) observations of the space's dtype, and whether it was a single one.

    Raises:
        ValueError: if it is neither.
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
    """Actions of a learner, (N,), as the environment takes them; see `DQN.act`."""
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
    """Action values of the policy net, by the cheapest way there is.

    Args:
        module: the learner.
        observation: (N, ...).
        noisy: whether a net that explores by noise may do so.

    Returns:
        (N, A) values.
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
                # torch warns of memory that it may not write to, and takes none that runs backwards; bytes stay bytes
                shown = torch.from_numpy(np.require(observation, requirements=("C", "W"))).to(module.device)
                values = module(shown).float().cpu().numpy()
    finally:
        if silenced:
            net.train()
    return values


def choose_actions(
    judge: Callable[[], NDArray[np.floating]],
    count: int,
    num_actions: int,
    *,
    epsilon: float,
    temperature: float | None,
    action_mask: NDArray[np.bool_] | None,
    rng: np.random.Generator | None,
) -> NDArray[np.int64]:
    """Choose one action a row.

    Args:
        judge: gives action values, (N, A); called only if an action hangs on them.
        count: rows, N.
        num_actions: A.
        epsilon: chance of an action that hangs on nothing.
        temperature: of Boltzmann's chances, e^(Q / T) over their sum; None for the best action.
        action_mask: (N, A) which actions are allowed, if not all.
        rng: where chance comes from; without it the best actions are taken.

    Returns:
        (N,) indices in 0 .. A-1.
    """
    explores = (rng.random(count) < epsilon).nonzero()[0] if rng is not None else ()
    action = np.zeros(count, np.int64)
    if len(explores) < count:
        values = judge()
        if action_mask is not None:
            values = np.where(action_mask, values, -np.inf)
        if rng is not None and temperature is not None:
            # the largest of Q / T plus Gumbel's noise falls on each action with Boltzmann's chance
            values = values / temperature + rng.gumbel(size=values.shape)
        action = values.argmax(1)
    if rng is not None and len(explores):
        if action_mask is None:
            action[explores] = rng.integers(num_actions, size=len(explores))
        else:
            lots = rng.random((len(explores), num_actions))
            action[explores] = np.where(action_mask[explores], lots, -1.0).argmax(1)
    return action
