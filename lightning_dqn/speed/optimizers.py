"""Any torch optimizer on one vector of parameters, by the cheapest calls that do what it does.

Asked by `module.DQN` when it makes its optimizer, and by `update.FastUpdate` for each step.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_dqn._compat.torch import fused_adam_kernel, has_step_hooks

# optimizers that treat every entry alike, so that one long vector is the same to them as many matrices
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
    """Check, before training, that the optimizer and the schedule can be made and that the optimizer has an effect.

    Args:
        make: makes it from parameters.
        make_scheduler: makes a schedule from an optimizer, if there is one.
        net: whose parameters it shall move.

    Returns:
        One of each, to be looked at; None for no schedule.

    Raises:
        ValueError: naming the argument and its value.
    """
    try:
        optimizer = make(net.parameters())
    except ValueError as error:
        raise ValueError(f"model.optimizer: {error}".replace("learning rate", "lr")) from error
    for group in optimizer.param_groups:
        if group["lr"] <= 0:
            raise ValueError(f"model.optimizer.lr={group['lr']}: must be positive")
    try:
        scheduler = make_scheduler(optimizer) if make_scheduler is not None else None
    except (ValueError, TypeError) as error:
        raise ValueError(f"model.lr_scheduler: {error}") from error
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError(
            "model.lr_scheduler=ReduceLROnPlateau: waits for a metric, and an update has none; use another"
        )
    return optimizer, scheduler


def can_be_flat(net: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether one vector is the same to an optimizer as the parameters of a network that it was made for."""
    parameters = list(net.parameters())
    alike = len({(p.dtype, p.device, p.requires_grad) for p in parameters}) == 1
    groups = optimizer.param_groups
    all_in_one = len(groups) == 1 and {id(p) for p in groups[0]["params"]} == {id(p) for p in parameters}
    return type(optimizer) in ELEMENTWISE and alike and all_in_one


def prefer_fused(optimizer: torch.optim.Optimizer) -> None:
    """Take torch's fused kernel where there is one and nobody chose another; the equations are the same."""
    fusing = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
    for group in optimizer.param_groups if isinstance(optimizer, fusing) else []:
        chosen = [group.get(name) for name in ("fused", "foreach", "capturable", "differentiable")]
        here = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in group["params"])
        if here and chosen[0] is None and not any(chosen):
            group["fused"] = True


class FusedStep:
    """A step of fused Adam or AdamW on one vector: the kernel itself, on the optimizer's own state.

    Args:
        optimizer: one of these; its `state_dict` is what it always is.
        recorded: whether the step may be recorded as a CUDA graph: all that changes from step to step is then stored in
            tensors, the learning rate too.
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
        """What a step reads beside its tensors, and where these lie; the learning rate is laid into one first."""
        group = self._group
        if self._rate is not None and group["lr"] != self._known_rate:
            self._known_rate = group["lr"]
            self._rate.fill_(self._known_rate)
        numbers = (group[name] for name in ("amsgrad", "betas", "weight_decay", "eps", "maximize"))
        return *numbers, *(tensor.data_ptr() for tensor in self._optimizer.state[self._vector].values())

    def __call__(self) -> None:
        """Move the vector by its gradient."""
        vector, group = self._vector, self._group
        state = self._optimizer.state[vector]
        if not state:
            # the first step makes the state
            self._optimizer.step()
            return
        if self._counts_in_numpy:
            # a number, in numpy's hands a tenth of the cost
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
    """What `optimizer.step()` does, without its wrapper where that costs more than the arithmetic.

    Fused Adam and AdamW on one vector get a `FusedStep`; all others, and those with hooks, take their own step.

    Args:
        optimizer: any.
        recorded: as in `FusedStep`.
    """
    group = optimizer.param_groups[0]
    plain = not (group.get("capturable") or group.get("differentiable") or isinstance(group.get("lr"), Tensor))
    lean = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and len(group["params"]) == 1
    if has_step_hooks(optimizer) or not (lean and plain and group.get("fused")):
        return optimizer.step
    return FusedStep(optimizer, recorded=recorded)
