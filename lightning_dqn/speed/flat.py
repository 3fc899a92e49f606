"""Parameters of a network as views of one vector: clipping, optimizer step and Polyak update are one operation each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dqn.losses import polyak_update
from lightning_dqn.speed.compiled import QFunction
from lightning_dqn.speed.optimizers import can_be_flat, prefer_fused


class FlatParameters:
    """The parameters of a network as views of one vector, and their gradients as views of another.

    The network keeps its parameters with their names and shapes; they share memory with the vector. Moving the network
    to another device replaces its parameters, so move it first.

    Args:
        net: a network whose parameters have one dtype, one device and the same `requires_grad`.

    Attributes:
        vector: (P,) all parameters, for an optimizer.
        values: (P,) the same memory, detached.
        gradient: (P,) gradient, accumulated by backward passes.
    """

    def __init__(self, net: nn.Module) -> None:
        named = dict(net.named_parameters())
        self.net = net
        self._shapes = {name: p.shape for name, p in named.items()}
        values = torch.cat([p.detach().reshape(-1) for p in named.values()])
        self.vector = nn.Parameter(values, requires_grad=all(p.requires_grad for p in named.values()))
        self.values = self.vector.detach()
        for name, part in self._split(values).items():
            named[name].data = part
        self._pointers = [(parameter, parameter.data_ptr()) for parameter in named.values()]
        self.gradient = torch.zeros_like(values)
        self._gradients = [(named[name], part) for name, part in self._split(self.gradient).items()]

    def rebind(self) -> None:
        """Copy parameters whose `data` was replaced into the vector, and make them views of it again.

        Code such as `torch.nn.utils.vector_to_parameters` or pruning replaces it; the optimizer would then update a
        vector that the network no longer reads.
        """
        if all(parameter.data_ptr() == pointer for parameter, pointer in self._pointers):
            return
        with torch.no_grad():
            for (parameter, _), part in zip(self._pointers, self._split(self.values).values(), strict=True):
                part.copy_(parameter)
                parameter.data = part

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to 0, as views of one vector, even if they were set to None."""
        self.gradient.zero_()
        self.vector.grad = self.gradient
        for parameter, part in self._gradients:
            parameter.grad = part

    def _split(self, vector: Tensor) -> dict[str, Tensor]:
        parts = torch.split(vector, [shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)}

    def function(self, vector: Tensor) -> QFunction:
        """The network as a function of its input alone, with parameters from a vector (P,)."""
        parameters = self._split(vector)
        return lambda *inputs: torch.func.functional_call(self.net, parameters, inputs)


PolicyTargetParams = tuple[FlatParameters, FlatParameters]


def make_optimizer(
    make: Callable[[Any], torch.optim.Optimizer], policy_net: nn.Module, target_net: nn.Module | None
) -> tuple[torch.optim.Optimizer, PolicyTargetParams | None]:
    """Create the optimizer of the policy net, for one vector if the updates stay the same.

    Args:
        make: makes the optimizer from parameters.
        policy_net: network to train.
        target_net: network with the same shapes; None if the agent has none.

    Returns:
        The optimizer, and the flat parameters of both nets, or None if they are not flat. Without a target net both are
        those of the policy net.
    """
    optimizer, flat = make(policy_net.parameters()), None
    if can_be_flat(policy_net, optimizer):
        policy = FlatParameters(policy_net)
        flat = policy, policy if target_net is None else FlatParameters(target_net)
        optimizer = make([policy.vector])
        # the gradients of the network's parameters are views of the vector's, and must be zeroed, not dropped
        optimizer.zero_grad = policy.zero_grad  # type: ignore[method-assign]
    prefer_fused(optimizer)
    return optimizer, flat


def polyak_update_nets(
    target_net: nn.Module, policy_net: nn.Module, flat: PolicyTargetParams | None, tau: float
) -> None:
    """Polyak update: target <- (1 - tau) * target + tau * policy, one operation if the parameters are flat."""
    if flat is None:
        polyak_update(list(target_net.parameters()), list(policy_net.parameters()), tau)
    else:
        # as `polyak_update` does
        flat[1].values.lerp_(flat[0].values, tau)
