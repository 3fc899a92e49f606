"""One environment as a vector environment, without the overhead of several."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray


class SingleVectorEnv(VectorEnv[NDArray[Any], NDArray[Any], NDArray[Any]]):
    """One environment as a vector environment.

    Steps, seeds and resets like Gymnasium's SyncVectorEnv, but does not gather or copy, which makes an iteration of the
    CartPole benchmark 4% faster. Of the infos it only returns action masks.

    Args:
        env: environment whose observations are arrays or numbers.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012  declared so by Gymnasium

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__()
        self.envs = [env]
        self.num_envs = 1
        self.spec, self.render_mode = env.spec, env.render_mode
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        self.observation_space = batch_space(env.observation_space, 1)
        self.action_space = batch_space(env.action_space, 1)
        self._ended = False

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Begin an episode; returns the observation, (1, ...), and the action mask."""
        observation, info = self.envs[0].reset(seed=seed[0] if isinstance(seed, list) else seed, options=options)
        self._ended = False
        return self._as_batch(observation), _mask_only(info)

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Apply actions (1,), or reset if the last step ended the episode; all results have length 1."""
        if self._ended:
            observation, info = self.envs[0].reset()
            reward, terminated, truncated = 0.0, False, False
        else:
            observation, reward, terminated, truncated, info = self.envs[0].step(actions[0])  # type: ignore[assignment]
        self._ended = bool(terminated or truncated)
        flags = np.array([terminated, truncated], np.bool_)
        return self._as_batch(observation), np.array([reward], np.float64), flags[:1], flags[1:], _mask_only(info)

    def _as_batch(self, observation: Any) -> NDArray[Any]:
        return np.asarray(observation, self.single_observation_space.dtype)[None]

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """An attribute of the environment, or the result of one of its methods, in a tuple of length 1."""
        value = self.envs[0].get_wrapper_attr(name)
        return (value(*args, **kwargs) if callable(value) else value,)

    def set_attr(self, name: str, values: list[Any]) -> None:
        """Set an attribute of the environment to the only element of `values`."""
        [value] = values
        self.envs[0].set_wrapper_attr(name, value)

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environment."""
        self.envs[0].close()


def _mask_only(info: dict[str, Any]) -> dict[str, Any]:
    """The action mask in the format of vector environments, with a flag for its presence."""
    if "action_mask" not in info:
        return {}
    return {"action_mask": np.asarray(info["action_mask"])[None], "_action_mask": np.ones(1, np.bool_)}
