"""Collective calls of the ranks: env step counts and statistics once per iteration, gradients once per update.

Legend: W ranks, K numbers.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from lightning_dqn._compat.torch import is_gloo_error


def processes_started() -> tuple[str, int]:
    """The launcher of this process, torchrun or srun, and the number of processes it started; 1 without a launcher."""
    starter = "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "srun"
    return starter, int(os.environ.get("WORLD_SIZE" if starter == "torchrun" else "SLURM_STEP_NUM_TASKS", "1"))


def check_networks(module: nn.Module) -> None:
    """Check that no layer has running statistics: only gradients are synchronized, so they would differ between ranks.

    Raises:
        MisconfigurationException: naming the layer.
    """
    for name, layer in module.named_modules():
        if getattr(layer, "track_running_stats", False):
            raise MisconfigurationException(
                f"{name} is a {type(layer).__name__}, whose running statistics would differ from rank to rank: train "
                "on one device, or use layer norm"
            )


class RankLostError(RuntimeError):
    """A peer rank has exited or is unreachable."""


def peer_lost_error() -> RankLostError:
    """The error of this rank when a collective call fails."""
    return RankLostError(
        f"rank {distributed.get_rank()}: a peer has exited or is unreachable: see the output of that rank; "
        "`fit --ckpt_path last` resumes from the last checkpoint"
    )


def is_peer_lost(error: RuntimeError) -> bool:
    """Whether an error of any collective call means that a peer has exited or is unreachable."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return isinstance(error, RankLostError) or is_gloo_error(error)


def mean_over_ranks(gradient: Tensor) -> Tensor:
    """The mean of the ranks' gradients, the same to the bit on each, in place: one collective call.

    Lightning's `strategy.reduce` makes two calls: a barrier precedes it.

    Raises:
        RankLostError: if a rank has exited or is unreachable.
    """
    try:
        distributed.all_reduce(gradient)
    except RuntimeError as error:
        raise peer_lost_error() from error
    return gradient.div_(distributed.get_world_size())


def gather_over_ranks(vector: Tensor) -> Tensor:
    """All-gather the vectors (K,) of all ranks as (W, K): one collective call, on the device of the vector.

    Raises:
        RankLostError: if a rank has exited or is unreachable.
    """
    gathered = vector.new_empty(distributed.get_world_size(), len(vector))
    try:
        distributed.all_gather(list(gathered.unbind()), vector)
    except RuntimeError as error:
        raise peer_lost_error() from error
    return gathered


class Sync:
    """Synchronizes the ranks of a run, and holds the result of the last `all_gather`.

    The collective calls use the CPU on every accelerator, so that no device waits for them. A run of one rank makes
    none.

    Args:
        rank: global rank of this process, from 0.
        world_size: ranks in the run, W.
        timeout: timeout of a collective call; None for torch's default of 30 minutes.

    Attributes:
        is_distributed: whether the run has several ranks.
        env_steps: sum over all ranks at the last `all_gather`.
        received_signal: number of the signal that this rank received, 0 for none; sent by the next `all_gather`.
        requeue_asked: whether this rank received SLURM's requeue signal; sent by the next `all_gather`.
        stop_signal: the signal that ends the fit, 0 for none; with several ranks, the highest that any of them had
            received before the last `all_gather`.
        requeue_agreed: whether any rank had received SLURM's requeue signal before the last `all_gather`.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, timeout: timedelta | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.is_distributed = world_size > 1
        self.timeout = timeout
        self.env_steps = 0
        self.received_signal = 0
        self.requeue_asked = False
        self.stop_signal = 0
        self.requeue_agreed = False
        self._group: Any = None

    def shard_size(self, total: int) -> int:
        """Size of one of `world_size` equal shards of `total`, rounded up."""
        return -(-total // self.world_size)

    def all_gather(self, env_steps: int, numbers: Sequence[float] | NDArray[np.float64] = ()) -> NDArray[np.float64]:
        """All-gather the env steps, the signals and `numbers` of each rank. All ranks must pass the same length.

        Args:
            env_steps: env steps of this rank so far.
            numbers: (K,) statistics of this rank.

        Returns:
            The numbers of all ranks, (W, K).

        Raises:
            RankLostError: if a rank has exited or is unreachable.
        """
        own = torch.tensor([env_steps, self.received_signal, self.requeue_asked, *numbers], dtype=torch.float64)
        gathered = torch.empty(self.world_size, len(own), dtype=torch.float64)
        try:
            distributed.all_gather(list(gathered.unbind()), own, group=self._cpu_group())
        except RuntimeError as error:
            raise peer_lost_error() from error
        table: NDArray[np.float64] = gathered.numpy()
        self.env_steps = int(table[:, 0].sum())
        self.stop_signal = int(table[:, 1].max())
        self.requeue_agreed = bool(table[:, 2].any())
        return table[:, 3:]

    def gather(self, own: Any) -> list[Any]:
        """Gather the objects of all ranks, plain values and tensors, in order of rank. All ranks must call it."""
        gathered: list[Any] = [None] * self.world_size
        distributed.all_gather_object(gathered, own, group=self._cpu_group())
        return gathered

    def gather_to_rank_zero(self, own: Any) -> list[Any]:
        """Like `gather`, but only rank 0 receives the objects, and other ranks an empty list: for large objects."""
        gathered: list[Any] = [None] * self.world_size if self.rank == 0 else []
        distributed.gather_object(own, gathered or None, group=self._cpu_group())
        return gathered

    def _cpu_group(self) -> Any:
        """The process group of all ranks on CPUs; created by the first collective call."""
        if self._group is None:
            if distributed.get_backend() == "gloo":
                self._group = distributed.group.WORLD
            else:
                self._group = distributed.new_group(backend="gloo", timeout=self.timeout)
        return self._group
