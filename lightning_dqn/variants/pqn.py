"""Q-learning without replay memory and target net, from rollouts.

Legend: U updates, B batch, T steps, N envs.
"""

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch

from lightning_dqn.envs import make_vector_env
from lightning_dqn.losses import TDLoss, gather_actions, lambda_returns, mask_actions, weighted_mse
from lightning_dqn.module import DQN, NetworkCallable, OptimizerCallable
from lightning_dqn.networks import MLP
from lightning_dqn.replay import AnyTransition, Transition
from lightning_dqn.speed.compiled import QFunction
from lightning_dqn.variants.rollouts import Rollout, RolloutDataset


class PQN(DQN):
    """Parallelized Q-learning (Gallici et al. 2024): parallel environments, layer norm and Q(lambda), no replay memory.

    A rollout has `data.num_envs` * `data.steps_per_iteration` steps. An iteration draws `data.updates_per_iteration`
    minibatches of `data.batch_size` steps from it without replacement, in several passes if needed.

    Args:
        observation_space: space of one observation; the CLI takes it from the environment.
        action_space: discrete space of actions; the CLI takes it from the environment.
        network: network with one value per action; without a target net, layer norm stabilizes it.
        optimizer: optimizer of the parameters.
        clip_grad_norm: maximum norm of the gradient; null for no limit.
        td_lambda: lambda of Q(lambda), in [0, 1]; 0 for one-step targets, 1 for the returns of the whole rollout.
        **kwargs: arguments of `DQN` except clip_grad_value and those of its loss, targets and exploration.

    Raises:
        TypeError: if the action space is not discrete, the network does not support the observations, or an argument is
            unknown.
        ValueError: if td_lambda, clip_grad_norm or the learning rate is out of its range.
    """

    on_policy: ClassVar[bool] = True

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        network: NetworkCallable = lambda observation_space, outputs: MLP(observation_space, outputs, layer_norm=True),
        optimizer: OptimizerCallable = lambda params: torch.optim.RAdam(params, lr=2.5e-4),
        clip_grad_norm: float | None = 10.0,
        td_lambda: float = 0.65,
        **kwargs: Any,
    ) -> None:
        if not 0 <= td_lambda <= 1:
            raise ValueError(f"td_lambda={td_lambda}: must be in [0, 1]")
        super().__init__(
            observation_space,
            action_space,
            network=network,
            optimizer=optimizer,
            clip_grad_norm=clip_grad_norm,
            clip_grad_value=None,
            loss="mse",
            double=False,
            munchausen=False,
            munchausen_temperature=0.03,
            boltzmann_temperature=None,
            **kwargs,
        )
        self.td_lambda = td_lambda

    def make_rollouts(
        self, data: Any, seed: np.random.SeedSequence, sample_seed: np.random.SeedSequence
    ) -> RolloutDataset:
        """The training dataset of a `DQNDataModule`.

        Args:
            data: the data module.
            seed: of exploration and of the environments.
            sample_seed: of the minibatches.
        """
        return RolloutDataset(
            envs=make_vector_env(data.env_settings, data.num_envs, data.vectorization),
            policy=self.policy,
            gamma=data.gamma,
            seed=seed,
            sample_seed=sample_seed,
            steps_per_iteration=data.steps_per_iteration,
            updates_per_iteration=data.updates_per_iteration,
            batch_size=data.batch_size,
            epoch_env_steps=data.epoch_env_steps,
            action_masks=data.action_masks,
            sync=data.sync,
        )

    @torch.no_grad()
    def prepare_batch(self, rollout: Rollout) -> Transition:  # type: ignore[override]
        """The minibatches of each update, (U, B), with the Q(lambda) returns as rewards and a discount of 0.

        Args:
            rollout: T steps in N environments, with the indices of each minibatch.
        """
        self.update_normalizer(rollout.observation[:-1])
        seen, rows = self.normalize(rollout.observation), rollout.index
        mask = rollout.action_mask[1:].flatten(0, 1)
        next_q = self.action_values(self.policy_net, seen[1:].flatten(0, 1))
        value = mask_actions(next_q, mask if mask.shape[1] else None).amax(1).view_as(rollout.reward)
        reward = rollout.reward * self.reward_scale
        returns = lambda_returns(reward, rollout.discount, rollout.ended, value, self.td_lambda)
        observation = seen[:-1].flatten(0, 1)[rows]
        return Transition(
            observation=observation,
            action=rollout.action.flatten()[rows],
            reward=returns.flatten()[rows],
            discount=torch.zeros_like(rows, dtype=returns.dtype),
            next_observation=observation,
            weight=torch.ones_like(rows, dtype=returns.dtype),
            index=rows,
        )

    def td_loss(self, batch: AnyTransition, policy_net: QFunction, target_net: QFunction) -> TDLoss:
        """TD loss of one minibatch, with the returns as targets."""
        q_value = gather_actions(policy_net(batch.observation), batch.action - self.first_action)
        td_error = q_value - batch.reward
        return TDLoss(weighted_mse(q_value, batch.reward, batch.weight), q_value, td_error, td_error.abs())
