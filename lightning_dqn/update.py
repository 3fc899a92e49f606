"""The hot path of an update: flat parameters, fused optimizers and a compiled gradient. Clever, and only here.

`module.DQN` owns the equations; this file makes them cheap. Parameters lie as views in one vector, so that clipping,
optimizer, soft target and gradient are one operation each instead of one a layer; the gradient of the module's own loss
is traced once and compiled, so that a call costs little more than its matrix products.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

QFunction = Callable[[Tensor], Tensor]
Gradient = Callable[..., tuple[Tensor, ...]]

# updates that save as much time as compiling takes, on slow machines and fast ones
WORTH_COMPILING = 10_000

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


class FlatParameters:
    """The parameters of a network as views of one vector; their gradients likewise, if they have any.

    The network keeps its parameters, their names and shapes; whoever writes to one writes to the other. Moving the
    network to another device ends that, so this is made after it has moved.

    Args:
        net: a network whose parameters share one type and one device, and are all trained or all held still.
    """

    def __init__(self, net: nn.Module) -> None:
        named = dict(net.named_parameters())
        self.net = net
        self._shapes = {name: p.shape for name, p in named.items()}
        values = torch.cat([p.detach().reshape(-1) for p in named.values()])
        self.vector = nn.Parameter(values, requires_grad=all(p.requires_grad for p in named.values()))
        for name, part in self._split(values).items():
            named[name].data = part
        self._gradient = torch.zeros_like(values)
        self._gradients = [(named[name], part) for name, part in self._split(self._gradient).items()]

    def zero_grad(self) -> None:
        """Set all gradients to 0, and lay them in one vector again if somebody set them to None."""
        self._gradient.zero_()
        self.vector.grad = self._gradient
        for parameter, part in self._gradients:
            parameter.grad = part

    def _split(self, vector: Tensor) -> dict[str, Tensor]:
        parts = torch.split(vector, [shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)}

    def function(self, vector: Tensor) -> QFunction:
        """The network as a function of its input alone, with its parameters taken from a vector like ours."""
        parameters = self._split(vector)
        return lambda observation: torch.func.functional_call(self.net, parameters, (observation,))


def check_optimizer(make: Callable[[Any], torch.optim.Optimizer], net: nn.Module) -> None:
    """Refuse, before a run begins, an optimizer that can't be made or learns nothing.

    Args:
        make: makes it from parameters.
        net: whose parameters it shall move.

    Raises:
        ValueError: naming the knob and its value.
    """
    try:
        optimizer = make(net.parameters())
    except ValueError as error:
        raise ValueError(f"model.optimizer: {error}".replace("learning rate", "lr")) from error
    for group in optimizer.param_groups:
        if group["lr"] <= 0:
            raise ValueError(f"model.optimizer.lr={group['lr']}: must be positive")


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


def lean_step(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """What `optimizer.step()` does, without its wrapper where that costs more than the arithmetic.

    For fused Adam and AdamW on one vector the kernel itself is called, on the optimizer's own state, so that its
    `state_dict` is what it always is. All others, and those with hooks, take their own step.
    """
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    group = optimizer.param_groups[0]
    plain = not (group.get("capturable") or group.get("differentiable") or isinstance(group.get("lr"), Tensor))
    lean = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and len(group["params"]) == 1
    if hooks or not (lean and plain and group.get("fused")):
        return optimizer.step
    [vector] = group["params"]
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_

    def step() -> None:  # as the optimizer's own
        state = optimizer.state[vector]
        if not state:
            # the first step makes the state
            optimizer.step()
            return
        state["step"] += 1
        kernel(
            [vector.data],
            [vector.grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [state["max_exp_avg_sq"]] if group["amsgrad"] else [],
            [state["step"]],
            amsgrad=group["amsgrad"],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    return step


def compiling_pays(trainer: Trainer, num_updates: int) -> bool:
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
    loss: Callable[[Any, QFunction, QFunction], tuple[Tensor, Tensor, Tensor]],
    flat: tuple[FlatParameters, FlatParameters] | None,
    batch: Any,
    precision: str,
) -> Gradient | None:
    """What `compile_gradient` gives, or nothing and a line of information where that can't be had.

    Args:
        loss: as there.
        flat: policy and target parameters, if the optimizer takes them as vectors.
        batch: as there.
        precision: Lightning's name for it.
    """
    if flat is None:
        obstacle = "this optimizer needs the parameters apart"
    elif not precision.endswith("true"):
        obstacle = f"precision {precision} mixes types"
    else:
        try:
            return compile_gradient(loss, *flat, batch)
        except Exception as error:  # no compiler, or whatever a compiler may say: the plain path does the same
            obstacle = f"{type(error).__name__}: {error}".partition("\n")[0]
    rank_zero_info(f"The gradient is not compiled: {obstacle}. Training goes on without.")
    return None


def compile_gradient(
    loss: Callable[[Any, QFunction, QFunction], tuple[Tensor, Tensor, Tensor]],
    policy: FlatParameters,
    target: FlatParameters,
    batch: Any,
) -> Gradient:
    """Compile the gradient of a loss with respect to the flat policy parameters.

    Args:
        loss: gives loss (), q_value (B,) and td_error (B,) for a batch, a policy net and a target net.
        policy: what it is differentiated by.
        target: what is held still.
        batch: a named tuple of tensors such as all later ones will be.

    Returns:
        A function of policy vector, target vector and the fields of a batch that gives gradient, loss, q_value and
        td_error. It has no guards: shapes, types and devices must not change.
    """
    from torch._inductor import compile as inductor_compile  # noqa: PLC0415  a second that plain runs need not wait
    from torch._inductor import config  # noqa: PLC0415
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415

    def gradient(vector: Tensor, target_vector: Tensor, *fields: Tensor) -> tuple[Tensor, ...]:
        def loss_of(vector: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            value, q_value, td_error = loss(type(batch)(*fields), policy.function(vector), held)
            return value, (q_value, td_error)

        held = target.function(target_vector)
        slope, (value, (q_value, td_error)) = torch.func.grad_and_value(loss_of, has_aux=True)(vector)
        return slope, value, q_value, td_error

    example = [policy.vector.detach(), target.vector.detach(), *batch]
    on_cpu = policy.vector.device.type == "cpu"
    # tracing the function itself leaves torch.compile's frame evaluation and guards out, a third of the time of a call;
    # on CPU the C++ wrapper saves another fifth
    with torch.no_grad(), config.patch(cpp_wrapper=on_cpu), _training(policy.net, target.net):
        traced = make_fx(gradient, tracing_mode="fake")(*example)
        compiled: Gradient = inductor_compile(traced, example)
        compiled(*example)
    return compiled


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
