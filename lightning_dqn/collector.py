"""Plays environments with a policy, a step of each at a time: what `ReplayDataset` and `RolloutDataset` store.

It sees the module only as a policy, a function from observations to actions. Legend: N envs.
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
    """All training episodes that ended so far, one entry each, oldest first.

    Attributes:
        returns: sums of rewards.
        lengths: in env steps.
        env_steps: where on the env-step clock each ended.
    """

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    env_steps: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.returns)

    def state_dict(self) -> dict[str, Tensor]:
        """The entries as tensors."""
        return {
            "returns": torch.tensor(self.returns, dtype=torch.float64),
            "lengths": torch.tensor(self.lengths, dtype=torch.int64),
            "env_steps": torch.tensor(self.env_steps, dtype=torch.int64),
        }

    def load_state_dict(self, state: Any, name: str, max_env_steps: int) -> None:
        """Restore what `state_dict` returned, in place, so that all that hold this history see it.

        Args:
            state: the entries.
            name: of the state in the checkpoint.
            max_env_steps: played by then.

        Raises:
            CheckpointError: if they are no such entries.
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
        envs: the environments, reset by NEXT_STEP.
        policy: what chooses the actions.
        seed: of exploration and of the environments.
        action_masks: whether the environments say, in `info["action_mask"]`, which actions they allow.
        overlap: whether `send` will be called, so that the environments step while others work.

    Attributes:
        env_steps: played so far; steps that only reset an environment are none.
        episodes: that ended so far.
        observation: (N, ...) what was seen last; None before the first step, and after an interruption.
        action_mask: (N, A) which actions that allows; None for all.
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
        # the actions under way, if any, and what came of them, if that has been waited for
        self._sent: NDArray[np.int64] | None = None
        self._outcome: Outcome | None = None
        # environments that did not repeat their episodes at a resume, while a step is under way
        self._cut = np.zeros(envs.num_envs, dtype=np.bool_)
        self._returns = np.zeros(envs.num_envs)
        self._lengths = np.zeros(envs.num_envs, dtype=np.int64)
        self._no_reward, self._no_observation = np.zeros(envs.num_envs, np.float32), zeros_like_floats(envs)

    def start(self) -> NDArray[Any]:
        """Begin an episode in every environment, and give the first observations (N, ...).

        Raises:
            BrokenEnvironmentError: if an environment raises, or shows what is no number.
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
        """Play so many env steps more, to within N.

        Steps that only reset an environment are none; they are played on top, so that the clock keeps its pace.
        """
        self._remaining_env_steps += env_steps
        while self._remaining_env_steps >= self.envs.num_envs:
            before = self.env_steps
            step = self.step()
            self._remaining_env_steps -= self.env_steps - before
            yield step

    def step(self) -> Step:
        """Step every environment once, from `observation` on; action, reward, terminated, truncated and what was seen.

        Raises:
            BrokenEnvironmentError: if an environment raises, or gives what is no number.
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
        # count_nonzero is a tenth of the methods sum and any
        self.env_steps += int(np.count_nonzero(playing))
        if self.action_masks:
            self.action_mask = self._read_mask(info)
        if np.count_nonzero(self.resetting):
            self._record_episodes()
        return action, reward, terminated, truncated, observation, self.action_mask

    def _receive(self, action: NDArray[np.int64]) -> Outcome:
        """The outcome of the actions under way, which is kept, or else of these.

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
        """Choose the next actions, and let the environments go about them until `step` asks for what came of it."""
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
        """Allowed actions (N, A); each episode under way must allow at least one."""
        given = info.get("_action_mask", np.zeros(self.envs.num_envs, np.bool_))
        mask = np.asarray(info["action_mask"] if given.any() else given[:, None], np.bool_)
        for i in np.flatnonzero(~self.resetting & ~(given & mask.any(1))):
            raise empty_mask_error(self.envs, int(i), bool(given[i]), self.env_steps, self._lengths)
        return mask

    def _check(self, observation: NDArray[Any], reward: NDArray[Any]) -> None:
        """Reject NaN and infinity before they are stored: such a number times 0 is not 0."""
        fine = reward.astype(np.float32).dot(self._no_reward) == 0
        if self._no_observation.size:
            fine = fine and observation.astype(np.float32, copy=False).ravel().dot(self._no_observation) == 0
        if not fine:
            raise non_finite_error(self.envs, observation, reward, self.env_steps, self._lengths)

    def _record_episodes(self) -> None:
        """Enter the episodes that have just ended into the history and start their sums anew."""
        for i in np.flatnonzero(self.resetting & ~self._cut):
            self.episodes.returns.append(float(self._returns[i]))
            self.episodes.lengths.append(int(self._lengths[i]))
            self.episodes.env_steps.append(self.env_steps)
        self._returns[self.resetting] = 0
        self._lengths[self.resetting] = 0
        self._cut[:] = False

    def state_dict(self, *, with_envs: bool = True) -> dict[str, Any]:
        """Everything the next steps depend on, as tensors and plain values.

        Args:
            with_envs: whether the environments are in it, so that the current episodes can be continued.

        Raises:
            BrokenEnvironmentError: if a step is under way in which an environment raises.
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
            # in its own layout, which the last bit of a matrix product may depend on
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
        """The step that is under way, and its outcome, which this waits for."""
        observation, reward, terminated, truncated, info = self._receive(action)
        arrays = {"action": action, "reward": reward, "terminated": terminated, "truncated": truncated}
        if "_action_mask" in info:
            arrays["action_mask"] = np.asarray(info["action_mask"], np.bool_)
            arrays["has_action_mask"] = info["_action_mask"]
        pending = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        return {**pending, "observation": torch.from_numpy(observation.copy(order="K"))}

    def load_state_dict(self, state: Any, name: str = "train", *, iteration_env_steps: int = 0) -> Mask:
        """Continue where `state_dict` was taken; without its environments, these start new episodes.

        Args:
            state: as from `state_dict`.
            name: of the state in the checkpoint.
            iteration_env_steps: that `steps` is called with.

        Returns:
            (N,) environments that did not repeat their episodes. Where `resetting` is set, they end with the last step,
            elsewhere with the step under way.

        Raises:
            CheckpointError: if it is not the state of such a collector.
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
        """Continue in environments that were made anew, after those of before were closed.

        Args:
            envs: made as those of before.
            state: from `state_dict`, taken before they were closed.

        Returns:
            (N,) environments that did not repeat their episodes; their last stored step is to be truncated.
        """
        self.envs = envs
        self._step_pair = async_step_pair(envs) if self._step_pair is not None else None
        self._sent = self._outcome = None
        return self.load_state_dict(state, iteration_env_steps=self._remaining_env_steps)
