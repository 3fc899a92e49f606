"""Checks of optimizers, and the step of fused Adam and AdamW on one vector without torch's wrapper."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_dqn._compat.torch import fused_adam_kernel, has_step_hooks

# elementwise optimizers: updating one long vector equals updating its parts
ELEMENTWISE = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.AdamW,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)


def check_optimizer(
    make: Callable[[Any], torch.optim.Optimizer], make_scheduler: Callable[[Any], Any] | None, net: nn.Module
) -> tuple[torch.optim.Optimizer, Any]:
    """Check, before training, that the optimizer and the schedule can be created and that learning rates are positive.

    Args:
        make: makes the optimizer from parameters.
        make_scheduler: makes the schedule from an optimizer; None for no schedule.
        net: network to train.

    Returns:
        The optimizer and the schedule, for inspection; None for no schedule.

    Raises:
        ValueError: naming the argument and its value.
    """
    try:
        optimizer = make(net.parameters())
    except ValueError as error:
        raise ValueError(f"optimizer: {error}".replace("learning rate", "lr")) from error
    for group in optimizer.param_groups:
        if group["lr"] <= 0:
            raise ValueError(f"lr={group['lr']}: must be positive")
    try:
        scheduler = make_scheduler(optimizer) if make_scheduler is not None else None
    except (ValueError, TypeError) as error:
        raise ValueError(f"lr_scheduler: {error}") from error
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError("lr_scheduler=ReduceLROnPlateau: waits for a metric, and an update has none; use another")
    return optimizer, scheduler


def can_be_flat(net: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer of all parameters of a network can update them as one vector with the same result."""
    parameters = list(net.parameters())
    alike = len({(p.dtype, p.device, p.requires_grad) for p in parameters}) == 1
    groups = optimizer.param_groups
    all_in_one = len(groups) == 1 and {id(p) for p in groups[0]["params"]} == {id(p) for p in parameters}
    return type(optimizer) in ELEMENTWISE and alike and all_in_one


def prefer_fused(optimizer: torch.optim.Optimizer) -> None:
    """Select torch's fused kernel, if it exists and no other was chosen; the equations are the same."""
    fusing = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
    for group in optimizer.param_groups if isinstance(optimizer, fusing) else []:
        chosen = [group.get(name) for name in ("fused", "foreach", "capturable", "differentiable")]
        here = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in group["params"])
        if here and chosen[0] is None and not any(chosen):
            group["fused"] = True


class FusedStep:
    """A step of fused Adam or AdamW on one vector: calls the kernel on the optimizer's own state.

    Args:
        optimizer: fused Adam or AdamW of one parameter; its `state_dict` is unchanged.
        recorded: whether the step can be recorded as a CUDA graph: the learning rate is then stored in a tensor.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, recorded: bool = False) -> None:
        self._optimizer = optimizer
        [self._group] = optimizer.param_groups
        [self._vector] = self._group["params"]
        self._kernel = fused_adam_kernel(self._group["decoupled_weight_decay"])
        self._counts_in_numpy = self._vector.device.type == "cpu" and not recorded
        self._rate = torch.tensor(float("nan"), device=self._vector.device) if recorded else None
        self._known_rate = float("nan")

    def constants(self) -> tuple[Any, ...]:
        """The Python numbers that a step reads and the addresses of its tensors; updates the learning rate's tensor."""
        group = self._group
        if self._rate is not None and group["lr"] != self._known_rate:
            self._known_rate = group["lr"]
            self._rate.fill_(self._known_rate)
        numbers = (group[name] for name in ("amsgrad", "betas", "weight_decay", "eps", "maximize"))
        return *numbers, *(tensor.data_ptr() for tensor in self._optimizer.state[self._vector].values())

    def __call__(self) -> None:
        """Update the vector by its gradient."""
        vector, group = self._vector, self._group
        state = self._optimizer.state[vector]
        if not state:
            # the first step creates the state
            self._optimizer.step()
            return
        if self._counts_in_numpy:
            # numpy takes a tenth of torch's time to add 1
            np.add(count := state["step"].numpy(), 1, out=count)
        else:
            state["step"] += 1
        self._kernel(
            [vector.data],
            [vector.grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [state["max_exp_avg_sq"]] if group["amsgrad"] else [],
            [state["step"]],
            amsgrad=group["amsgrad"],
            lr=group["lr"] if self._rate is None else self._rate,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )


def fused_step(optimizer: torch.optim.Optimizer, *, recorded: bool = False) -> Callable[[], Any]:
    """A `FusedStep` for fused Adam and AdamW of one vector without hooks; `optimizer.step` for all others.

    Args:
        optimizer: optimizer of any class.
        recorded: see `FusedStep`.
    """
    group = optimizer.param_groups[0]
    plain = not (group.get("capturable") or group.get("differentiable") or isinstance(group.get("lr"), Tensor))
    lean = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and len(group["params"]) == 1
    if has_step_hooks(optimizer) or not (lean and plain and group.get("fused")):
        return optimizer.step
    return FusedStep(optimizer, recorded=recorded)
