"""The hot path of an update: no more calls than needed. Clever, and only here.

`module.DQN` owns the equations; this file makes them cheap. Parameters lie in one vector, see `flat`; where nobody
watches the steps of an update, they follow each other without Lightning's calls between them. `optimizers` makes its
last step cheaper still, `compilation` its first, and on a GPU `graphs` makes one launch of both.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypedDict

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_dqn.distributed.shards import check_plugin
from lightning_dqn.distributed.sync import check_networks, mean_over_ranks
from lightning_dqn.speed.compiled import Gradient, GradTransform, Loss, should_compile, try_to_compile
from lightning_dqn.speed.flat import FlatParameters
from lightning_dqn.speed.graphs import GraphedCall, Recorder, record_cuda_graph
from lightning_dqn.speed.optimizers import FusedStep, fused_step

# what callbacks and subclasses may have Lightning call in the middle of an update
HOOKS_OF_AN_UPDATE = (
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "backward",
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
)


class GradClip(TypedDict):
    """How far a gradient may go: largest absolute value of an entry, and largest Euclidean norm, if any."""

    value: float | None
    norm: float | None


class FastUpdate:
    """One update of a network on one vector: gradient, optimizer, and nothing else.

    Args:
        gradient: gives gradient and the parts of the loss for two vectors and the fields of a batch.
        flat: parameters of the policy net and of the target net.
        optimizer: of the policy net's vector, as Lightning wraps it: its counters are the update clock.
        finish: what remains to be done to a gradient, such as clipping.
        compiled: whether the gradient is.
        record: what makes one launch of all the kernels of an update, if that shall be done.
    """

    def __init__(
        self,
        gradient: Gradient,
        flat: tuple[FlatParameters, FlatParameters],
        optimizer: LightningOptimizer,
        *,
        finish: list[GradTransform],
        compiled: bool,
        record: Recorder | None = None,
    ) -> None:
        self.compiled = compiled
        self._gradient = gradient
        self._vector, self._values, self._target_values = flat[0].vector, flat[0].values, flat[1].values
        self._optimizer = optimizer
        self._finish = finish
        self._work: Callable[..., tuple[Tensor, ...]] = self._find
        self._step = step = fused_step(optimizer.optimizer, recorded=record is not None)
        if record is not None and isinstance(step, FusedStep):

            def find_and_step(*fields: Tensor) -> tuple[Tensor, ...]:
                results = self._find(*fields)
                step()
                return results

            self._work, self._step = GraphedCall(find_and_step, constants=step.constants, record=record), _nothing
        elif record is not None:
            # other optimizers look at numbers in each step, which stays apart
            self._work = GraphedCall(self._find, constants=tuple, record=record)

    def __call__(self, batch: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Make the update; the parts of its loss without gradient."""
        results = self._work(*batch)
        # LightningOptimizer.step, but for closures and hooks that nobody asks of such an update
        self._optimizer._on_before_step()
        self._step()
        self._optimizer._on_after_step()
        return results

    def _find(self, *fields: Tensor) -> tuple[Tensor, ...]:
        """Lay the gradient where the optimizer takes it; the parts of the loss."""
        gradient, *results = self._gradient(self._values, self._target_values, *fields)
        for change in self._finish:
            gradient = change(gradient)
        self._vector.grad = gradient
        return tuple(results)


def _nothing() -> None:
    """For a step that was made already."""


class LightningUpdate:
    """One update through Lightning's own calls: what callbacks, subclasses and strategies may take part in.

    Args:
        module: that is trained.
        loss: as in `choose_update`.
        flat: parameters of the policy net and of the target net, if the optimizer takes them as vectors.
        limits: of the gradient, as in `clip`.
    """

    compiled = False

    def __init__(
        self, module: Any, loss: Loss, flat: tuple[FlatParameters, FlatParameters] | None, limits: GradClip
    ) -> None:
        self._module, self._loss, self._flat, self._limits = module, loss, flat, limits

    def __call__(self, batch: Any) -> tuple[Tensor, ...]:
        """Make the update; the parts of its loss without gradient."""
        module = self._module
        target_net = module.policy_net if module.target_net is None else module.target_net
        loss, *others = self._loss(batch, module.policy_net, target_net)
        optimizer = module.optimizers()
        if self._flat is None:
            optimizer.zero_grad()
        else:
            self._flat[0].zero_grad()
        module.manual_backward(loss)
        for algorithm, limit in self._limits.items():
            if limit is not None:
                module.clip_gradients(optimizer.optimizer, limit, gradient_clip_algorithm=algorithm)
        optimizer.step()
        return loss.detach(), *(part.detach() for part in others)


Update = FastUpdate | LightningUpdate


def choose_update(
    module: LightningModule,
    loss: Loss,
    flat: tuple[FlatParameters, FlatParameters] | None,
    batch: Any,
    *,
    compile: bool | Literal["auto"],
    limits: GradClip,
) -> Update:
    """The leanest update that does what Lightning's own calls would do.

    Args:
        module: that is trained.
        loss: gives the loss (), and what else is to be known, for a batch, a policy net and a target net.
        flat: parameters of the policy net and of the target net, if the optimizer takes them as vectors.
        batch: U of the minibatches that all later ones will be like.
        compile: whether to compile the gradient; auto does so where it pays.
        limits: of the gradient, as in `clip`.
    """
    trainer = module.trainer
    watched = has_optimizer_hooks(trainer) or not is_plain_allreduce(trainer)
    minibatch = type(batch)(*(part[0] for part in batch))
    several = trainer.world_size > 1
    gradient, compiled = None, False
    finish: list[GradTransform] = [partial(clip, **limits)] if any(limits.values()) else []
    if compile is True or (compile == "auto" and should_compile(trainer, len(batch.reward))):
        # it is clipped after the mean over devices is taken; on one device the graph can do it
        inside = [] if several else finish
        gradient = try_to_compile(loss, flat, minibatch, trainer, finish=inside, watched=watched)
        compiled = gradient is not None
    if flat is not None and gradient is None and str(trainer.precision).endswith("true") and not watched:
        gradient = plain_gradient(loss, flat, type(batch))
    if flat is None or gradient is None:
        return LightningUpdate(module, loss, flat, limits)
    if several:
        finish = [mean_over_ranks, *finish]
    elif compiled:
        finish = []
    optimizer: Any = module.optimizers()
    # ranks wait for each other in the middle of an update
    record = record_cuda_graph if compiled and not several and module.device.type == "cuda" else None
    return FastUpdate(gradient, flat, optimizer, finish=finish, compiled=compiled, record=record)


def is_plain_allreduce(trainer: Trainer) -> bool:
    """Whether all that a strategy does with gradients is to take their mean over ranks, if there are several."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        return strategy._ddp_comm_hook is None and strategy._ddp_comm_state is None
    return isinstance(strategy, SingleDeviceStrategy)


def clip(gradient: Tensor, *, value: float | None, norm: float | None) -> Tensor:
    """A gradient within limits, as torch's `clip_grad_value_` and then `clip_grad_norm_` make it.

    Args:
        gradient: of all parameters, as one vector.
        value: largest absolute value of an entry, if any.
        norm: largest Euclidean norm, if any.
    """
    if value is not None:
        gradient = gradient.clamp(-value, value)
    if norm is not None:
        gradient = gradient * (norm / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1.0)
    return gradient


def collect_update_callbacks(trainer: Trainer, *, has_target: bool) -> list[Callable[[Any], None]]:
    """What the callbacks of a trainer do after each update.

    Args:
        trainer: of the fit.
        has_target: whether there is a target net, which somebody has to move.

    Raises:
        MisconfigurationException: if nothing moves the target net, sets epsilon or writes priorities that are needed,
            or checkpoints would lack what ranks but the first have, or networks would go astray on them.
    """
    check_plugin(trainer)
    if trainer.world_size > 1:
        check_networks(trainer.lightning_module)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    after_update = [callback.on_update_end for callback in callbacks if hasattr(callback, "on_update_end")]
    if has_target and not after_update:
        raise MisconfigurationException("Nothing moves target_net: Trainer(callbacks=...) needs SoftTargetUpdate()")
    if not any(hasattr(callback, "epsilon_at") for callback in callbacks):
        raise MisconfigurationException("Nothing sets epsilon: Trainer(callbacks=...) needs EpsilonDecay()")
    memory: Any = getattr(getattr(trainer.datamodule, "train_dataset", None), "memory", None)  # type: ignore[attr-defined]
    learns_from_errors = hasattr(getattr(memory, "sampler", None), "write")
    if learns_from_errors and not any(hasattr(callback, "beta_at") for callback in callbacks):
        raise MisconfigurationException("Nothing writes priorities: Trainer(callbacks=...) needs PriorityUpdate()")
    return after_update


def has_optimizer_hooks(trainer: Trainer) -> bool:
    """Whether a callback, or the module itself, has Lightning call it in the middle of an update."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(
        is_overridden(hook, watcher, type_)
        for hook in HOOKS_OF_AN_UPDATE
        for watcher, type_ in [(trainer.lightning_module, LightningModule), *((each, Callback) for each in callbacks)]
        if hasattr(type_, hook)
    )


def plain_gradient(loss: Loss, flat: tuple[FlatParameters, FlatParameters], batch_type: Callable[..., Any]) -> Gradient:
    """The gradient of a loss by torch's autograd, with the signature of a compiled one.

    Args:
        loss: as in `choose_update`.
        flat: parameters of the policy net and of the target net.
        batch_type: makes a batch of its fields.
    """
    policy, target = flat

    def gradient(_values: Tensor, _target_values: Tensor, *fields: Tensor) -> tuple[Tensor, ...]:
        policy.zero_grad()
        value, *others = loss(batch_type(*fields), policy.net, target.net)
        value.backward()  # type: ignore[no-untyped-call]
        return policy.gradient, value.detach(), *(part.detach() for part in others)

    return gradient


def denormals_are_flushed() -> bool:
    """Whether this process treats numbers too small for a normal float as 0."""
    return not bool((torch.tensor([1e-40]) * 1).any())
