"""What a checkpoint was made for, in words: environments and networks are told apart before anything is loaded."""

from typing import Any

import gymnasium as gym
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor


def spaces_in_words(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> dict[str, str]:
    """Names and descriptions of the spaces that an agent lives in."""
    return {"observation_space": str(observation_space), "action_space": str(action_space)}


def refuse_foreign(checkpoint: dict[str, Any], spaces: dict[str, str], state: dict[str, Tensor]) -> None:
    """Compare a checkpoint with the learner that it shall be loaded into.

    Args:
        checkpoint: as Lightning writes it, with `spaces` in words.
        spaces: of the learner, in words.
        state: of the learner.

    Raises:
        MisconfigurationException: if the checkpoint is of another environment or network, with both sides.
    """
    for name, space in spaces.items():
        other = checkpoint.get("spaces", {}).get(name)
        if other != space:
            raise MisconfigurationException(
                f"The checkpoint has {name} {other}, this run has {space}: use the env_id that it was made with"
            )
    ours = {name: tuple(value.shape) for name, value in state.items()}
    theirs = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    for name in sorted(dict(ours.items() ^ theirs.items())):
        raise MisconfigurationException(
            f"{name} has shape {ours.get(name)} here and shape {theirs.get(name)} in the checkpoint: "
            "use the model.network that it was made with"
        )
