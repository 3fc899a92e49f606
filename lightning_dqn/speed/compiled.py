"""Compiles the gradient of the learner's own loss, so that an update costs little more than its matrix products.

Called by `updater.make_updater`; knows no equations, only how to make given ones cheap.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_dqn._compat.torch import compile_function

QFunction = Callable[..., Tensor]
Loss = Callable[[Any, QFunction, QFunction], tuple[Tensor, ...]]
Gradient = Callable[..., tuple[Tensor, ...]]
GradTransform = Callable[[Tensor], Tensor]

# updates that save as much time as compiling takes, on slow machines and fast ones
WORTH_COMPILING = 10_000


class Parameters(Protocol):
    """A network whose parameters are one vector, as `flat.FlatParameters`."""

    net: nn.Module
    values: Tensor

    def function(self, vector: Tensor) -> QFunction: ...


def should_compile(trainer: Trainer, num_updates: int) -> bool:
    """Whether a fit makes so many updates, where compiling was measured, that it saves more time than it takes.

    Args:
        trainer: of the fit.
        num_updates: updates of one batch.
    """
    by_epochs = (trainer.max_epochs or 0) * float(trainer.num_training_batches) * num_updates
    planned = [by_epochs] * ((trainer.max_epochs or -1) > 0) + [trainer.max_steps] * (trainer.max_steps > 0)
    on_cpu = trainer.strategy.root_device.type == "cpu"
    return on_cpu and min(planned, default=math.inf) - trainer.global_step >= WORTH_COMPILING


def try_to_compile(
    loss: Loss,
    flat: tuple[Parameters, Parameters] | None,
    batch: Any,
    trainer: Trainer,
    *,
    finish: list[GradTransform],
    watched: bool,
) -> Gradient | None:
    """What `compile_gradient` gives, or nothing and a line of information where that can't be had.

    Args:
        loss: as there.
        flat: policy and target parameters, if the optimizer takes them as vectors.
        batch: as there.
        trainer: of the fit.
        finish: as there.
        watched: whether somebody has Lightning call it in the middle of an update.
    """
    precision = str(trainer.precision)
    if flat is None:
        obstacle = "this optimizer needs the parameters apart"
    elif not precision.endswith("true"):
        obstacle = f"precision {precision} mixes types"
    elif watched:
        obstacle = "a callback, or the module, takes part in the steps of an update"
    else:
        try:
            return compile_gradient(loss, *flat, batch, finish)
        except Exception as error:  # no compiler, or whatever a compiler may say: the plain path does the same
            obstacle = f"{type(error).__name__}: {error}".partition("\n")[0]
    rank_zero_info(f"The gradient is not compiled: {obstacle}. Training continues without it.")
    return None


def compile_gradient(
    loss: Loss, policy: Parameters, target: Parameters, batch: Any, finish: list[GradTransform]
) -> Gradient:
    """Compile the gradient of a loss with respect to the flat policy parameters.

    Args:
        loss: gives the loss (), and what else is to be known, for a batch, a policy net and a target net.
        policy: what it is differentiated by.
        target: what is held still.
        batch: a named tuple of tensors such as all later ones will be.
        finish: what is done to the gradient in the end.

    Returns:
        A function of policy vector, target vector and the fields of a batch that gives the gradient and all that the
        loss gives. It has no guards: shapes, types and devices must not change. Where it needs random numbers, it draws
        those that the loss itself would draw.
    """

    def gradient(vector: Tensor, target_vector: Tensor, *fields: Tensor) -> tuple[Tensor, ...]:
        def loss_of(vector: Tensor) -> tuple[Tensor, list[Tensor]]:
            value, *others = loss(type(batch)(*fields), policy.function(vector), held)
            return value, others

        held = target.function(target_vector)
        slope, (value, others) = torch.func.grad_and_value(loss_of, has_aux=True)(vector)
        for change in finish:
            slope = change(slope)
        return slope, value, *others

    example = [policy.values, target.values, *batch]
    on_cpu = policy.values.device.type == "cpu"
    decompositions: dict[Any, Any] = {torch.ops.aten.addmm.default: _decompose_addmm} if on_cpu else {}
    with _training(policy.net, target.net):
        try:
            return compile_function(gradient, example, decompositions=decompositions, simd_width=None)
        except Exception:
            # a compiler older than the CPU; all know 256 bits
            return compile_function(gradient, example, decompositions=decompositions, simd_width=256)


def _decompose_addmm(bias: Tensor, rows: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """A product and its bias as two operations, so that the bias is added in one pass with what follows, such as ReLU.

    On CPU torch copies the bias over the result before the product, in a pass of its own: a tenth of the gradient's
    time. A sum would be put together again by the compiler; a difference is not.
    """
    if beta != 1 or alpha != 1:
        return NotImplemented
    return torch.mm(rows, weight) - (-bias)


@contextlib.contextmanager
def _training(*nets: nn.Module) -> Iterator[None]:
    """Trace with the nets in the mode of training, as the plain path would run them."""
    modes = [net.training for net in nets]
    for net in nets:
        net.train()
    try:
        yield
    finally:
        for net, mode in zip(nets, modes, strict=True):
            net.train(mode)
