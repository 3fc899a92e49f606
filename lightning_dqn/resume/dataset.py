"""Restores the data side of a run, and says where a resume is not exact.

Called by `datamodule` when a fit begins, when it is saved and when it is resumed.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_dqn.data.replay_dataset import ReplayDataset
from lightning_dqn.distributed.sync import Sync
from lightning_dqn.resume.env_state import MAX_LOGGED_ACTIONS, too_long
from lightning_dqn.variants.rollouts import RolloutDataset


def warn_inexact_resume(reason: str) -> None:
    """Say what it means that checkpoints can't hold the state of the environments."""
    rank_zero_info(
        f"Checkpoints hold no environments ({reason}): a resume will be approximate, with new episodes and the ones "
        "under way kept as truncated."
    )


def warn_long_episodes(state: Mapping[str, Any], sync: Sync) -> bool:
    """Say which episodes of the state of a dataset are too long to be replayed; returns whether there are any."""
    found = too_long(state["under_way"]["envs"]) if "under_way" in state else []
    if found:
        _warn_local(
            sync,
            f"Episodes of environments {found} have more than {MAX_LOGGED_ACTIONS:,} env steps: a resume can't replay "
            "them; they will be kept as truncated, and new ones begin.",
        )
    return bool(found)


def _warn_local(sync: Sync, message: str) -> None:
    """Say what concerns the environments of this rank alone."""
    if sync.rank == 0:
        rank_zero_info(message)
    else:
        logging.getLogger("lightning.pytorch").info(f"Rank {sync.rank}: {message}")


def reshard_state(states: Sequence[Mapping[str, Any]], sync: Sync, seed: int) -> dict[str, Any]:
    """What one of now W ranks goes on from, of the data sides of all ranks that a run had before.

    Args:
        states: as their datasets gave them, in the order of ranks.
        ranks: this one and all.
        seed: of the run.

    Returns:
        A state without environments; in place of a memory it has those of all, of which this rank takes up a share.
    """
    env_steps = sum(state["env_steps"] for state in states)
    history = {name: torch.cat([state["episodes"][name] for state in states]) for name in states[0]["episodes"]}
    order = history["env_steps"].argsort(stable=True)
    # of a clock and a history that all share, the first rank brings in the whole
    is_first = sync.rank == 0
    # not the numbers again that the run began with
    rng = np.random.default_rng([seed, sync.rank, sync.world_size, env_steps]).bit_generator.state
    dealt = {
        **states[0],
        "env_steps": env_steps if is_first else 0,
        "due": 0,
        "rng": rng,
        "episodes": {name: part[order if is_first else order[:0]] for name, part in history.items()},
    }
    dealt.pop("under_way", None)
    if "sample_rng" in dealt:
        dealt["sample_rng"] = np.random.default_rng([seed, sync.rank, sync.world_size]).bit_generator.state
    if "memory" in dealt:
        del dealt["memory"]
        dealt["memories"] = [state["memory"] for state in states]
    return dealt


def restore_dataset(
    dataset: ReplayDataset | RolloutDataset, state: Mapping[str, Any], *, with_envs: bool, name: str = "train"
) -> None:
    """Restore a dataset from a checkpoint, and say how exactly.

    Args:
        dataset: that has not played yet.
        state: of the one that was stopped.
        with_envs: whether the state of its environments can be restored.
        name: of the state in the checkpoint.

    Raises:
        CheckpointError: if the state is not one of such a dataset.
    """
    content = {key: value for key, value in state.items() if with_envs or key != "under_way"}
    missed = dataset.load_state_dict(content, name)
    resumed = f"Resumed at {dataset.env_steps} env steps"
    of_all = "" if not dataset.sync.is_distributed else " in the share of the first rank"
    resumed += f" with {len(dataset.memory)} transitions{of_all}." if isinstance(dataset, ReplayDataset) else "."
    if isinstance(dataset, ReplayDataset) and not {"memory", "memories"} & content.keys():
        resumed += (
            f" The checkpoint leaves the memory out (data.save_memory=false): an empty one warms up for "
            f"{dataset.warmup_env_steps} env steps before updates go on, and environments start new episodes."
        )
    elif "under_way" not in content:
        resumed += (
            " Environments start new episodes, the ones under way are kept as truncated: "
            "the run continues, but not as if unstopped."
        )
    rank_zero_info(resumed)
    if missed.any():
        _warn_local(
            dataset.sync,
            f"Environments {np.flatnonzero(missed).tolist()} did not repeat their episodes from the same seed and "
            "actions: these are kept as truncated, and new ones begin. The run continues, but not as if unstopped.",
        )
