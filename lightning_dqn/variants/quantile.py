"""Quantile regression: QR-DQN with fixed levels, IQN with sampled levels. Legend: B batch, A actions, Z quantiles."""

from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from lightning_dqn.losses import TDLoss, gather_actions, mask_actions, munchausen_bonus, quantile_huber, soft_value
from lightning_dqn.module import DQN, NetworkCallable
from lightning_dqn.networks import MLP, ImplicitQuantiles
from lightning_dqn.replay import AnyTransition
from lightning_dqn.speed.compiled import QFunction
from lightning_dqn.validation import check_positive


class QRDQN(DQN):
    """Quantile regression DQN: quantiles of the return at fixed levels (Dabney et al. 2018a).

    Args:
        observation_space: space of one observation; the CLI takes it from the environment.
        action_space: discrete space of actions; the CLI takes it from the environment.
        network: network with num_quantiles values per action.
        num_quantiles: number of quantiles, Z; 200 in the paper.
        kappa: error beyond which the quantile Huber loss is linear.
        **kwargs: arguments of `DQN` except loss.

    Raises:
        TypeError: for an unknown argument.
        ValueError: if num_quantiles or kappa is not positive.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        network: NetworkCallable = MLP,
        num_quantiles: int = 50,
        kappa: float = 1.0,
        **kwargs: Any,
    ) -> None:
        check_positive(num_quantiles=num_quantiles, kappa=kappa)
        super().__init__(
            observation_space,
            action_space,
            network=lambda space, num_actions: network(space, (num_actions, num_quantiles)),
            loss="huber",
            **kwargs,
        )
        self.num_quantiles, self.kappa = num_quantiles, kappa

    def action_values(self, net: QFunction, observation: Tensor) -> Tensor:
        """Means over the quantiles, (B, A)."""
        return net(observation).mean(2)

    def td_loss(self, batch: AnyTransition, policy_net: QFunction, target_net: QFunction) -> TDLoss:
        """Quantile regression on the quantiles of the target (algorithm 1)."""
        quantiles = gather_actions(policy_net(batch.observation), batch.action - self.first_action)
        with torch.no_grad():
            next_quantiles = target_net(batch.next_observation)
            next_q = (policy_net(batch.next_observation) if self.double_q else next_quantiles).mean(2)
            target = quantile_target(self, batch, next_quantiles, next_q, target_net)
        levels = midpoints(self.num_quantiles, quantiles)
        return _regression(quantiles, levels, target, batch.weight, self.kappa)


class IQN(DQN):
    """Implicit quantile networks: quantiles of the return at random levels (Dabney et al. 2018b).

    Action values are means over evenly spaced levels, while the paper draws them too.

    Args:
        observation_space: space of one observation; the CLI takes it from the environment.
        action_space: discrete space of actions; the CLI takes it from the environment.
        network: network with features, num_features and a head with one value per action, like `MLP`.
        num_quantiles: number of levels drawn for the estimate, N.
        num_target_quantiles: number of levels drawn for the target, N'.
        num_policy_quantiles: number of evenly spaced levels for the action values, K.
        num_cosines: number of cosine features of a level.
        kappa: error beyond which the quantile Huber loss is linear.
        **kwargs: arguments of `DQN` except loss.

    Raises:
        TypeError: if the network has no features, num_features or head, or for an unknown argument.
        ValueError: if a value is not positive.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        network: NetworkCallable = MLP,
        num_quantiles: int = 8,
        num_target_quantiles: int = 8,
        num_policy_quantiles: int = 32,
        num_cosines: int = 64,
        kappa: float = 1.0,
        **kwargs: Any,
    ) -> None:
        counts = {
            "num_quantiles": num_quantiles,
            "num_target_quantiles": num_target_quantiles,
            "num_policy_quantiles": num_policy_quantiles,
        }
        check_positive(**counts, num_cosines=num_cosines, kappa=kappa)
        super().__init__(
            observation_space,
            action_space,
            network=lambda space, num_actions: ImplicitQuantiles(network(space, num_actions), num_cosines=num_cosines),
            loss="huber",
            **kwargs,
        )
        self.num_quantiles, self.num_target_quantiles = num_quantiles, num_target_quantiles
        self.num_policy_quantiles, self.kappa = num_policy_quantiles, kappa

    def action_values(self, net: QFunction, observation: Tensor) -> Tensor:
        """Means over evenly spaced quantiles, (B, A)."""
        levels = midpoints(self.num_policy_quantiles, self.epsilon)
        return net(observation, levels.expand(len(observation), -1)).mean(2)

    def td_loss(self, batch: AnyTransition, policy_net: QFunction, target_net: QFunction) -> TDLoss:
        """Quantile regression between two random sets of levels (eq. 3)."""
        size, like = len(batch.reward), batch.reward
        levels = torch.rand(size, self.num_quantiles, dtype=like.dtype, device=like.device)
        quantiles = gather_actions(policy_net(batch.observation, levels), batch.action - self.first_action)
        with torch.no_grad():
            next_levels = torch.rand(size, self.num_target_quantiles, dtype=like.dtype, device=like.device)
            next_quantiles = target_net(batch.next_observation, next_levels)
            next_q = self.action_values(policy_net if self.double_q else target_net, batch.next_observation)
            target = quantile_target(self, batch, next_quantiles, next_q, target_net)
        return _regression(quantiles, levels, target, batch.weight, self.kappa)


def midpoints(count: int, like: Tensor) -> Tensor:
    """Midpoints of Z equal intervals of [0, 1], (Z,)."""
    # tau_i = (2 i - 1) / 2 Z  (Dabney et al. 2018a, lemma 2)
    return (torch.arange(count, dtype=like.dtype, device=like.device) + 0.5) / count


def quantile_target(
    module: DQN, batch: AnyTransition, next_quantiles: Tensor, next_q: Tensor, target_net: QFunction
) -> Tensor:
    """Quantiles of the target, (B, Z).

    Args:
        module: its options munchausen_temperature and first_action are used.
        batch: (B, ...) transitions.
        next_quantiles: (B, A, Z) quantiles of the next observation by the target net.
        next_q: (B, A) values that select the next action.
        target_net: network of the Munchausen policy.
    """
    reward, temperature = batch.reward, module.munchausen_temperature
    next_q = mask_actions(next_q, batch.next_action_mask)
    if temperature is None:
        value = gather_actions(next_quantiles, next_q.argmax(1))
    else:
        q_values = mask_actions(module.action_values(target_net, batch.observation), batch.action_mask)
        reward = reward + munchausen_bonus(q_values, batch.action - module.first_action, temperature=temperature)
        value = soft_value(next_quantiles, next_q, temperature=temperature)
    return reward.unsqueeze(1) + batch.discount.unsqueeze(1) * value


def _regression(quantiles: Tensor, levels: Tensor, target: Tensor, weight: Tensor, kappa: float) -> TDLoss:
    rows = quantile_huber(quantiles, levels, target, kappa=kappa)
    q_value = quantiles.mean(1)
    return TDLoss((weight * rows).mean(), q_value, q_value - target.mean(1), rows)
