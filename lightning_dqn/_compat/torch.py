"""Private functions, error texts and undocumented interfaces of torch."""

import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode

Function = Callable[..., tuple[Tensor, ...]]


class FactoryCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager that reports the size of each tensor that a factory function is about to allocate.

    Args:
        before: called with the size.
    """

    def __init__(self, before: Callable[[Sequence[int]], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._before = before

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator; called by torch."""
        if args and isinstance(args[0], (list, tuple)) and all(type(size) is int for size in args[0]):
            self._before(args[0])
        return func(*args, **(kwargs or {}))


def compile_function(
    function: Function, example: list[Any], *, decompositions: dict[Any, Any], simd_width: int | None
) -> Function:
    """Compile a function with Inductor, without guards: shapes, types and devices of the arguments must not change.

    `torch.compile` adds frame evaluation and guards, a third of the time of a call; on CPU the C++ wrapper saves
    another fifth.

    Args:
        function: function of tensors.
        example: example arguments.
        decompositions: replacements of operators, by operator.
        simd_width: width of the CPU's vector instructions in bits; None for the widest that the CPU supports.
    """
    # imported here because it takes a second
    from torch._inductor import compile as inductor_compile  # noqa: PLC0415
    from torch._inductor import config  # noqa: PLC0415
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415

    settings = {
        "cpp_wrapper": example[0].device.type == "cpu",
        # by default torch builds a library for each instruction set to test the compiler, half of the first compilation
        "cpp.vec_isa_ok": True,
        "cpp.simdlen": simd_width,
        # draw the same random numbers as the function itself
        "fallback_random": True,
    }
    # tracing and the trial call draw random numbers, which must not change those of the run
    with config.patch(settings), torch.no_grad(), torch.random.fork_rng():
        traced = make_fx(function, decompositions, tracing_mode="fake")(*example)
        compiled: Function = inductor_compile(traced, example)
        compiled(*example)
    return compiled


def fused_adam_kernel(decoupled_weight_decay: bool) -> Callable[..., None]:
    """The in-place kernel of a step of fused AdamW, or of fused Adam."""
    return torch._fused_adamw_ if decoupled_weight_decay else torch._fused_adam_


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks are registered for the steps of this optimizer, or of all optimizers."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or optimizers._global_optimizer_pre_hooks
        or optimizers._global_optimizer_post_hooks
    )


def is_gloo_error(error: RuntimeError) -> bool:
    """Whether an error comes from gloo's transport: it is a plain RuntimeError that names the source file."""
    return "gloo/transport/" in str(error)


def rejected_type(error: Exception) -> str | None:
    """The name of the type that `torch.load(weights_only=True)` rejected; None for other errors."""
    found = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return found[1] if found else None
