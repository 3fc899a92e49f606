"""Categorical DQN. Legend: B batch, A actions, Z atoms."""

from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from lightning_dqn.losses import TDLoss, categorical_projection, gather_actions, mask_actions
from lightning_dqn.module import DQN, NetworkCallable
from lightning_dqn.networks import MLP
from lightning_dqn.replay import AnyTransition
from lightning_dqn.speed.compiled import QFunction


class C51(DQN):
    """Categorical DQN: the return distribution on fixed atoms (C51, Bellemare et al. 2017).

    Args:
        observation_space: space of one observation; the CLI takes it from the environment.
        action_space: discrete space of actions; the CLI takes it from the environment.
        network: network with num_atoms logits per action.
        num_atoms: number of atoms, Z.
        v_min: lowest atom, a lower bound of the discounted returns.
        v_max: highest atom, an upper bound of the discounted returns.
        **kwargs: arguments of `DQN` except loss and munchausen.

    Raises:
        TypeError: for an unknown argument.
        ValueError: if num_atoms is less than 2, or v_min is not below v_max.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        network: NetworkCallable = MLP,
        num_atoms: int = 51,
        v_min: float = -100.0,
        v_max: float = 100.0,
        **kwargs: Any,
    ) -> None:
        if num_atoms < 2:
            raise ValueError(f"num_atoms={num_atoms}: must be at least 2")
        if not v_min < v_max:
            raise ValueError(f"v_min={v_min}, v_max={v_max}: v_min must be below v_max")
        super().__init__(
            observation_space,
            action_space,
            network=lambda space, num_actions: network(space, (num_actions, num_atoms)),
            loss="huber",
            munchausen=False,
            munchausen_temperature=0.03,
            **kwargs,
        )
        self.num_atoms, self.v_min, self.v_max = num_atoms, v_min, v_max

    def action_values(self, net: QFunction, observation: Tensor) -> Tensor:
        """Means of the return distributions, (B, A)."""
        return self._means(net(observation))

    def td_loss(self, batch: AnyTransition, policy_net: QFunction, target_net: QFunction) -> TDLoss:
        """Cross-entropy to the projected target (algorithm 1); the priority is the KL divergence, as in Rainbow."""
        support = self._support(batch.reward)
        log_probs = gather_actions(policy_net(batch.observation), batch.action - self.first_action).log_softmax(1)
        with torch.no_grad():
            next_logits = target_net(batch.next_observation)
            picks = policy_net(batch.next_observation) if self.double_q else next_logits
            next_action = mask_actions(self._means(picks), batch.next_action_mask).argmax(1)
            next_probs = gather_actions(next_logits, next_action).softmax(1)
            # T z = r + gamma^k (1 - terminated) z
            atoms = batch.reward.unsqueeze(1) + batch.discount.unsqueeze(1) * support
            target = categorical_projection(atoms, next_probs, support)
            entropy = -torch.xlogy(target, target).sum(1)
        # L = -sum_i m_i ln p_i(s, a)
        rows = -(target * log_probs).sum(1)
        q_value = (log_probs.exp() * support).sum(1)
        td_error = q_value - (target * support).sum(1)
        return TDLoss((batch.weight * rows).mean(), q_value, td_error, (rows - entropy).clamp(min=0))

    def _means(self, logits: Tensor) -> Tensor:
        """(B, A, Z) logits to (B, A) means."""
        # Q(s, a) = sum_i z_i p_i(s, a)
        return (logits.softmax(2) * self._support(logits)).sum(2)

    def _support(self, like: Tensor) -> Tensor:
        return torch.linspace(self.v_min, self.v_max, self.num_atoms, dtype=like.dtype, device=like.device)
