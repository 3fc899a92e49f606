"""DQN as a LightningModule: policy net, target net, action selection and the update.

`data.ReplayDataset` provides its batches; `callbacks` update the target net and epsilon.
Legend: U updates, B batch, N envs, A actions.
"""

import math
import os
from collections.abc import Callable, Collection, Iterable
from typing import Any, ClassVar, Literal, Self

import gymnasium as gym
import lightning.pytorch as pl
import numpy as np
import torch
from gymnasium import spaces
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_dqn._compat.lightning import attached_trainer
from lightning_dqn.acting import act, as_batch, compute_q_values
from lightning_dqn.callbacks import EpsilonDecay, EpsilonSchedule, PriorityUpdate, SoftTargetUpdate, UpdateCallback
from lightning_dqn.distributed.sync import check_networks, gather_over_ranks
from lightning_dqn.evaluation import EpisodeMetrics
from lightning_dqn.losses import (
    LOSSES,
    TDLoss,
    double_q_target,
    gather_actions,
    mask_actions,
    munchausen_target,
    q_target,
)
from lightning_dqn.networks import MLP, NoisyLinear, ObservationNormalizer
from lightning_dqn.replay import AnyTransition
from lightning_dqn.resume.arguments import record_arguments
from lightning_dqn.resume.checkpoint import check_checkpoint, complete_checkpoint, make_module, prepare_resume
from lightning_dqn.resume.checkpoint_io import AtomicCheckpointIO
from lightning_dqn.resume.manifest import build_manifest, check_same_on_ranks
from lightning_dqn.resume.rng import seed_rank, set_rng_state
from lightning_dqn.resume.shards import check_plugin
from lightning_dqn.speed.compiled import QFunction
from lightning_dqn.speed.flat import PolicyTargetParams, make_optimizer, polyak_update_nets
from lightning_dqn.speed.optimizers import can_be_flat, check_optimizer
from lightning_dqn.speed.updater import FastUpdate, denormals_are_flushed, make_updater
from lightning_dqn.validation import check_positive

NetworkCallable = Callable[[gym.Space[Any], Any], nn.Module]
OptimizerCallable = Callable[[Any], torch.optim.Optimizer]
SchedulerCallable = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


@record_arguments
class DQN(pl.LightningModule):
    """Deep Q-learning (Mnih et al. 2015).

    Args:
        observation_space: space of one observation; the CLI takes it from the environment.
        action_space: discrete space of actions; the CLI takes it from the environment.
        network: network with one value per action; built twice, as policy_net and target_net.
        optimizer: optimizer of policy_net.
        lr_scheduler: learning-rate schedule, stepped after each update; null for a constant rate.
        clip_grad_value: largest absolute value of a gradient entry; null for no limit.
        clip_grad_norm: largest norm of the gradient, applied after clip_grad_value; null for no limit.
        loss: loss function, huber (delta 1) or mse (half the squared error).
        double: whether policy_net selects the next action and target_net evaluates it (van Hasselt et al. 2016).
        munchausen: whether to add the scaled log-policy to rewards and to use soft values (Vieillard et al. 2020).
        munchausen_temperature: temperature of the softmax policy of munchausen.
        boltzmann_temperature: temperature T of exploration by a softmax of Q / T in place of epsilon; null for epsilon.
        compile: whether to compile the gradient; auto does so on CPUs for runs of at least 10,000 updates.
        normalize_observations: whether to normalize observations (Box of floats) by their running mean and variance,
            which are updated in training only.
        reward_scale: factor of rewards in the loss, not in logged returns; it also scales C51's v_min and v_max.

    Raises:
        TypeError: if the action space is not discrete or the network can't take the observations.
        ValueError: if a value is out of its range, or two arguments contradict each other.
    """

    # whether it learns on-policy, from the rollouts of `make_rollouts`, without replay memory and target net
    on_policy: ClassVar[bool] = False

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        network: NetworkCallable = MLP,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4, amsgrad=True),
        lr_scheduler: SchedulerCallable | None = None,
        clip_grad_value: float | None = 100.0,
        clip_grad_norm: float | None = None,
        loss: Literal["huber", "mse"] = "huber",
        double: bool = False,
        munchausen: bool = False,
        munchausen_temperature: float = 0.03,
        boltzmann_temperature: float | None = None,
        compile: bool | Literal["auto"] = "auto",
        normalize_observations: bool = False,
        reward_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(action_space, spaces.Discrete):
            raise TypeError(f"action_space {action_space}: Q-learning needs a Discrete space of actions")
        if double and munchausen:
            raise ValueError("double=True, munchausen=True: soft values pick no action; choose one of them")
        if loss not in LOSSES:
            raise ValueError(f"loss={loss}: must be {' or '.join(LOSSES)}")
        if not 0 < reward_scale < math.inf:
            raise ValueError(f"reward_scale={reward_scale}: must be a positive finite number")
        positive = {"clip_grad_value": clip_grad_value, "clip_grad_norm": clip_grad_norm}
        positive["munchausen_temperature"] = munchausen_temperature
        positive["boltzmann_temperature"] = boltzmann_temperature
        check_positive(**positive)
        self.automatic_optimization = False
        self.observation_space = observation_space
        self.action_space = action_space
        self.num_actions, self.first_action = int(action_space.n), int(action_space.start)
        self.policy_net = network(observation_space, self.num_actions)
        self.target_net = None if self.on_policy else network(observation_space, self.num_actions)
        if self.target_net is not None:
            self.target_net.load_state_dict(self.policy_net.state_dict())
            self.target_net.requires_grad_(False)
        self.normalizer = ObservationNormalizer(observation_space) if normalize_observations else None
        self.reward_scale = reward_scale
        # noisy layers or a Boltzmann policy replace epsilon-greedy exploration
        self.is_noisy = any(isinstance(layer, NoisyLinear) for layer in self.policy_net.modules())
        self.explores_without_epsilon = self.is_noisy or boltzmann_temperature is not None
        self.clip_grad_value, self.clip_grad_norm = clip_grad_value, clip_grad_norm
        self.weighted_loss = LOSSES[loss]
        self.double_q = double
        self.munchausen, self.munchausen_temperature = munchausen, munchausen_temperature if munchausen else None
        self.boltzmann_temperature = boltzmann_temperature
        self._make_optimizer, self._make_scheduler = optimizer, lr_scheduler
        check_optimizer(optimizer, lr_scheduler, self.policy_net)
        # identifies the run; built in `setup`
        self.manifest: dict[str, Any] | None = None
        self._update_callbacks: list[UpdateCallback] = []
        self._iteration_callbacks: list[UpdateCallback] = []
        self.compile_gradient = compile
        self._flat: PolicyTargetParams | None = None
        # a faster equivalent of `update`, built at the first update of a fit; None to use `update`
        self._fast_update: FastUpdate | None = None
        self._fast_update_is_known = False
        self._scheduler: Any = None
        self._flushed_before = False
        # whether the gradient is compiled, in this run or the one that is resumed; RNG states to restore
        self._compiled = False
        self.rng_state: dict[str, Any] | None = None
        self.register_buffer("epsilon", torch.tensor(1.0))
        self.epsilon: Tensor
        self._epsilon = [1.0]
        self.register_load_state_dict_post_hook(_read_loaded_epsilon)  # type: ignore[no-untyped-call]
        self.episode_metrics = EpisodeMetrics()

    def probe_optimizer(self) -> tuple[torch.optim.Optimizer, Any]:
        """An optimizer and a schedule like those of a fit, for inspection; the schedule is None without one."""
        optimizer, scheduler = check_optimizer(self._make_optimizer, self._make_scheduler, self.policy_net)
        if can_be_flat(self.policy_net, optimizer):
            size = sum(parameter.numel() for parameter in self.policy_net.parameters())
            vector = nn.Parameter(torch.zeros(size))
            optimizer, scheduler = check_optimizer(lambda _: self._make_optimizer([vector]), self._make_scheduler, self)
        return optimizer, scheduler

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the policy net, over one flat vector if it is elementwise, and the schedule."""
        optimizer, self._flat = make_optimizer(self._make_optimizer, self.policy_net, self.target_net)
        if self._make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._make_scheduler(optimizer)}

    def update_target(self, tau: float) -> None:
        """Update the target net, if there is one: target <- (1 - tau) * target + tau * policy."""
        if self.target_net is not None:
            polyak_update_nets(self.target_net, self.policy_net, self._flat, tau)

    def forward(self, observation: Tensor) -> Tensor:
        """Return the Q-values (B, A) of the policy net for observations (B, ...)."""
        return self.action_values(self.policy_net, self.normalize(observation))

    def normalize(self, observation: Tensor) -> Tensor:
        """Return normalized observations (..., *shape), or the same without `normalize_observations`."""
        return observation if self.normalizer is None else self.normalizer(observation)

    def update_normalizer(self, observation: Tensor) -> None:
        """Update the running statistics, if any, with observations (..., *shape) of all ranks."""
        if self.normalizer is not None:
            self.normalizer.update(observation, gather_over_ranks if self.trainer.world_size > 1 else None)

    def prepare_batch(self, batch: AnyTransition) -> AnyTransition:
        """Return the batch (U, B) of an iteration with normalized observations and scaled rewards."""
        self.update_normalizer(batch.observation)
        return batch._replace(
            observation=self.normalize(batch.observation),
            next_observation=self.normalize(batch.next_observation),
            reward=batch.reward if self.reward_scale == 1 else batch.reward * self.reward_scale,
        )

    def action_values(self, net: QFunction, observation: Tensor) -> Tensor:
        """Return the Q-values (B, A) of one of the nets for observations (B, ...)."""
        return net(observation)

    def set_epsilon(self, epsilon: float) -> None:
        """Set the probability of a random action, in [0, 1]."""
        self.epsilon.fill_(epsilon)
        # a list, since assigning an attribute of a Module takes as long as choosing an action
        self._epsilon[0] = epsilon

    def read_epsilon(self) -> float:
        """Return the probability of a random action, without a device synchronization."""
        return self._epsilon[0]

    def act(
        self,
        observation: Any,
        rng: np.random.Generator | None = None,
        action_mask: NDArray[np.bool_] | None = None,
    ) -> Any:
        """Choose actions: epsilon-greedy with a random generator, greedy without one.

        Args:
            observation: one observation, or an array of N observations; lists are converted.
            rng: random generator of exploration.
            action_mask: (A,) or (N, A), True for allowed actions; None if all are allowed.

        Returns:
            One action as an int, or an array (N,) of actions, as the environment takes them.

        Raises:
            ValueError: if the observation does not fit the observation space.
        """
        batch, is_single = as_batch(observation, self.observation_space)
        if is_single and action_mask is not None:
            action_mask = np.asarray(action_mask)[None]
        action = act(self, batch, rng, action_mask)
        return int(action[0]) if is_single else action

    def policy(
        self,
        observation: NDArray[Any],
        state: Tensor | None,
        first: NDArray[np.bool_],
        rng: np.random.Generator | None = None,
        action_mask: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.int64], Tensor | None]:
        """Choose the actions of N environments; see `collector.Policy`. Feed-forward networks have no state."""
        return act(self, observation, rng, action_mask), None

    def q_values(self, observation: Any) -> NDArray[np.float32]:
        """Return the Q-values of the policy net, (A,) or (N, A), without exploration noise."""
        batch, is_single = as_batch(observation, self.observation_space)
        values = compute_q_values(self, batch, noisy=False)
        return values[0] if is_single else values

    def setup(self, stage: str) -> None:
        """Build the manifest of the run, and check that it is the same on all ranks.

        Raises:
            MisconfigurationException: naming an argument that differs between ranks, with both values.
        """
        if stage == "fit":
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            self.manifest = build_manifest(self, data, self.trainer.callbacks)  # type: ignore[attr-defined]
            if self.trainer.world_size > 1 and hasattr(data, "sync"):
                check_same_on_ranks(self.manifest, self.trainer, data.sync)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Add a default target update, epsilon schedule and priority update if the trainer has none."""
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        sampler = getattr(self.trainer.datamodule, "probe_sampler", None)  # type: ignore[attr-defined]
        missing: list[pl.Callback] = []
        if self.target_net is not None and not any(getattr(each, "updates_target", False) for each in callbacks):
            missing.append(SoftTargetUpdate())
        if not any(isinstance(each, EpsilonSchedule) for each in callbacks):
            missing.append(EpsilonDecay())
        if getattr(sampler, "uses_priorities", False) and not any(isinstance(c, PriorityUpdate) for c in callbacks):
            missing.append(PriorityUpdate())
        # first, so that callbacks that log or save see the state after the update
        callbacks[:0] = missing
        return []

    def on_fit_start(self) -> None:
        """Collect the callbacks of an update.

        Raises:
            MisconfigurationException: if the trainer has two epsilon schedules, or if several ranks can't be trained
                or saved with this network and these plugins.
        """
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        schedules = [type(each).__name__ for each in callbacks if isinstance(each, EpsilonSchedule)]
        if len(schedules) > 1:
            raise MisconfigurationException(f"callbacks={schedules}: two epsilon schedules; pass one of them")
        check_plugin(self.trainer)
        if self.trainer.world_size > 1:
            check_networks(self)
        self._fast_update, self._fast_update_is_known = None, False
        self._flushed_before = denormals_are_flushed()
        ours = [each for each in callbacks if isinstance(each, UpdateCallback)]
        self._update_callbacks = [each for each in ours if is_overridden("on_update_end", each, UpdateCallback)]
        self._iteration_callbacks = [each for each in ours if is_overridden("on_iteration_end", each, UpdateCallback)]

    def on_train_start(self) -> None:
        """Restore the random generators of a resumed run; seed them by rank in a new one."""
        if self.rng_state is None:
            seed_rank(self.global_rank, self.trainer.global_step)
        else:
            set_rng_state(self.rng_state, self.device)
        self.rng_state = None

    def training_step(self, chunk: Iterable[AnyTransition] | AnyTransition, batch_idx: int) -> dict[str, Tensor] | None:
        """Run the iterations of a chunk: each steps the environments, then makes U updates, one a minibatch.

        Args:
            chunk: the iterations; also a single batch of leading shape (U, B).
            batch_idx: number of the chunk in its epoch.

        Returns:
            loss (U,), q_value, td_error and priority (U, B) of all updates of the chunk, detached; None if there was
            no update.
        """
        results: list[TDLoss] = []
        batches: Iterable[Any] = (chunk,) if isinstance(chunk, tuple) else chunk
        for batch in batches:
            # U = 0 during the warm-up
            of_iteration = self._update_all(batch) if len(batch.reward) else []
            for callback in self._iteration_callbacks:
                callback.on_iteration_end(self.trainer, self, batch, of_iteration)
            results += of_iteration
        if not results:
            return None
        # a view if there is only one
        stacked = (torch.stack(parts) if len(parts) > 1 else parts[0][None] for parts in zip(*results, strict=True))
        return TDLoss(*stacked)._asdict()

    def _update_all(self, batch: AnyTransition) -> list[TDLoss]:
        """Make the U updates of an iteration."""
        batch = self.prepare_batch(batch)
        if not self._fast_update_is_known:
            # a compiled gradient rounds differently, so a resumed run keeps it
            compile = True if self.compile_gradient == "auto" and self._compiled else self.compile_gradient
            if type(self).update is DQN.update:
                self._fast_update = make_updater(self, self._flat, batch, compile=compile)
            self._fast_update_is_known, self._compiled = True, self.update_mode == "compiled"
            self._scheduler = self.lr_schedulers()
        update = self.update if self._fast_update is None else self._fast_update
        if self._flat is not None:
            for parameters in self._flat:
                parameters.rebind()
        # Adam's moments of unused weights become denormal numbers, which are a hundred times slower on a CPU
        torch.set_flush_denormal(True)
        try:
            return [update(type(batch)(*minibatch)) for minibatch in zip(*(p.unbind() for p in batch), strict=True)]
        finally:
            torch.set_flush_denormal(self._flushed_before)

    def update(self, batch: AnyTransition) -> TDLoss:
        """Make one update of the policy net with a minibatch (B,); `speed.make_updater` may return an equivalent.

        Returns:
            The parts of the loss, detached.
        """
        optimizer: Any = self.optimizers()
        target_net = self.policy_net if self.target_net is None else self.target_net
        result = self.td_loss(batch, self.policy_net, target_net)
        optimizer.optimizer.zero_grad()
        self.manual_backward(result.loss)
        if self.clip_grad_value is not None:
            self.clip_gradients(optimizer.optimizer, self.clip_grad_value, "value")
        if self.clip_grad_norm is not None:
            self.clip_gradients(optimizer.optimizer, self.clip_grad_norm, "norm")
        optimizer.step()
        self.end_update()
        return TDLoss(*(part.detach() for part in result))

    def end_update(self) -> None:
        """Step the learning-rate schedule, and call `on_update_end` of the callbacks, which updates the target net."""
        if self._scheduler is not None:
            self._scheduler.step()
        for callback in self._update_callbacks:
            callback.on_update_end(self.trainer, self)

    @property
    def update_mode(self) -> Literal["plain", "fast", "compiled"]:
        """The implementation of the updates of this fit; valid after the first update."""
        if self._fast_update is None:
            return "plain"
        return "compiled" if self._fast_update.compiled else "fast"

    def td_loss(self, batch: AnyTransition, policy_net: QFunction, target_net: QFunction) -> TDLoss:
        """Return the loss of a minibatch (B,); without a target net, `target_net` is the policy net."""
        action = batch.action - self.first_action
        q_value = gather_actions(policy_net(batch.observation), action)
        with torch.no_grad():
            next_q = mask_actions(target_net(batch.next_observation), batch.next_action_mask)
            known = batch.reward, batch.discount, next_q
            if self.munchausen_temperature is not None:
                target_q = mask_actions(target_net(batch.observation), batch.action_mask)
                target = munchausen_target(*known, target_q, action, temperature=self.munchausen_temperature)
            elif self.double_q:
                next_policy_q = mask_actions(policy_net(batch.next_observation), batch.next_action_mask)
                target = double_q_target(*known, next_policy_q)
            else:
                target = q_target(*known)
        td_error = q_value - target
        return TDLoss(self.weighted_loss(q_value, target, batch.weight), q_value, td_error, td_error.abs())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Record one greedy episode, with its episode_return and episode_length."""
        self.episode_metrics.update(batch.episode_return, batch.episode_length)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log val/episode_return with its std, min and max, and val/episode_length."""
        self._log_episodes("val")

    def on_test_epoch_end(self) -> None:
        """Log test/episode_return with its std, min and max, and test/episode_length."""
        self._log_episodes("test")

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """One greedy episode: observation (T, ...), action (T,), reward (T,) and q_values (T, A)."""
        played = {"observation": batch.observation, "action": batch.action, "reward": batch.reward}
        return {**played, "q_values": self(batch.observation)}

    def _log_episodes(self, stage: str) -> None:
        self.log_dict({f"{stage}/{name}": value for name, value in self.episode_metrics.compute().items()})
        self.episode_metrics.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the manifest, the description of the agent, and the state that an exact resume needs."""
        checkpoint["compiled"] = self._compiled
        complete_checkpoint(checkpoint, self, attached_trainer(self))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the checkpoint before anything is loaded; a fit also requires the same run and its full state.

        Raises:
            MisconfigurationException: if the checkpoint is of another environment, network or run.
            CheckpointError: naming the first value that is missing or is not what it should be.
        """
        trainer = attached_trainer(self)
        if trainer is None or trainer.state.fn != "fit":
            check_checkpoint(checkpoint, self)
            # unchecked states that Lightning would load
            checkpoint["callbacks"] = {}
            return
        check_checkpoint(checkpoint, self, trainer, trainer.datamodule)  # type: ignore[attr-defined]
        prepare_resume(checkpoint, trainer)
        self.rng_state, self._compiled = checkpoint.get("generators"), checkpoint["compiled"]

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | os.PathLike[str],
        map_location: Any = None,
        *,
        trusted_modules: Collection[str] = (),
        **arguments: Any,
    ) -> Self:
        """Load a module from a checkpoint: its class, arguments and weights. Nothing in the file is executed.

        Args:
            checkpoint_path: of a `.ckpt` file.
            map_location: device of the tensors; the CPU by default.
            trusted_modules: modules and packages from which the checkpoint may name classes; they are imported.
            arguments: constructor arguments in place of those of the checkpoint, such as a `network` that was given as
                a Python function.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: if it is no checkpoint of this package, is damaged, or needs a module that is not trusted.
        """
        checkpoint = AtomicCheckpointIO().load_agent_part(checkpoint_path, map_location)
        return make_module(cls, checkpoint, trusted_modules, arguments)


def _read_loaded_epsilon(module: nn.Module, _: Any) -> None:
    """Set the epsilon of a `DQN` to the value loaded into its buffer."""
    if isinstance(module, DQN):
        module.set_epsilon(float(module.epsilon))
