"""A trained agent, loaded from its checkpoint. Legend: B batch, A actions, F features."""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from lightning_dqn.acting import as_batch
from lightning_dqn.envs import EnvSettings, EnvWrapper, make_env
from lightning_dqn.module import DQN
from lightning_dqn.resume.checkpoint import make_module
from lightning_dqn.resume.checkpoint_io import AtomicCheckpointIO
from lightning_dqn.resume.content import CheckpointError, check_dict, check_int
from lightning_dqn.resume.rebuild import check_env_id, check_env_kwargs, make_wrappers
from lightning_dqn.resume.spaces import decode_space

DATA = "agent.data.init_args"


class Agent:
    """A trained policy in eval mode, as `load_agent` returns it.

    Attributes:
        module: the `DQN`, or the subclass of it that was trained.
        observation_space: space of one observation of its environment.
        action_space: discrete space of its actions.
    """

    def __init__(self, module: DQN, description: Mapping[str, Any], trusted_modules: Collection[str] = ()) -> None:
        self.module = module.eval()
        self.action_space = module.action_space
        self.observation_space: gym.Space[Any] = module.observation_space
        self._description, self._trusted_modules = description, trusted_modules
        if "env_observation_space" in description:
            self.observation_space = decode_space(description["env_observation_space"], "agent.env_observation_space")

    def __repr__(self) -> str:
        """One line: class, environment, spaces."""
        try:
            env_id = f"env_id={_env_arguments(self._description)['env_id']!r}, "
        except CheckpointError:
            env_id = ""
        text = f"{env_id}observation_space={self.observation_space}, action_space={self.action_space}"
        return f"Agent({type(self.module).__name__}, {' '.join(text.split())})"

    def act(self, observation: Any, action_mask: NDArray[np.bool_] | None = None) -> Any:
        """Choose the actions with the highest value.

        Args:
            observation: one observation as `reset` and `step` of the environment return it (an array, a number, a dict
                or a tuple), or B of them: an array with a first dimension of B, a list, or a dict or tuple of arrays.
            action_mask: (A,) or (B, A), True for actions that are allowed; None allows all.

        Returns:
            One action as an int, or B actions as an int64 array (B,).

        Raises:
            ValueError: if the observation or the mask does not fit its space; the message gives the expected shape.
        """
        return self.module.act(self._prepare(observation), action_mask=self._check_mask(action_mask))

    def q_values(self, observation: Any) -> NDArray[np.float32]:
        """Compute action values: (A,) of one observation, (B, A) of B; see `act`."""
        return self.module.q_values(self._prepare(observation))

    def make_env(
        self,
        render_mode: str | None = None,
        *,
        env_kwargs: Mapping[str, Any] | None = None,
        wrappers: Sequence[EnvWrapper] | None = None,
    ) -> gym.Env[Any, Any]:
        """Create the environment that the agent was trained in, with its wrappers.

        Args:
            render_mode: render mode of `gymnasium.make`.
            env_kwargs: arguments of the environment, which replace those of the checkpoint.
            wrappers: wrappers of the environment, innermost first, which replace those of the checkpoint.

        Raises:
            CheckpointError: if the checkpoint contains no environment, needs a module that is not trusted, or lacks an
                argument that was a Python object; the message says what to pass.
            ValueError: if the environment can't be created.
        """
        data = _env_arguments(self._description)
        if env_kwargs is None:
            env_kwargs = check_env_kwargs(data["env_kwargs"], f"{DATA}.env_kwargs")
        if wrappers is None:
            wrappers = make_wrappers(data["wrappers"], f"{DATA}.wrappers", self._trusted_modules)
        env_id = check_env_id(data["env_id"], f"{DATA}.env_id", self._trusted_modules)
        frame_stack = check_int(data["frame_stack"], f"{DATA}.frame_stack", 1, 256)
        return make_env(EnvSettings(env_id, dict(env_kwargs), wrappers, frame_stack), render_mode)

    def _prepare(self, observation: Any) -> Any:
        """Convert an observation to the module's input: dicts and tuples become vectors, as in training."""
        space = self.observation_space
        if isinstance(space, (spaces.Dict, spaces.Tuple)):
            if isinstance(observation, list) and observation and isinstance(observation[0], (dict, tuple)):
                return np.stack(
                    [flatten_observation(space, each, f"observation[{i}]") for i, each in enumerate(observation)]
                )
            if isinstance(observation, (dict, tuple)):
                return flatten_observation(space, observation, "observation")
        elif isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
            check_discrete(space, observation, "observation")
        return observation

    def _check_mask(self, action_mask: Any) -> NDArray[np.bool_] | None:
        if action_mask is None:
            return None
        mask, size = np.asarray(action_mask, bool), int(self.action_space.n)
        if mask.shape[-1:] != (size,) or mask.ndim > 2:
            raise ValueError(f"action_mask: has shape {mask.shape}, expected ({size},) or (B, {size})")
        return mask


def flatten_observation(space: gym.Space[Any], value: Any, name: str) -> NDArray[Any]:
    """Flatten an observation like `gymnasium.spaces.flatten`, but also a batch, and with checks.

    Args:
        space: space of one observation.
        value: one observation, or B of them: a dict or tuple of arrays with a first dimension of B.
        name: name of the value, for errors.

    Returns:
        Features (F,) or (B, F).

    Raises:
        ValueError: if a part does not fit its space; the message names it.
    """
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        inner: dict[Any, gym.Space[Any]] = dict(
            space.spaces if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        )
        given = dict(enumerate(value)) if isinstance(value, tuple) else value
        if not isinstance(given, dict) or given.keys() != inner.keys():
            raise ValueError(f"{name}: is {value!r}, expected {space}")
        parts = [flatten_observation(part, given[key], f"{name}[{key!r}]") for key, part in inner.items()]
        sizes = {part.shape[:-1] for part in parts}
        if len(sizes) > 1:
            raise ValueError(f"{name}: is a batch of different sizes in its parts, {sizes}")
        return np.concatenate(parts, -1)
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        check_discrete(space, value, name)
    batch, is_single = as_batch(value, space, name)
    rows = np.zeros((len(batch), spaces.flatdim(space)), spaces.flatten_space(space).dtype)
    for i, each in enumerate(batch):
        rows[i] = spaces.flatten(space, each)
    return rows[0] if is_single else rows


def check_discrete(space: spaces.Discrete | spaces.MultiDiscrete, value: Any, name: str) -> None:
    """Check that all values are in range: torch would raise an IndexError, or index from the end.

    Raises:
        ValueError: if a value is out of range; the message gives the range.
    """
    array, low = np.asarray(value), np.asarray(space.start)
    count = space.nvec if isinstance(space, spaces.MultiDiscrete) else space.n
    try:
        fits = bool(((array >= low) & (array < low + count) & (array == np.floor(array))).all())
    except (TypeError, ValueError):
        # its shape or type is checked later
        return
    if not fits:
        raise ValueError(f"{name}={value}: must be an integer in [{low}, {low + count - 1}]")


def load_agent(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    trusted_modules: Collection[str] = (),
    **arguments: Any,
) -> Agent:
    """Load a trained agent from its checkpoint alone. Nothing from the file is executed.

    Args:
        path: path of a `.ckpt` file.
        device: device of its networks.
        trusted_modules: modules and packages of your own from which the checkpoint may name classes and environments;
            they are imported.
        arguments: constructor arguments of the model, which override those of the checkpoint, such as a `network` that
            was a Python function.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged or of another package, needs a module that is not trusted, or lacks an
            argument that was a Python object; the message names it and the remedy.
    """
    checkpoint = AtomicCheckpointIO().load_agent_part(path)
    module = make_module(DQN, checkpoint, trusted_modules, arguments)
    return Agent(module.to(device), checkpoint["agent"], trusted_modules)


def _env_arguments(description: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the environment in a checkpoint."""
    if "data" not in description:
        raise CheckpointError("the checkpoint names no environment: it was trained without a DQNDataModule")
    data = check_dict(description["data"], "agent.data", ("init_args",))
    return check_dict(data["init_args"], DATA, ("env_id", "env_kwargs", "wrappers", "frame_stack"))
