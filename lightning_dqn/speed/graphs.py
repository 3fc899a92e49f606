"""CUDA graphs of updates: launching the kernels of a small network one by one takes longer than running them."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
# records a function of tensors; returns a function that replays it on the same tensors, and its results
Recorder = Callable[[Function, tuple[Tensor, ...]], tuple[Callable[[], None], tuple[Tensor, ...]]]

# calls before the recording, in which torch and its libraries create handles, workspaces and the optimizer's state
WARM_UP_CALLS = 3


class GraphedCall:
    """A function of tensors, recorded at its fourth call and replayed from then on.

    A replay runs the same kernels at the same addresses. Arguments are copied to static tensors; all other tensors that
    the function reads or writes must stay at their addresses. Python numbers keep the value of the recording. If the
    recording fails, or such a number changes, the function runs without a graph from then on, and an info message says
    why.

    Args:
        function: returns a tuple of tensors, given tensors whose shapes, strides and types never change.
        constants: returns the Python numbers that the function reads and the addresses of its tensors; called before
            each call.
        record: see `record_cuda_graph`.
    """

    def __init__(self, function: Function, *, constants: Callable[[], Any], record: Recorder) -> None:
        self._function, self._constants, self._record = function, constants, record
        self._calls = 0
        self._disabled = False
        self._replay: Callable[[], None] | None = None
        self._recorded_with: Any = None
        self._static_inputs: tuple[Tensor, ...] = ()
        self._results: tuple[Tensor, ...] = ()

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Call the function, or replay it; returns new tensors."""
        self._calls += 1
        constants = self._constants()
        if self._disabled:
            return self._function(*arguments)
        if self._calls <= WARM_UP_CALLS:
            return _run_on_side_stream(self._function, arguments)
        if self._replay is None:
            self._capture(arguments, constants)
        elif constants != self._recorded_with:
            self._disable("a recorded number or address has changed")
        if self._replay is None:
            return self._function(*arguments)
        for place, argument in zip(self._static_inputs, arguments, strict=True):
            place.copy_(argument)
        self._replay()
        return tuple(result.clone() for result in self._results)

    def _capture(self, arguments: tuple[Tensor, ...], constants: Any) -> None:
        """Record the function; nothing is computed yet."""
        # the function was compiled for these strides; those of frame stacks overlap
        self._static_inputs = tuple(
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device) for a in arguments
        )
        try:
            self._replay, self._results = self._record(self._function, self._static_inputs)
        except Exception as error:  # any error of CUDA or of a compiled kernel
            self._disable(f"{type(error).__name__}: {error}".partition("\n")[0])
        self._recorded_with = constants

    def _disable(self, reason: str) -> None:
        rank_zero_info(f"Updates run without a CUDA graph: {reason}.")
        self._disabled, self._replay, self._static_inputs, self._results = True, None, (), ()


def record_cuda_graph(
    function: Function, arguments: tuple[Tensor, ...]
) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Record the kernels that a function launches, without running them.

    Args:
        function: function that does not synchronize with the device.
        arguments: tensors on a CUDA device.

    Returns:
        A function that launches them again, and the results, which each launch overwrites.
    """
    graph = torch.cuda.CUDAGraph()
    # other threads may use the device during the recording
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = function(*arguments)
    return graph.replay, results


def _run_on_side_stream(function: Function, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Run a function on a side stream, as CUDA requires before a recording; without CUDA, run it directly."""
    device = arguments[0].device
    if device.type != "cuda":
        return function(*arguments)
    here, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        results = function(*arguments)
    here.wait_stream(aside)
    for result in results:
        result.record_stream(here)
    return results
