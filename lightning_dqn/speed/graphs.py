"""Repeats what moves the weights by one launch: a CUDA graph of it, recorded once and replayed from then on.

Asked by `update.FastUpdate` on GPUs, where launching the kernels of a small network takes longer than they run.
"""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
# runs a function on tensors and remembers; gives what repeats it on the same tensors, and its results' places
Recorder = Callable[[Function, tuple[Tensor, ...]], tuple[Callable[[], None], tuple[Tensor, ...]]]

# calls before one is recorded: in them torch and its libraries make handles, workspaces and an optimizer's state
WARM_UP_CALLS = 3


class GraphedCall:
    """A function of tensors, recorded at its fourth call and replayed from then on.

    A replay runs the same kernels at the same places: what the function reads and writes must lie in tensors that stay
    where they are, its arguments excepted, which are copied to places of their own. A number of Python's is what it was
    when it was recorded. Where recording fails, or such a number changes, the function runs as ever from then on, and
    one line says so.

    Args:
        function: gives a tuple of tensors for tensors whose shapes, strides and types never change.
        constants: what the function reads that is no tensor, and where its tensors lie; called before each call.
        record: as `record_cuda_graph`.
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
        """What the function gives, in tensors that the next call leaves alone."""
        self._calls += 1
        constants = self._constants()
        if self._disabled:
            return self._function(*arguments)
        if self._calls <= WARM_UP_CALLS:
            return _run_on_side_stream(self._function, arguments)
        if self._replay is None:
            self._capture(arguments, constants)
        elif constants != self._recorded_with:
            self._disable("what was recorded as a number, or its place, has changed")
        if self._replay is None:
            return self._function(*arguments)
        for place, argument in zip(self._static_inputs, arguments, strict=True):
            place.copy_(argument)
        self._replay()
        return tuple(result.clone() for result in self._results)

    def _capture(self, arguments: tuple[Tensor, ...], constants: Any) -> None:
        """Record the function; nothing is computed yet."""
        # with the strides that it was compiled for: stacks of frames share their memory
        self._static_inputs = tuple(
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device) for a in arguments
        )
        try:
            self._replay, self._results = self._record(self._function, self._static_inputs)
        except Exception as error:  # whatever CUDA, or a compiled kernel, has against it
            self._disable(f"{type(error).__name__}: {error}".partition("\n")[0])
        self._recorded_with = constants

    def _disable(self, reason: str) -> None:
        rank_zero_info(f"Updates are no CUDA graph: {reason}. Training continues without them.")
        self._disabled, self._replay, self._static_inputs, self._results = True, None, (), ()


def record_cuda_graph(
    function: Function, arguments: tuple[Tensor, ...]
) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Record the kernels that a function launches, without running them.

    Args:
        function: that waits for nothing the device does.
        arguments: on a CUDA device.

    Returns:
        What launches them again, and the results, which each launch writes anew.
    """
    graph = torch.cuda.CUDAGraph()
    # other threads, such as those of a loader, may continue to use the device
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = function(*arguments)
    return graph.replay, results


def _run_on_side_stream(function: Function, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Run a function on a stream of its own, as CUDA wants it before a recording; elsewhere as ever."""
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
