"""A trained agent, made again from its checkpoint alone. Legend: B batch, A actions."""

import os
from collections.abc import Collection, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from lightning_dqn.checkpoint_io import AtomicCheckpointIO
from lightning_dqn.envs import EnvSettings, make_env
from lightning_dqn.module import DQN
from lightning_dqn.resume.checkpoint import make_module
from lightning_dqn.resume.content import CheckpointError, check_dict, check_int
from lightning_dqn.resume.rebuild import check_env_id, check_plain, check_sizes, make_wrappers, opaque_paths
from lightning_dqn.resume.spaces import decode_space


class Agent:
    """A policy with the weights of a checkpoint, in eval mode; `load_agent` makes it.

    Attributes:
        module: the `DQN`, or the subclass of it that was trained.
        observation_space: space of an observation as its environment gives it.
        action_space: discrete space of its actions.
    """

    def __init__(self, module: DQN, description: Mapping[str, Any], trusted_modules: Collection[str] = ()) -> None:
        self.module = module.eval()
        self.action_space = module.action_space
        self.observation_space: gym.Space[Any] = module.observation_space
        self._description, self._trusted_modules = description, trusted_modules
        if "env_observation_space" in description:
            self.observation_space = decode_space(description["env_observation_space"], "agent.env_observation_space")

    def act(self, observation: Any, action_mask: NDArray[np.bool_] | None = None) -> Any:
        """Greedy actions.

        Args:
            observation: one observation as the environment gives it (an array, a number, a dict or a tuple), or an
                array of B observations.
            action_mask: (A,) or (B, A) which actions are allowed; None for all.

        Returns:
            One action as an int, or an array of B actions.

        Raises:
            ValueError: if the observation does not fit the observation space.
        """
        return self.module.act(self._flat(observation), action_mask=action_mask)

    def q_values(self, observation: Any) -> NDArray[np.float32]:
        """Action values (A,) of one observation, or (B, A) of B observations; see `act`."""
        return self.module.q_values(self._flat(observation))

    def make_env(
        self, render_mode: str | None = None, *, env_kwargs: Mapping[str, Any] | None = None
    ) -> gym.Env[Any, Any]:
        """The environment that the agent was trained for, with its wrappers.

        Args:
            render_mode: as in `gymnasium.make`.
            env_kwargs: arguments of the environment in place of those of the checkpoint.

        Raises:
            CheckpointError: if the checkpoint has no environment, or one from a module that is not trusted.
            ValueError: if the environment can't be made.
        """
        settings = read_env_settings(self._description, self._trusted_modules, env_kwargs)
        return make_env(settings, render_mode)

    def _flat(self, observation: Any) -> Any:
        """An observation as the module takes it: dicts and tuples become vectors, as in training."""
        if isinstance(self.observation_space, (spaces.Dict, spaces.Tuple)) and isinstance(observation, (dict, tuple)):
            try:
                return spaces.flatten(self.observation_space, observation)
            except (KeyError, ValueError, TypeError, IndexError) as error:
                raise ValueError(
                    f"observation {observation!r}: does not fit {self.observation_space} ({error!r})"
                ) from error
        return observation


def load_agent(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    trusted_modules: Collection[str] = (),
    **arguments: Any,
) -> Agent:
    """Load a trained agent from a checkpoint. Nothing that the file brings is executed.

    Args:
        path: of a `.ckpt` file.
        device: where its networks compute.
        trusted_modules: modules and packages of your own from which the checkpoint may name classes and environments;
            they are imported.
        arguments: constructor arguments of the model in place of those of the checkpoint, such as a `network` that was
            given as a Python function.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is no checkpoint of this package, is damaged, or needs a module that is not trusted; the
            message names the value.
    """
    checkpoint = AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
    module = make_module(DQN, checkpoint, trusted_modules, arguments)
    return Agent(module.to(device), checkpoint["agent"], trusted_modules)


def read_env_settings(
    description: Mapping[str, Any], trusted_modules: Collection[str], env_kwargs: Mapping[str, Any] | None = None
) -> EnvSettings:
    """The environment that a checkpoint describes.

    Args:
        description: the entry `agent` of a checkpoint.
        trusted_modules: modules that may be imported.
        env_kwargs: arguments in place of those of the checkpoint.

    Raises:
        CheckpointError: if it describes none, or one that needs what no file can hold.
    """
    if "data" not in description:
        raise CheckpointError("the checkpoint names no environment: it was trained without a DQNDataModule")
    data = check_dict(
        check_dict(description["data"], "agent.data", ("init_args",))["init_args"], "agent.data.init_args"
    )
    name = "agent.data.init_args"
    check_dict(data, name, ("env_id", "env_kwargs", "wrappers", "frame_stack"))
    if env_kwargs is None:
        env_kwargs = {} if data["env_kwargs"] is None else check_dict(data["env_kwargs"], f"{name}.env_kwargs")
        check_plain(env_kwargs, f"{name}.env_kwargs")
        check_sizes(env_kwargs, f"{name}.env_kwargs")
        for path in opaque_paths(env_kwargs):
            raise CheckpointError(
                f"env_kwargs{path} is a Python object, which no file can hold; pass env_kwargs=... again"
            )
    return EnvSettings(
        check_env_id(data["env_id"], f"{name}.env_id", trusted_modules),
        dict(env_kwargs),
        make_wrappers(data["wrappers"], f"{name}.wrappers", trusted_modules),
        check_int(data["frame_stack"], f"{name}.frame_stack", 1, 256),
    )
