"""Whether a run can go on exactly where it was stopped, and what is said where it can't.

Asked by `datamodule` when a fit begins and when it is resumed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_dqn.data.replay_dataset import ReplayDataset
from lightning_dqn.data.rollout_dataset import RolloutDataset
from lightning_dqn.envs import EnvSettings, Vectorization, make_vector_env
from lightning_dqn.envs.arguments import has_reference
from lightning_dqn.ranks import Ranks
from lightning_dqn.snapshots import CannotRestoreError, prove


def find_obstacle(
    settings: EnvSettings, num_envs: int, vectorization: Vectorization, *, overlap: bool, prove_it: bool
) -> str | None:
    """Why checkpoints can't hold these environments as they are; None if they can. What is found is announced.

    Args:
        settings: as in `make_vector_env`.
        num_envs: in each of the two throwaway copies that are tried out.
        vectorization: as in `make_vector_env`.
        overlap: whether they are under way while the device learns.
        prove_it: whether to try them out at all.
    """
    obstacle = None
    if vectorization == "async":
        obstacle = "vectorization=async runs them in other processes"
    elif overlap:
        obstacle = "overlap=true lets them step on in the meantime"
    elif has_reference(settings.env_kwargs):
        obstacle = "their arguments hold a secret, which their attributes may show"
    elif prove_it:
        obstacle = prove(lambda: make_vector_env(settings, num_envs, vectorization), seed=0)
    if obstacle is not None:
        announce_inexact(obstacle)
    return obstacle


def announce_inexact(obstacle: str) -> None:
    """Say what it means that checkpoints can't hold the environments."""
    rank_zero_info(
        f"Checkpoints hold no environments ({obstacle}): a resume will be approximate, with new episodes and the ones "
        "under way kept as truncated."
    )


def deal_anew(states: Sequence[Mapping[str, Any]], ranks: Ranks, seed: int) -> dict[str, Any]:
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
    is_first = ranks.rank == 0
    # not the numbers again that the run began with
    rng = np.random.default_rng([seed, ranks.rank, ranks.world_size, env_steps]).bit_generator.state
    dealt = {
        **states[0],
        "env_steps": env_steps if is_first else 0,
        "due": 0,
        "rng": rng,
        "episodes": {name: part[order if is_first else order[:0]] for name, part in history.items()},
    }
    dealt.pop("under_way", None)
    if "sample_rng" in dealt:
        dealt["sample_rng"] = np.random.default_rng([seed, ranks.rank, ranks.world_size]).bit_generator.state
    if "memory" in dealt:
        del dealt["memory"]
        dealt["memories"] = [state["memory"] for state in states]
    return dealt


def put_back(dataset: ReplayDataset | RolloutDataset, state: Mapping[str, Any], *, with_envs: bool) -> None:
    """Let a dataset go on from a checkpoint, and say how exactly.

    Args:
        dataset: that has not played yet.
        state: of the one that was stopped.
        with_envs: whether its environments can be trusted to go on exactly.

    Raises:
        MisconfigurationException: if the environments were made in another way.
    """
    content = {name: value for name, value in state.items() if with_envs or name != "under_way"}
    try:
        dataset.load_state_dict(content)
    except CannotRestoreError as error:
        raise MisconfigurationException(f"The checkpoint is of other environments: {error}") from error
    resumed = f"Resumed at {dataset.env_steps} env steps"
    of_all = "" if dataset.ranks.alone else " in the share of the first rank"
    resumed += f" with {len(dataset.memory)} transitions{of_all}." if isinstance(dataset, ReplayDataset) else "."
    if isinstance(dataset, ReplayDataset) and not {"memory", "memories"} & content.keys():
        resumed += (
            f" The checkpoint leaves the memory out (data.save_memory=false): an empty one warms up for "
            f"{dataset.warmup_env_steps} env steps before updates go on, and environments start new episodes."
        )
    elif "under_way" not in content:
        resumed += (
            " Environments start new episodes, the ones under way are kept as truncated: "
            "the run goes on, but not as if unstopped."
        )
    rank_zero_info(resumed)
