"""The learner: two networks, the policy they make, and one Huber step an update.

Judges what `data.ReplayDataset` plays; the callbacks keep its schedules (epsilon, target net).
Legend: U updates, B batch, N envs, A actions.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import gymnasium as gym
import lightning.pytorch as pl
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import CatMetric

from lightning_dqn.compilation import QFunction
from lightning_dqn.continuing import generators_state, prepare_to_go_on, set_generators
from lightning_dqn.fingerprint import learner_in_words, refuse_foreign
from lightning_dqn.losses import chosen_q_values, double_q_target, move_towards, q_target, weighted_huber
from lightning_dqn.networks import MLP
from lightning_dqn.optimizers import can_be_flat, check_optimizer, prefer_fused
from lightning_dqn.replay import Transition
from lightning_dqn.update import FlatParameters, Limits, choose_update, denormals_are_flushed, find_schedules

# attributes that change in every iteration: past nn.Module's search for parameters
PLAIN_ATTRIBUTES = frozenset({"_current_fx_name", "_known_epsilon"})

# observations for which the calls of a forward pass cost more than its arithmetic
FEW_OBSERVATIONS = 32

NetworkCallable = Callable[[gym.Space[Any], int], nn.Module]
OptimizerCallable = Callable[[Any], torch.optim.Optimizer]


class DQN(pl.LightningModule):
    """Deep Q-learning (Mnih et al. 2015).

    Args:
        observation_space: space of one observation; the CLI takes it from the environment.
        action_space: discrete space of actions; the CLI takes it from the environment.
        network: what maps observations to one value an action; made twice, as policy_net and target_net.
        optimizer: what moves the parameters of policy_net.
        clip_grad_value: largest absolute value of a gradient entry; null leaves gradients as they are.
        clip_grad_norm: largest norm of the whole gradient, taken after its entries are clipped; null for any.
        double: whether the policy net picks the action that the target net judges (Double DQN).
        compile: whether the gradient is compiled; auto does so on CPUs, in runs of 10,000 updates or more.

    Raises:
        TypeError: if the action space is not discrete or the network can't take the observations.
        ValueError: if clip_grad_value, clip_grad_norm or the learning rate is not positive.
    """

    # whether it learns from rollouts of its own policy, with neither memory nor target net: the data side asks
    on_policy: ClassVar[bool] = False

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        network: NetworkCallable = MLP,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4, amsgrad=True),
        clip_grad_value: float | None = 100.0,
        clip_grad_norm: float | None = None,
        double: bool = False,
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(action_space, spaces.Discrete):
            raise TypeError(f"action_space {action_space}: Q-learning needs a Discrete space of actions")
        for name, value in (("clip_grad_value", clip_grad_value), ("clip_grad_norm", clip_grad_norm)):
            if value is not None and value <= 0:
                raise ValueError(f"model.{name}={value}: must be positive, or null for no clipping")
        self.automatic_optimization = False
        self.observation_space = observation_space
        self.action_space = action_space
        self.num_actions, self.first_action = int(action_space.n), int(action_space.start)
        self.policy_net = network(observation_space, self.num_actions)
        self.target_net = None if self.on_policy else network(observation_space, self.num_actions)
        if self.target_net is not None:
            self.target_net.load_state_dict(self.policy_net.state_dict())
            self.target_net.requires_grad_(False)
        self.clip_grad_value, self.clip_grad_norm = clip_grad_value, clip_grad_norm
        self.double_q = double
        self._make_optimizer = optimizer
        knobs = {"model": type(self).__qualname__, "double": double}
        knobs |= {"clip_grad_value": clip_grad_value, "clip_grad_norm": clip_grad_norm}
        throwaway = check_optimizer(optimizer, self.policy_net)
        self._words = learner_in_words(observation_space, action_space, throwaway, knobs)
        self._after_update: list[Callable[[DQN], None]] = []
        self.compile_gradient = compile
        self._flat: tuple[FlatParameters, FlatParameters] | None = None
        # chosen at the first update of a fit, when it is known where and how long it runs
        self._update: Callable[[Transition], tuple[Tensor, ...]] | None = None
        self._flushed_before = False
        # whether the gradient is compiled, or was when a fit that goes on was stopped; and its generators
        self._compiled = False
        self._generators: dict[str, Any] | None = None
        self.register_buffer("epsilon", torch.tensor(1.0))
        self.epsilon: Tensor
        self._known_epsilon = (1.0, -1)
        self.episode_return = CatMetric()
        self.episode_length = CatMetric()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of the policy net, on one flat vector if it treats all entries alike."""
        optimizer = self._make_optimizer(self.policy_net.parameters())
        self._flat = None
        if can_be_flat(self.policy_net, optimizer):
            policy = FlatParameters(self.policy_net)
            self._flat = policy, policy if self.target_net is None else FlatParameters(self.target_net)
            optimizer = self._make_optimizer([policy.vector])
        prefer_fused(optimizer)
        return optimizer

    def move_target(self, tau: float) -> None:
        """Move the target net, if there is one, the share tau of the way to the policy net."""
        if self.target_net is None:
            return
        if self._flat is None:
            move_towards(list(self.target_net.parameters()), list(self.policy_net.parameters()), tau)
        else:
            self._flat[1].values.lerp_(self._flat[0].values, tau)

    def forward(self, observation: Tensor) -> Tensor:
        """(B, ...) observations to (B, A) action values of the policy net."""
        return self.policy_net(observation)  # type: ignore[no-any-return]

    def set_epsilon(self, epsilon: float) -> None:
        """Explore with this share of random actions from now on."""
        buffer = self.epsilon.fill_(epsilon)
        # reading a tensor costs a call and, on a GPU, a wait: what was written is known until somebody else writes
        self._known_epsilon = (epsilon, buffer._version)

    def _read_epsilon(self) -> float:
        buffer = self._buffers["epsilon"]
        known, version = self._known_epsilon
        return known if version == buffer._version else float(buffer)  # type: ignore[union-attr, arg-type]

    def act(self, observation: NDArray[Any], rng: np.random.Generator | None = None) -> NDArray[np.int64]:
        """Choose actions: epsilon-greedy with a generator, greedy without one.

        Args:
            observation: (N, ...) one observation an environment.
            rng: where chance comes from.

        Returns:
            (N,) actions as the environment takes them.
        """
        count = len(observation)
        explores = (rng.random(count) < self._read_epsilon()).nonzero()[0] if rng is not None else ()
        action = self._greedy(observation) if len(explores) < count else np.zeros(count, np.int64)
        if rng is not None and len(explores):
            action[explores] = rng.integers(self.num_actions, size=len(explores))
        return action + self.first_action

    def _greedy(self, observation: NDArray[Any]) -> NDArray[np.int64]:
        """Indices of the best actions, (N,)."""
        net = self.policy_net
        few = len(observation) <= FEW_OBSERVATIONS and observation.dtype == np.float32
        values = net.forward_numpy(observation) if few and type(net) is MLP else None
        if values is not None:
            best: NDArray[np.int64] = values.argmax(1)
        else:
            with torch.no_grad():
                best = net(torch.as_tensor(observation, device=self.device)).argmax(1).cpu().numpy()
        return best

    def on_fit_start(self) -> None:
        """Find the callbacks that keep the schedules, or raise a MisconfigurationException."""
        self._update = None
        self._flushed_before = denormals_are_flushed()
        self._after_update = find_schedules(self.trainer, has_target=self.target_net is not None)

    def on_train_start(self) -> None:
        """Put the generators back where a run that goes on left them, at the last moment before they are drawn from."""
        if self._generators is not None:
            set_generators(self._generators, self.device)
            self._generators = None

    def training_step(self, batch: Transition, batch_idx: int) -> dict[str, Tensor] | None:
        """Make U updates, one a minibatch.

        Args:
            batch: transitions of leading shape (U, B); U = 0 while the memory warms up.
            batch_idx: the iteration in its epoch.

        Returns:
            loss (U,), q_value (U, B) and td_error (U, B) without gradient, or nothing if there was no update.
        """
        if len(batch.reward) == 0:
            return None
        if self._update is None:
            # what was compiled before a stop stays so: it rounds otherwise
            compile = True if self.compile_gradient == "auto" and self._compiled else self.compile_gradient
            limits: Limits = {"value": self.clip_grad_value, "norm": self.clip_grad_norm}
            lean = choose_update(self, self.td_loss, self._flat, batch, compile=compile, limits=limits)
            self._update, self._compiled = lean or self._lightning_update, lean is not None and lean.compiled
        results = []
        # moments of weights that get no gradient end as denormal numbers, which take a CPU a hundred times as long
        torch.set_flush_denormal(True)
        try:
            for minibatch in zip(*(part.unbind() for part in batch), strict=True):
                results.append(self._update(Transition(*minibatch)))
                for callback in self._after_update:
                    callback(self)
        finally:
            torch.set_flush_denormal(self._flushed_before)
        # a view where there is nothing to stack
        of_all = (torch.stack(parts) if len(parts) > 1 else parts[0][None] for parts in zip(*results, strict=True))
        loss, q_value, td_error = of_all
        return {"loss": loss, "q_value": q_value, "td_error": td_error}

    # Lightning asks for it in every iteration, and Python builds it anew unless it is there
    training_step.__signature__ = inspect.signature(training_step)  # type: ignore[attr-defined]

    def td_loss(self, batch: Transition, policy_net: QFunction, target_net: QFunction) -> tuple[Tensor, Tensor, Tensor]:
        """The equations of one update: loss (), Q(s, a) (B,) and its error (B,), for a minibatch and two networks.

        Where there is no target net, the policy net stands in its place.
        """
        q_value = chosen_q_values(policy_net(batch.observation), batch.action - self.first_action)
        with torch.no_grad():
            next_target_q = target_net(batch.next_observation)
            if self.double_q:
                next_policy_q = policy_net(batch.next_observation)
                target = double_q_target(batch.reward, batch.discount, next_target_q, next_policy_q)
            else:
                target = q_target(batch.reward, batch.discount, next_target_q)
        return weighted_huber(q_value, target, batch.weight), q_value, q_value - target

    def _lightning_update(self, batch: Transition) -> tuple[Tensor, ...]:
        """One Huber step, through Lightning's own calls; its loss (), q_value (B,) and td_error (B,)."""
        target_net = self.policy_net if self.target_net is None else self.target_net
        loss, q_value, td_error = self.td_loss(batch, self.policy_net, target_net)
        optimizer: Any = self.optimizers()
        if self._flat is None:
            optimizer.zero_grad()
        else:
            self._flat[0].zero_grad()
        self.manual_backward(loss)
        for algorithm, limit in (("value", self.clip_grad_value), ("norm", self.clip_grad_norm)):
            if limit is not None:
                self.clip_gradients(optimizer.optimizer, limit, gradient_clip_algorithm=algorithm)
        optimizer.step()
        return loss.detach(), q_value.detach(), td_error.detach()

    def __setattr__(self, name: str, value: Any) -> None:
        """Lightning notes the running hook some 20 times an iteration; the search would be a tenth of its time."""
        if name in PLAIN_ATTRIBUTES:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Record one greedy episode, with its episode_return and episode_length."""
        self.episode_return.update(batch.episode_return)
        self.episode_length.update(batch.episode_length)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log val/episode_return with its std, min and max, and val/episode_length."""
        self._log_episodes("val")

    def on_test_epoch_end(self) -> None:
        """Log test/episode_return with its std, min and max, and test/episode_length."""
        self._log_episodes("test")

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """One greedy episode: observation (T, ...), action (T,), reward (T,) and q_values (T, A)."""
        return {
            "observation": batch.observation,
            "action": batch.action,
            "reward": batch.reward,
            "q_values": self(batch.observation),
        }

    def _log_episodes(self, stage: str) -> None:
        returns, lengths = self.episode_return.compute(), self.episode_length.compute()
        self.episode_return.reset()
        self.episode_length.reset()
        self.log_dict(
            {
                f"{stage}/episode_return": returns.mean(),
                f"{stage}/episode_return_std": returns.std(correction=0),
                f"{stage}/episode_return_min": returns.min(),
                f"{stage}/episode_return_max": returns.max(),
                f"{stage}/episode_length": lengths.mean(),
            }
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what this run is, so that it is not mistaken for another, and what else it needs to go on exactly."""
        generators = self._generators or generators_state(self.device)
        checkpoint.update(self._words, generators=generators, compiled=self._compiled)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare before anything is loaded; a fit keeps what waits until it goes on.

        Raises:
            MisconfigurationException: if the checkpoint is of another environment, network or run.
        """
        goes_on = self._trainer is not None and self.trainer.state.fn == "fit"
        self.check_checkpoint(checkpoint, goes_on=goes_on)
        if goes_on:
            self._generators, self._compiled = checkpoint.get("generators"), bool(checkpoint.get("compiled"))
            prepare_to_go_on(checkpoint, self.trainer)

    def check_checkpoint(self, checkpoint: dict[str, Any], *, goes_on: bool) -> None:
        """Refuse weights that can't be ours and, if the run shall go on, one with other knobs than ours; see above."""
        refuse_foreign(checkpoint, self._words, self.state_dict(), with_knobs=goes_on)
