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

from lightning_dqn.data.faults import no_action, not_finite, raised, zeros_like_floats
from lightning_dqn.envs import halves_of_step
from lightning_dqn.snapshots import restore, snapshot

Mask = NDArray[np.bool_]
# action (N,), reward (N,), terminated (N,), truncated (N,), the observation after them (N, ...), and its mask (N, A)
Step = tuple[NDArray[np.int64], NDArray[Any], Mask, Mask, NDArray[Any], Mask | None]


class Policy(Protocol):
    """Chooses actions: (N, ...) observations to (N,) actions, greedy without a generator; (N, A) masks say which."""

    def __call__(
        self, observation: NDArray[Any], rng: np.random.Generator | None = None, action_mask: Mask | None = None
    ) -> NDArray[np.int64]: ...


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

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave, in place, so that who holds this history sees it."""
        self.returns[:] = state["returns"].tolist()
        self.lengths[:] = state["lengths"].tolist()
        self.env_steps[:] = state["env_steps"].tolist()


class Player:
    """Plays N environments side by side, keeps the clock and the history, and refuses what can't be learnt from.

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
        self._rng = np.random.default_rng(seed)
        self._due = 0
        self._halves = halves_of_step(envs) if overlap else None
        # the actions under way, if any
        self._sent: NDArray[np.int64] | None = None
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
            raise raised(self.envs, error, self.env_steps, self._lengths) from error
        self._check(observation, self._no_reward)
        self.observation = observation
        self.resetting[:] = False
        self._returns[:] = 0
        self._lengths[:] = 0
        if self.action_masks:
            self.action_mask = self._read_mask(info)
        return observation  # type: ignore[no-any-return]

    def steps(self, env_steps: int) -> Iterator[Step]:
        """Play so many env steps more, to within N.

        Steps that only reset an environment are none; they are played on top, so that the clock keeps its pace.
        """
        self._due += env_steps
        while self._due >= self.envs.num_envs:
            before = self.env_steps
            step = self.step()
            self._due -= self.env_steps - before
            yield step

    def step(self) -> Step:
        """Step every environment once, from `observation` on; action, reward, terminated, truncated and what was seen.

        Raises:
            BrokenEnvironmentError: if an environment raises, or gives what is no number.
        """
        sent = self._sent
        action = self._choose() if sent is None else sent
        try:
            outcome = self.envs.step(action) if sent is None or self._halves is None else self._halves[1]()
        except Exception as error:
            raise raised(self.envs, error, self.env_steps, self._lengths) from error
        self._sent = None
        observation, reward, terminated, truncated, info = outcome
        self._check(observation, reward)
        self.observation = observation
        playing = ~self.resetting
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

    def send(self) -> None:
        """Choose the next actions, and let the environments go about them until `step` asks for what came of it."""
        assert self._halves is not None, "made without overlap"
        self._sent = self._choose()
        self._halves[0](self._sent)

    def _choose(self) -> NDArray[np.int64]:
        assert self.observation is not None, "start() comes first"
        masks = () if self.action_mask is None else (self.action_mask,)
        return self.policy(self.observation, self._rng, *masks)

    def _read_mask(self, info: dict[str, Any]) -> Mask:
        """Which actions are allowed; at least one where the episode goes on."""
        given = info.get("_action_mask", np.zeros(self.envs.num_envs, np.bool_))
        mask = np.asarray(info["action_mask"] if given.any() else given[:, None], np.bool_)
        for i in np.flatnonzero(~self.resetting & ~(given & mask.any(1))):
            raise no_action(self.envs, int(i), bool(given[i]), self.env_steps, self._lengths)
        return mask

    def _check(self, observation: NDArray[Any], reward: NDArray[Any]) -> None:
        """Refuse a NaN or an infinity before it is stored: such a number times 0 is not 0."""
        fine = reward.astype(np.float32).dot(self._no_reward) == 0
        if self._no_observation.size:
            fine = fine and observation.astype(np.float32, copy=False).ravel().dot(self._no_observation) == 0
        if not fine:
            raise not_finite(self.envs, observation, reward, self.env_steps, self._lengths)

    def _record_episodes(self) -> None:
        """Enter the episodes that have just ended into the history and start their sums anew."""
        for i in np.flatnonzero(self.resetting):
            self.episodes.returns.append(float(self._returns[i]))
            self.episodes.lengths.append(int(self._lengths[i]))
            self.episodes.env_steps.append(self.env_steps)
        self._returns[self.resetting] = 0
        self._lengths[self.resetting] = 0

    def state_dict(self, *, with_envs: bool = True) -> dict[str, Any]:
        """Everything the next steps depend on, as tensors and plain values.

        Args:
            with_envs: whether the environments are in it, so that episodes under way can go on.

        Raises:
            CannotSnapshotError: if environments that shall be in it hold what can't be written down.
        """
        state: dict[str, Any] = {
            "env_steps": self.env_steps,
            "due": self._due,
            "rng": self._rng.bit_generator.state,
            "episodes": self.episodes.state_dict(),
        }
        if with_envs and self.observation is not None:
            state["under_way"] = {
                "envs": snapshot(self.envs),
                # in its own layout, which the last bit of a matrix product may depend on
                "observation": torch.from_numpy(self.observation.copy(order="K")),
                "resetting": torch.from_numpy(self.resetting.copy()),
                "returns": torch.from_numpy(self._returns.copy()),
                "lengths": torch.from_numpy(self._lengths.copy()),
            }
            if self.action_mask is not None:
                state["under_way"]["action_mask"] = torch.from_numpy(self.action_mask.copy())
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; without its environments, these start new episodes.

        Raises:
            CannotRestoreError: if the environments were made in another way.
        """
        self.env_steps, self._due = state["env_steps"], state["due"]
        self._rng.bit_generator.state = state["rng"]
        self.episodes.load_state_dict(state["episodes"])
        self.observation = None
        under_way = state.get("under_way")
        if under_way is not None:
            restore(self.envs, under_way["envs"])
            self.observation = under_way["observation"].numpy().copy(order="K")
            self.resetting = under_way["resetting"].numpy().copy()
            if self.action_masks:
                self.action_mask = under_way["action_mask"].numpy().copy()
            self._returns[:] = under_way["returns"].numpy()
            self._lengths[:] = under_way["lengths"].numpy()
