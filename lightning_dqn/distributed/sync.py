"""What the ranks of a run say to each other once an iteration: the clock that they share, and what all must know alike.

The data side meets after each iteration's play; of the learner only gradients travel, one an update. Legend: W ranks.
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


def processes_started() -> tuple[str, int]:
    """Who has started this process, torchrun or srun, and with how many others; one if neither has."""
    starter = "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "srun"
    return starter, int(os.environ.get("WORLD_SIZE" if starter == "torchrun" else "SLURM_STEP_NUM_TASKS", "1"))


def check_networks(module: nn.Module) -> None:
    """Refuse layers that would go astray on each rank: only gradients are shared.

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
    """Another rank has ended, and this one can't go on alone."""


def peer_lost_error() -> RankLostError:
    """What a rank says when it waits in vain."""
    return RankLostError(
        f"rank {distributed.get_rank()} waits in vain for another, which has ended or can't be reached: see "
        "what that one said; `fit --ckpt_path last` goes on from the last checkpoint"
    )


def is_peer_lost(error: RuntimeError) -> bool:
    """Whether an error says that another rank does not answer, wherever it was awaited: in an evaluation, in a save."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    # gloo has no class for it, but names the place
    return isinstance(error, RankLostError) or "gloo/transport/" in str(error)


def mean_over_ranks(gradient: Tensor) -> Tensor:
    """The mean of the ranks' gradients, the same to the bit on each, in place: one collective call.

    Lightning's `strategy.reduce` makes two: it lets the ranks wait for each other before.

    Raises:
        RankLostError: if a rank does not come any more.
    """
    try:
        distributed.all_reduce(gradient)
    except RuntimeError as error:
        raise peer_lost_error() from error
    return gradient.div_(distributed.get_world_size())


def gather_over_ranks(vector: Tensor) -> Tensor:
    """The vectors (K,) of all ranks in their order, (W, K): one collective call, on the device of the vector.

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
    """This rank among those of a run, and what was said at their last meeting.

    A meeting is one collective call of a few numbers, on CPUs whatever the ranks learn on, so that no device waits for
    it. A run of one rank has none.

    Args:
        rank: this one, from 0.
        world_size: ranks in the run, W.
        timeout: how long it waits at a meeting; None for torch's 30 minutes.

    Attributes:
        env_steps: that all ranks had played together at the last meeting.
        received_signal: what this rank was asked to stop by, 0 for nothing; to be said at the next meeting.
        requeue_asked: whether this rank was asked by SLURM to save; likewise.
        agreed_signal: what any rank had been asked to stop by before the last meeting, 0 for nothing.
        requeue_agreed: whether any rank had been asked to save.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, timeout: timedelta | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self.env_steps = 0
        self.received_signal = 0
        self.requeue_asked = False
        self.agreed_signal = 0
        self.requeue_agreed = False
        self._group: Any = None

    @property
    def is_distributed(self) -> bool:
        """Whether the run has several ranks."""
        return self.world_size > 1

    def shard_size(self, total: int) -> int:
        """What each rank has of something that is divided among all, in whole parts."""
        return -(-total // self.world_size)

    def all_gather(self, env_steps: int, numbers: Sequence[float] | NDArray[np.float64] = ()) -> NDArray[np.float64]:
        """Say where this rank stands, and hear it of all; every rank comes with as many numbers.

        Args:
            env_steps: played by this rank so far.
            numbers: (K,) what else the others must know.

        Returns:
            The numbers of all ranks, (W, K).

        Raises:
            RankLostError: if a rank does not come any more.
        """
        said = torch.tensor([env_steps, self.received_signal, self.requeue_asked, *numbers], dtype=torch.float64)
        heard = torch.empty(self.world_size, len(said), dtype=torch.float64)
        try:
            distributed.all_gather(list(heard.unbind()), said, group=self._cpu_group())
        except RuntimeError as error:
            raise peer_lost_error() from error
        table: NDArray[np.float64] = heard.numpy()
        self.env_steps = int(table[:, 0].sum())
        self.agreed_signal = int(table[:, 1].max())
        self.requeue_agreed = bool(table[:, 2].any())
        return table[:, 3:]

    def gather(self, own: Any) -> list[Any]:
        """What each rank has, in their order: plain values and tensors; called on all."""
        heard: list[Any] = [None] * self.world_size
        distributed.all_gather_object(heard, own, group=self._cpu_group())
        return heard

    def gather_to_rank_zero(self, own: Any) -> list[Any]:
        """As `gather`, but only the first rank hears it, and the others nothing: for what is large."""
        heard: list[Any] = [None] * self.world_size if self.rank == 0 else []
        distributed.gather_object(own, heard or None, group=self._cpu_group())
        return heard

    def _cpu_group(self) -> Any:
        """The ranks, speaking without a device; all make it when they first meet."""
        if self._group is None:
            if distributed.get_backend() == "gloo":
                self._group = distributed.group.WORLD
            else:
                self._group = distributed.new_group(backend="gloo", timeout=self.timeout)
        return self._group
