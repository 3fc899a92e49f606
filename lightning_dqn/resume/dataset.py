"""Restores the dataset of a run, and reports whether the resume is approximate. Called by `DQNDataModule`."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_dqn.distributed.sync import Sync
from lightning_dqn.resume.env_state import MAX_LOGGED_ACTIONS, too_long


def warn_inexact_resume(reason: str) -> None:
    """Report that checkpoints do not contain the state of the environments."""
    rank_zero_info(
        f"Checkpoints hold no environments ({reason}): a resume will be approximate: unfinished episodes are kept "
        "as truncated, and new ones start."
    )


def warn_long_episodes(state: Mapping[str, Any], sync: Sync) -> bool:
    """Report the episodes in a dataset's state that are too long to be replayed; return whether there are any."""
    found = too_long(state["under_way"]["envs"]) if "under_way" in state else []
    if found:
        _warn_local(
            sync,
            f"Episodes of environments {found} have more than {MAX_LOGGED_ACTIONS:,} env steps: a resume can't replay "
            "them; they will be kept as truncated, and new ones start.",
        )
    return bool(found)


def _warn_local(sync: Sync, message: str) -> None:
    """Log a message about the environments of this rank."""
    if sync.rank == 0:
        rank_zero_info(message)
    else:
        logging.getLogger("lightning.pytorch").info(f"Rank {sync.rank}: {message}")


def reshard_state(states: Sequence[Mapping[str, Any]], sync: Sync, seed: int) -> dict[str, Any]:
    """The state from which one rank resumes if the world size has changed.

    Args:
        states: states of the datasets of all old ranks, in order of rank.
        sync: `Sync` of this rank.
        seed: seed of the run.

    Returns:
        A state without environments. Instead of `memory` it has `memories`, those of all old ranks, for `reshard`.
    """
    env_steps = sum(state["env_steps"] for state in states)
    history = {name: torch.cat([state["episodes"][name] for state in states]) for name in states[0]["episodes"]}
    order = history["env_steps"].argsort(stable=True)
    # env steps and history are summed over the ranks: rank 0 gets all of them
    is_first = sync.rank == 0
    # a new stream: the initial one would repeat the random numbers of the start of the run
    rng = np.random.default_rng([seed, sync.rank, sync.world_size, env_steps]).bit_generator.state
    resharded = {
        **states[0],
        "env_steps": env_steps if is_first else 0,
        "due": 0,
        "rng": rng,
        "episodes": {name: part[order if is_first else order[:0]] for name, part in history.items()},
    }
    resharded.pop("under_way", None)
    if "sample_rng" in resharded:
        resharded["sample_rng"] = np.random.default_rng([seed, sync.rank, sync.world_size]).bit_generator.state
    if "memory" in resharded:
        del resharded["memory"]
        resharded["memories"] = [state["memory"] for state in states]
    return resharded


def restore_dataset(dataset: Any, state: Mapping[str, Any], *, with_envs: bool, name: str = "train") -> None:
    """Restore a dataset from a checkpoint, and report whether the resume is exact.

    Args:
        dataset: a `ReplayDataset` or a `RolloutDataset`, without env steps.
        state: state of the saved dataset.
        with_envs: whether the state of its environments can be restored.
        name: name of the state in the checkpoint.

    Raises:
        CheckpointError: if the state does not fit the dataset.
    """
    content = {key: value for key, value in state.items() if with_envs or key != "under_way"}
    missed = dataset.load_state_dict(content, name)
    # a dataset of rollouts has no memory
    memory = getattr(dataset, "memory", None)
    resumed = f"Resumed at {dataset.env_steps} env steps"
    of_all = " in the shard of rank 0" if dataset.sync.is_distributed else ""
    resumed += "." if memory is None else f" with {len(memory)} transitions{of_all}."
    if memory is not None and not {"memory", "memories"} & content.keys():
        resumed += (
            f" The checkpoint has no memory (save_memory=False): updates continue after a warm-up of "
            f"{dataset.warmup_env_steps} env steps, and environments start new episodes."
        )
    elif "under_way" not in content:
        resumed += " Environments start new episodes, unfinished ones are kept as truncated: the resume is approximate."
    rank_zero_info(resumed)
    if missed.any():
        _warn_local(
            dataset.sync,
            f"Environments {np.flatnonzero(missed).tolist()} did not repeat their episodes from the same seed and "
            "actions: these are kept as truncated, and new ones start. The resume is approximate.",
        )
