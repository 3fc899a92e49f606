"""A faster equivalent of `DQN.update`, without Lightning's calls between the steps of an update.

The equations are those of `module.DQN`. Parameters are stored in one vector, see `flat`. `compiled` speeds up the
gradient, `optimizers` the optimizer step; on a GPU, `graphs` launches both as one CUDA graph.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from lightning_dqn._compat.lightning import counted_step, is_plain_allreduce, overrides_update_hook
from lightning_dqn.distributed.sync import mean_over_ranks
from lightning_dqn.losses import TDLoss
from lightning_dqn.speed.compiled import Gradient, GradTransform, Loss, should_compile, try_to_compile
from lightning_dqn.speed.flat import FlatParameters
from lightning_dqn.speed.graphs import GraphedCall, Recorder, record_cuda_graph
from lightning_dqn.speed.optimizers import FusedStep, fused_step


class FastUpdate:
    """One update of a network whose parameters are one vector: gradient and optimizer step.

    Args:
        gradient: returns the gradient and the parts of the loss, given both vectors and the fields of a batch.
        flat: parameters of the policy net and of the target net.
        optimizer: optimizer of the policy net's vector, wrapped by Lightning, which counts its steps in `global_step`.
        finish: transforms of the gradient, such as clipping.
        compiled: whether the gradient is compiled.
        end: called after each optimizer step.
        record: records a CUDA graph; None to run without one.
    """

    def __init__(
        self,
        gradient: Gradient,
        flat: tuple[FlatParameters, FlatParameters],
        optimizer: LightningOptimizer,
        *,
        finish: list[GradTransform],
        compiled: bool,
        end: Callable[[], None],
        record: Recorder | None = None,
    ) -> None:
        self.compiled = compiled
        self._end = end
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
            # other optimizers read Python numbers in each step, which a graph would keep constant
            self._work = GraphedCall(self._find, constants=tuple, record=record)

    def __call__(self, batch: tuple[Any, ...]) -> TDLoss:
        """Make the update, and return the parts of its loss, detached."""
        results = self._work(*batch)
        counted_step(self._optimizer, self._step)
        self._end()
        return TDLoss(*results)

    def _find(self, *fields: Tensor) -> tuple[Tensor, ...]:
        """Compute and store the gradient, and return the parts of the loss."""
        gradient, *results = self._gradient(self._values, self._target_values, *fields)
        for change in self._finish:
            gradient = change(gradient)
        self._vector.grad = gradient
        return tuple(results)


def _nothing() -> None:
    """Do nothing: the CUDA graph contains the optimizer step."""


def make_updater(
    module: Any, flat: tuple[FlatParameters, FlatParameters] | None, batch: Any, *, compile: bool | Literal["auto"]
) -> FastUpdate | None:
    """A faster equivalent of `module.update`, or None if Lightning's own calls are needed.

    Args:
        module: the `DQN` that is trained.
        flat: parameters of the policy net and of the target net, if they are stored as vectors.
        batch: U minibatches; all later ones must have their shapes and types.
        compile: whether to compile the gradient; "auto" compiles if that saves time.
    """
    trainer, loss = module.trainer, module.td_loss
    watched = overrides_update_hook(trainer) or not is_plain_allreduce(trainer.strategy)
    minibatch = type(batch)(*(part[0] for part in batch))
    several = trainer.world_size > 1
    gradient, compiled = None, False
    clips = module.clip_grad_value is not None or module.clip_grad_norm is not None
    finish: list[GradTransform] = (
        [partial(clip, value=module.clip_grad_value, norm=module.clip_grad_norm)] if clips else []
    )
    if compile is True or (compile == "auto" and should_compile(trainer, len(batch.reward))):
        # with several ranks the mean over ranks precedes the clipping; with one the compiled function clips
        inside = [] if several else finish
        gradient = try_to_compile(loss, flat, minibatch, trainer, finish=inside, watched=watched)
        compiled = gradient is not None
    if flat is not None and gradient is None and str(trainer.precision).endswith("true") and not watched:
        gradient = plain_gradient(loss, flat, type(batch))
    if flat is None or gradient is None:
        return None
    if several:
        finish = [mean_over_ranks, *finish]
    elif compiled:
        finish = []
    # with several ranks an update contains a collective call
    record = record_cuda_graph if compiled and not several and module.device.type == "cuda" else None
    return FastUpdate(
        gradient, flat, module.optimizers(), finish=finish, compiled=compiled, end=module.end_update, record=record
    )


def clip(gradient: Tensor, *, value: float | None, norm: float | None) -> Tensor:
    """Clip a gradient, as torch's `clip_grad_value_` followed by `clip_grad_norm_`.

    Args:
        gradient: (P,) gradient of all parameters.
        value: largest absolute value of an entry; None for no limit.
        norm: largest Euclidean norm; None for no limit.
    """
    if value is not None:
        gradient = gradient.clamp(-value, value)
    if norm is not None:
        gradient = gradient * (norm / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1.0)
    return gradient


def plain_gradient(loss: Loss, flat: tuple[FlatParameters, FlatParameters], batch_type: Callable[..., Any]) -> Gradient:
    """The gradient of a loss by autograd, with the signature of `compiled.compile_gradient`'s result.

    Args:
        loss: `DQN.td_loss`.
        flat: parameters of the policy net and of the target net.
        batch_type: constructs a batch from its fields.
    """
    policy, target = flat

    def gradient(_values: Tensor, _target_values: Tensor, *fields: Tensor) -> tuple[Tensor, ...]:
        policy.zero_grad()
        value, *others = loss(batch_type(*fields), policy.net, target.net)
        value.backward()  # type: ignore[no-untyped-call]
        return policy.gradient, value.detach(), *(part.detach() for part in others)

    return gradient


def denormals_are_flushed() -> bool:
    """Whether this process treats denormal numbers as 0."""
    return not bool((torch.tensor([1e-40]) * 1).any())
