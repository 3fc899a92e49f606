"""Steps vector environments with a policy, for `ReplayDataset` and `RolloutDataset`.

Legend: N envs, A actions, S size of a policy's state.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from lightning_dqn.envs import async_step_pair
from lightning_dqn.envs.errors import empty_mask_error, env_error, non_finite_error, zeros_like_floats
from lightning_dqn.resume.collector_state import Outcome, restore_episodes
from lightning_dqn.resume.content import check_array, check_counts, check_dict, check_int, generator_from
from lightning_dqn.resume.env_state import env_state

Mask = NDArray[np.bool_]
# action (N,), reward (N,), terminated (N,), truncated (N,), the observation after them (N, ...), and its mask (N, A)
Step = tuple[NDArray[np.int64], NDArray[Any], Mask, Mask, NDArray[Any], Mask | None]


class Policy(Protocol):
    """Chooses the actions of N environments; it may carry a state (N, S) from one observation to the next."""

    def __call__(
        self,
        observation: NDArray[Any],
        state: Tensor | None,
        first: Mask,
        rng: np.random.Generator | None = None,
        action_mask: Mask | None = None,
    ) -> tuple[NDArray[np.int64], Tensor | None]:
        """Choose actions.

        Args:
            observation: (N, ...) current observations.
            state: (N, S) that the policy returned at the last observations; None at the first, or without a state.
            first: (N,) whether an observation is the first of its episode, where the policy resets its state.
            rng: random generator of exploration; None for greedy actions.
            action_mask: (N, A) allowed actions; None for all.

        Returns:
            Actions (N,) as the environment takes them, and the state (N, S) or None.
        """
        ...


@dataclass
class EpisodeHistory:
    """Finished training episodes, oldest first.

    Attributes:
        returns: undiscounted returns.
        lengths: lengths in env steps.
        env_steps: env step at which each ended.
    """

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    env_steps: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.returns)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the lists as tensors."""
        return {
            "returns": torch.tensor(self.returns, dtype=torch.float64),
            "lengths": torch.tensor(self.lengths, dtype=torch.int64),
            "env_steps": torch.tensor(self.env_steps, dtype=torch.int64),
        }

    def load_state_dict(self, state: Any, name: str, max_env_steps: int) -> None:
        """Restore what `state_dict` returned, in place.

        Args:
            state: from `state_dict`.
            name: of the state in the checkpoint, for errors.
            max_env_steps: env steps when the state was saved.

        Raises:
            CheckpointError: if the state does not fit.
        """
        state = check_dict(state, name, ("returns", "lengths", "env_steps"))
        returns = check_array(state["returns"], f"{name}.returns", dtype=np.dtype(np.float64), shape=(None,))
        lengths, env_steps = (
            check_counts(state[key], f"{name}.{key}", shape=returns.shape, high=max_env_steps)
            for key in ("lengths", "env_steps")
        )
        self.returns[:], self.lengths[:], self.env_steps[:] = returns.tolist(), lengths.tolist(), env_steps.tolist()


class Collector:
    """Steps N environments with a policy, counts env steps and episodes, and rejects values that are not finite.

    Args:
        envs: vector environment with NEXT_STEP autoreset.
        policy: chooses the actions.
        seed: seed of exploration and of the environments.
        action_masks: whether the environments give masks of allowed actions in `info["action_mask"]`.
        overlap: whether `send` will be called, so that the environments step asynchronously.

    Attributes:
        env_steps: env steps so far, without steps that only reset an environment.
        episodes: finished episodes.
        observation: (N, ...) current observations; None before the first step and after an interruption.
        action_mask: (N, A) actions allowed there; None if all are.
        resetting: (N,) whether the next step of an environment only resets it.
    """

    def __init__(
        self,
        *,
        envs: VectorEnv[Any, Any, Any],
        policy: Policy,
        seed: int | np.random.SeedSequence,
        action_masks: bool = False,
        overlap: bool = False,
    ) -> None:
        self.envs = envs
        self.policy = policy
        self.env_steps = 0
        self.episodes = EpisodeHistory()
        self.observation: NDArray[Any] | None = None
        self.action_masks = action_masks
        self.action_mask: Mask | None = None
        self.resetting = np.zeros(envs.num_envs, dtype=np.bool_)
        self._policy_state: Tensor | None = None
        self._first = np.ones(envs.num_envs, dtype=np.bool_)
        self._rng = np.random.default_rng(seed)
        self._remaining_env_steps = 0
        self._step_pair = async_step_pair(envs) if overlap else None
        # actions of a pending step, if there is one, and its outcome once it is received
        self._sent: NDArray[np.int64] | None = None
        self._outcome: Outcome | None = None
        # environments that did not reproduce their episodes at a resume with a pending step
        self._cut = np.zeros(envs.num_envs, dtype=np.bool_)
        self._returns = np.zeros(envs.num_envs)
        self._lengths = np.zeros(envs.num_envs, dtype=np.int64)
        self._no_reward, self._no_observation = np.zeros(envs.num_envs, np.float32), zeros_like_floats(envs)

    def start(self) -> NDArray[Any]:
        """Start an episode in every environment, and return the first observations (N, ...).

        Raises:
            BrokenEnvironmentError: if an environment raises, or returns NaN or infinity.
        """
        try:
            observation, info = self.envs.reset(seed=int(self._rng.integers(2**31)))
        except Exception as error:
            raise env_error(self.envs, error, self.env_steps, self._lengths) from error
        self._check(observation, self._no_reward)
        self.observation = observation
        self.resetting[:] = False
        self._first[:] = True
        self._returns[:] = 0
        self._lengths[:] = 0
        if self.action_masks:
            self.action_mask = self._read_mask(info)
        return observation  # type: ignore[no-any-return]

    def steps(self, env_steps: int) -> Iterator[Step]:
        """Make a number of env steps, to within N, not counting steps that only reset an environment."""
        self._remaining_env_steps += env_steps
        while self._remaining_env_steps >= self.envs.num_envs:
            before = self.env_steps
            step = self.step()
            self._remaining_env_steps -= self.env_steps - before
            yield step

    def step(self) -> Step:
        """Step every environment once.

        Raises:
            BrokenEnvironmentError: if an environment raises, or returns NaN or infinity.
        """
        action = self._choose() if self._sent is None else self._sent
        observation, reward, terminated, truncated, info = self._receive(action)
        self._sent = self._outcome = None
        self._check(observation, reward)
        self.observation = observation
        # a step that resets an environment returns the first observation of an episode
        self._first, playing = self.resetting, ~self.resetting
        self.resetting = terminated | truncated
        self._returns += reward
        self._lengths += playing
        # np.count_nonzero takes a tenth of the time of ndarray.sum
        self.env_steps += int(np.count_nonzero(playing))
        if self.action_masks:
            self.action_mask = self._read_mask(info)
        if np.count_nonzero(self.resetting):
            self._record_episodes()
        return action, reward, terminated, truncated, observation, self.action_mask

    def _receive(self, action: NDArray[np.int64]) -> Outcome:
        """Return the outcome of the pending step, or else of a step with these actions.

        Raises:
            BrokenEnvironmentError: if an environment raises.
        """
        if self._outcome is not None:
            return self._outcome
        try:
            if self._sent is None or self._step_pair is None:
                return self.envs.step(action)
            self._outcome = self._step_pair[1]()
        except Exception as error:
            raise env_error(self.envs, error, self.env_steps, self._lengths) from error
        return self._outcome

    def send(self) -> None:
        """Choose actions and send them to the environments; the next `step` receives the outcome."""
        assert self._step_pair is not None, "made without overlap"
        self._sent = self._choose()
        self._step_pair[0](self._sent)

    def _choose(self) -> NDArray[np.int64]:
        assert self.observation is not None, "start() comes first"
        action, self._policy_state = self.policy(
            self.observation, self._policy_state, self._first, self._rng, self.action_mask
        )
        return action

    def _read_mask(self, info: dict[str, Any]) -> Mask:
        """Return the allowed actions (N, A); each unfinished episode must allow at least one."""
        given = info.get("_action_mask", np.zeros(self.envs.num_envs, np.bool_))
        mask = np.asarray(info["action_mask"] if given.any() else given[:, None], np.bool_)
        for i in np.flatnonzero(~self.resetting & ~(given & mask.any(1))):
            raise empty_mask_error(self.envs, int(i), bool(given[i]), self.env_steps, self._lengths)
        return mask

    def _check(self, observation: NDArray[Any], reward: NDArray[Any]) -> None:
        """Reject NaN and infinity: their product with 0 is not 0."""
        fine = reward.astype(np.float32).dot(self._no_reward) == 0
        if self._no_observation.size:
            fine = fine and observation.astype(np.float32, copy=False).ravel().dot(self._no_observation) == 0
        if not fine:
            raise non_finite_error(self.envs, observation, reward, self.env_steps, self._lengths)

    def _record_episodes(self) -> None:
        """Add the episodes that have just ended to the history, and reset their sums."""
        for i in np.flatnonzero(self.resetting & ~self._cut):
            self.episodes.returns.append(float(self._returns[i]))
            self.episodes.lengths.append(int(self._lengths[i]))
            self.episodes.env_steps.append(self.env_steps)
        self._returns[self.resetting] = 0
        self._lengths[self.resetting] = 0
        self._cut[:] = False

    def state_dict(self, *, with_envs: bool = True) -> dict[str, Any]:
        """Return the state as tensors and plain values.

        Args:
            with_envs: whether to include the environments, so that their episodes continue.

        Raises:
            BrokenEnvironmentError: if an environment raises in a pending step.
        """
        state: dict[str, Any] = {
            "env_steps": self.env_steps,
            "due": self._remaining_env_steps,
            "rng": self._rng.bit_generator.state,
            "episodes": self.episodes.state_dict(),
        }
        if not with_envs or self.observation is None:
            return state
        pending = {} if self._sent is None else {"pending": self._pending_state(self._sent)}
        state["under_way"] = {
            "envs": env_state(self.envs),
            # in its memory layout, on which the rounding of a matrix product may depend
            "observation": torch.from_numpy(self.observation.copy(order="K")),
            "resetting": torch.from_numpy(self.resetting.copy()),
            "returns": torch.from_numpy(self._returns.copy()),
            "lengths": torch.from_numpy(self._lengths.copy()),
            **pending,
        }
        if self.action_mask is not None:
            state["under_way"]["action_mask"] = torch.from_numpy(self.action_mask.copy())
        if self._policy_state is not None:
            state["under_way"]["policy_state"] = self._policy_state.cpu().clone()
            state["under_way"]["first"] = torch.from_numpy(self._first.copy())
        return state

    def _pending_state(self, action: NDArray[np.int64]) -> dict[str, Tensor]:
        """Return the pending step with its outcome, after waiting for it."""
        observation, reward, terminated, truncated, info = self._receive(action)
        arrays = {"action": action, "reward": reward, "terminated": terminated, "truncated": truncated}
        if "_action_mask" in info:
            arrays["action_mask"] = np.asarray(info["action_mask"], np.bool_)
            arrays["has_action_mask"] = info["_action_mask"]
        pending = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        return {**pending, "observation": torch.from_numpy(observation.copy(order="K"))}

    def load_state_dict(self, state: Any, name: str = "train", *, iteration_env_steps: int = 0) -> Mask:
        """Restore what `state_dict` returned; without the environments, new episodes start.

        Args:
            state: from `state_dict`.
            name: of the state in the checkpoint, for errors.
            iteration_env_steps: argument of the calls of `steps`.

        Returns:
            (N,) True for environments that did not reproduce their episodes. These end with the last step if
            `resetting` is set, else with the pending step.

        Raises:
            CheckpointError: if the state does not fit.
        """
        state = check_dict(state, name, ("env_steps", "due", "rng", "episodes"))
        num_envs = self.envs.num_envs
        self.env_steps = check_int(state["env_steps"], f"{name}.env_steps")
        # steps() leaves less than one step of each environment
        self._remaining_env_steps = check_int(
            state["due"], f"{name}.due", 1 - num_envs, num_envs - 1 + iteration_env_steps
        )
        self._rng = generator_from(state["rng"], f"{name}.rng")
        self.episodes.load_state_dict(state["episodes"], f"{name}.episodes", self.env_steps)
        self.observation = self._policy_state = None
        if "under_way" not in state:
            return np.zeros(num_envs, np.bool_)
        episodes = restore_episodes(
            self.envs,
            state["under_way"],
            f"{name}.under_way",
            action_masks=self.action_masks,
            env_steps=self.env_steps,
        )
        self.observation, self.action_mask = episodes.observation, episodes.action_mask
        self.resetting, self._first = episodes.resetting, episodes.first
        self._policy_state = episodes.policy_state
        self._returns, self._lengths = episodes.returns, episodes.lengths
        self._sent, self._outcome, self._cut = episodes.sent, episodes.outcome, episodes.cut
        return episodes.missed

    def reopen(self, envs: VectorEnv[Any, Any, Any], state: Mapping[str, Any]) -> Mask:
        """Continue in new environments after the old ones were closed.

        Args:
            envs: environments like the old ones.
            state: from `state_dict`, before these were closed.

        Returns:
            (N,) True for environments that did not reproduce their episodes, whose last stored step is truncated.
        """
        self.envs = envs
        self._step_pair = async_step_pair(envs) if self._step_pair is not None else None
        self._sent = self._outcome = None
        return self.load_state_dict(state, iteration_env_steps=self._remaining_env_steps)
