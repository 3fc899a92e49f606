"""Compiles the gradient of a loss; called by `updater.make_updater`."""

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

# updates after which the saved time exceeds the compilation time
WORTH_COMPILING = 10_000


class Parameters(Protocol):
    """A network whose parameters are views of one vector, such as `flat.FlatParameters`."""

    net: nn.Module
    values: Tensor

    def function(self, vector: Tensor) -> QFunction: ...


def should_compile(trainer: Trainer, num_updates: int) -> bool:
    """Whether a fit on CPU makes enough updates for compiling to save more time than it takes.

    Args:
        trainer: trainer of the fit.
        num_updates: updates per iteration.
    """
    # a training batch is a chunk of iterations, unless the data module is of another kind
    loader = getattr(trainer.datamodule, "train_loader", None)  # type: ignore[attr-defined]
    iterations = float(trainer.num_training_batches) * (1 if loader is None else loader.chunk_length)
    by_epochs = (trainer.max_epochs or 0) * iterations * num_updates
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
    """The result of `compile_gradient`; None, with an info message, if the gradient can't be compiled.

    Args:
        loss: see `compile_gradient`.
        flat: policy and target parameters, if they are stored as vectors.
        batch: see `compile_gradient`.
        trainer: trainer of the fit.
        finish: see `compile_gradient`.
        watched: whether a callback or the module overrides a hook that Lightning calls during an update.
    """
    precision = str(trainer.precision)
    if flat is None:
        obstacle = "this optimizer needs separate parameters"
    elif not precision.endswith("true"):
        obstacle = f"precision {precision} mixes types"
    elif watched:
        obstacle = "a callback or the module overrides a hook of the update"
    else:
        try:
            return compile_gradient(loss, *flat, batch, finish)
        except Exception as error:  # no compiler, or any of its errors: the plain path is equivalent
            obstacle = f"{type(error).__name__}: {error}".partition("\n")[0]
    rank_zero_info(f"The gradient is not compiled: {obstacle}. Training continues without it.")
    return None


def compile_gradient(
    loss: Loss, policy: Parameters, target: Parameters, batch: Any, finish: list[GradTransform]
) -> Gradient:
    """Compile the gradient of a loss with respect to the flat policy parameters.

    Args:
        loss: returns the loss, (), and further tensors, given a batch, a policy net and a target net.
        policy: parameters to differentiate by.
        target: constant parameters.
        batch: a named tuple of tensors; all later ones must have its shapes and types.
        finish: transforms of the gradient, such as clipping.

    Returns:
        A function of policy vector (P,), target vector (P,) and the fields of a batch that returns the gradient (P,)
        and all results of the loss. It has no guards: shapes, types and devices must not change. It draws the same
        random numbers as the loss itself.
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
            # the compiler may not support the CPU's widest instructions; all support 256 bits
            return compile_function(gradient, example, decompositions=decompositions, simd_width=256)


def _decompose_addmm(bias: Tensor, rows: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """`addmm` as two operations, so that Inductor fuses the bias with the following operations, such as ReLU.

    On CPU `addmm` copies the bias into the result before the product, a tenth of the gradient's time. Inductor would
    fuse a sum into `addmm` again, but not a difference.
    """
    if beta != 1 or alpha != 1:
        return NotImplemented
    return torch.mm(rows, weight) - (-bias)


@contextlib.contextmanager
def _training(*nets: nn.Module) -> Iterator[None]:
    """Context manager in which the nets are in training mode, as in the plain path."""
    modes = [net.training for net in nets]
    for net in nets:
        net.train()
    try:
        yield
    finally:
        for net, mode in zip(nets, modes, strict=True):
            net.train(mode)
