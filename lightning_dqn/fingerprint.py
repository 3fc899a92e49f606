"""What a checkpoint was made for, in words: environments and networks are told apart before anything is loaded."""

import hashlib
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, optim

from lightning_dqn.resume.plain import plain_form

# how an optimizer computes, not what
HOW = {"foreach", "fused", "capturable", "differentiable"}


def environment_in_words(env: gym.Env[Any, Any], env_id: str, env_kwargs: Mapping[str, Any]) -> dict[str, str]:
    """What an environment is, its wrappers and time limit included, and of its arguments, a hash.

    Args:
        env: made by `make_env`.
        env_id: that it was made of.
        env_kwargs: that it was made with.
    """
    chain = [env]
    while isinstance(chain[-1], gym.Wrapper):
        chain.append(chain[-1].env)
    names = [f"{type(layer).__module__}.{type(layer).__qualname__}" for layer in chain]
    limit = env.spec.max_episode_steps if env.spec else None
    text = repr(sorted((name, plain_form(value)) for name, value in env_kwargs.items()))
    return {
        "env_id": env_id,
        "env_kwargs": f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}",
        "wrappers": f"{' of '.join(names)}, cut after {limit} steps",
    }


def learner_in_words(
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    optimizer: optim.Optimizer,
    scheduler: Any,
    knobs: Mapping[str, Any],
) -> dict[str, dict[str, str]]:
    """What a learner is: the spaces it lives in, its knobs, its optimizer with its settings, its schedule."""
    settings = {name: value for name, value in optimizer.defaults.items() if name not in HOW}
    named = {"optimizer": type(optimizer).__qualname__, **{f"optimizer.{name}": v for name, v in settings.items()}}
    named["lr_scheduler"] = None if scheduler is None else type(scheduler).__qualname__
    return {
        "spaces": {"observation_space": str(observation_space), "action_space": str(action_space)},
        "knobs": {name: str(value) for name, value in {**knobs, **named}.items()},
    }


def digest(state: Mapping[str, Tensor]) -> str:
    """A hash of all tensors, by which ranks see whether they have the same."""
    found = hashlib.sha256()
    for tensor in state.values():
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_positive(**knobs: float | None) -> None:
    """Refuse numbers that are not positive; None stands for no number.

    Args:
        knobs: of the model, by name.

    Raises:
        ValueError: naming the knob and its value.
    """
    for name, value in knobs.items():
        # no number is not positive either
        if value is not None and not value > 0:
            raise ValueError(f"model.{name}={value}: must be positive")


def refuse_other_knobs(then: Mapping[str, Any], now: Mapping[str, Any], side: str = "data") -> None:
    """Compare the knobs that a run was made with and those it shall go on with.

    Args:
        then: by name, of the checkpoint; what it does not know is not compared.
        now: by name, of this run.
        side: whose knobs they are.

    Raises:
        MisconfigurationException: naming the first knob that differs, its value then and its value now.
    """
    for name, value in now.items():
        if then.get(name, value) != value:
            raise MisconfigurationException(
                f"The checkpoint was made with {side}.{name}={then[name]}, this run has {value}: use the same"
            )


def refuse_foreign(
    checkpoint: dict[str, Any], words: dict[str, dict[str, str]], state: dict[str, Tensor], *, with_knobs: bool
) -> None:
    """Compare a checkpoint with the learner that it shall be loaded into.

    Args:
        checkpoint: as Lightning writes it, with `learner_in_words`.
        words: of the learner.
        state: of the learner.
        with_knobs: whether knobs count too, since training goes on.

    Raises:
        MisconfigurationException: if the checkpoint is of another environment, network or run, with both sides.
    """
    for name, space in words["spaces"].items():
        other = checkpoint.get("spaces", {}).get(name)
        if other != space:
            raise MisconfigurationException(
                f"The checkpoint has {name} {other}, this run has {space}: use the env_id that it was made with"
            )
    ours = {name: tuple(value.shape) for name, value in state.items()}
    theirs = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    differing = sorted(dict(ours.items() ^ theirs.items()))
    learner, other = words["knobs"].get("model"), checkpoint.get("knobs", {}).get("model")
    if (with_knobs or differing) and other not in (learner, None):
        # the reason for whatever else differs
        raise MisconfigurationException(f"The checkpoint is of {other}, this run has {learner}: use --model {other}")
    for name in differing:
        raise MisconfigurationException(
            f"{name} has shape {ours.get(name)} here and shape {theirs.get(name)} in the checkpoint: "
            "use the model.network that it was made with"
        )
    if with_knobs:
        refuse_other_knobs(checkpoint.get("knobs", {}), words["knobs"], "model")
