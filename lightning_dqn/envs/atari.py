"""Atari games with the usual preprocessing (Mnih et al. 2015, methods; Machado et al. 2018).

`AtariConfig` configures both forms of a game: ALE's vector environment for training, and a single environment with
Gymnasium's wrapper for evaluation and videos.
"""

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.wrappers import AtariPreprocessing
from numpy.typing import NDArray

# frame rate of the console
FRAMES_PER_SECOND = 60


@dataclass(frozen=True, kw_only=True)
class AtariConfig:
    """Preprocessing of an Atari game: its `env_kwargs`.

    Attributes:
        frameskip: frames per action; the observation is the pixelwise maximum of the last two.
        noop_max: maximum number of random no-op steps at the start of an episode.
        repeat_action_probability: probability per frame of repeating the previous action: 0.25 as in v5 (Machado et al.
            2018, section 5), 0 as in the original protocol.
        full_action_space: whether to use all 18 actions instead of the game's minimal set.
        max_num_frames_per_episode: frames after which an episode is truncated; the default is half an hour.
        grayscale: whether to convert frames to grayscale.
        screen_size: height and width of a frame in pixels.
        reward_clipping: whether to clip training rewards to [-1, 1]; evaluation rewards are not clipped.
        episodic_life: whether a lost life terminates the episode in training, while the game continues; evaluation
            plays whole games.
        num_threads: threads of the emulators in training; 0 for one per core.
    """

    frameskip: int = 4
    noop_max: int = 30
    repeat_action_probability: float = 0.25
    full_action_space: bool = False
    max_num_frames_per_episode: int = 108_000
    grayscale: bool = True
    screen_size: int = 84
    reward_clipping: bool = True
    episodic_life: bool = False
    num_threads: int = 0


def make_game(env_id: str, protocol: AtariConfig, render_mode: str | None) -> gym.Env[Any, Any]:
    """One game, with unclipped rewards and whole episodes; observations (H, W) or (H, W, 3), uint8.

    Args:
        env_id: id of a game of the Arcade Learning Environment.
        protocol: the preprocessing.
        render_mode: as in `gymnasium.make`.
    """
    game = gym.make(
        env_id,
        # AtariPreprocessing skips frames
        frameskip=1,
        repeat_action_probability=protocol.repeat_action_probability,
        full_action_space=protocol.full_action_space,
        max_num_frames_per_episode=protocol.max_num_frames_per_episode,
        render_mode=render_mode,
    )
    env = AtariPreprocessing(
        game,
        noop_max=protocol.noop_max,
        frame_skip=protocol.frameskip,
        screen_size=protocol.screen_size,
        grayscale_obs=protocol.grayscale,
    )
    # a video has one frame per step
    env.metadata = {**env.metadata, "render_fps": FRAMES_PER_SECOND / protocol.frameskip}
    return env


def make_atari_vec(env_id: str, num_envs: int, protocol: AtariConfig, frame_stack: int) -> VectorEnv[Any, Any, Any]:
    """A vector of games for training; observations (N, frame_stack, H, W), or (N, frame_stack, H, W, 3), uint8.

    Args:
        env_id: id of a game of the Arcade Learning Environment.
        num_envs: number of games, N.
        protocol: the preprocessing.
        frame_stack: frames in an observation, oldest first; zeros before the first frame of an episode.
    """
    games = gym.make_vec(
        env_id,
        num_envs,
        "vector_entry_point",
        frameskip=protocol.frameskip,
        noop_max=protocol.noop_max,
        repeat_action_probability=protocol.repeat_action_probability,
        full_action_space=protocol.full_action_space,
        max_num_frames_per_episode=protocol.max_num_frames_per_episode,
        grayscale=protocol.grayscale,
        img_height=protocol.screen_size,
        img_width=protocol.screen_size,
        stack_num=frame_stack,
        reward_clipping=protocol.reward_clipping,
        # the episodic_life of ALE would restart the game
        life_loss_info=protocol.episodic_life,
        num_threads=protocol.num_threads,
        # the agent learns to press FIRE, since evaluation does not press it either
        use_fire_reset=False,
    )
    return EpisodicLifeVectorEnv(games) if protocol.episodic_life else games


class EpisodicLifeVectorEnv(VectorWrapper[NDArray[np.uint8], NDArray[Any], NDArray[Any]]):
    """Makes each life of a game an episode; stacked frames before its first are zeros.

    The step after a lost life is a real step; treating it as a reset step drops one transition.

    Args:
        games: vector environment that returns terminated=True for a lost life, without a reset; observations (N,
            frame_stack, H, W).
    """

    def __init__(self, games: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(games)
        self._age = np.zeros(games.num_envs, np.int64)
        self._over = np.zeros(games.num_envs, np.bool_)

    def reset(self, **kwargs: Any) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Begin all games; observations (N, frame_stack, H, W)."""
        self._age[:], self._over[:] = 0, False
        return self.env.reset(**kwargs)

    def step(self, actions: NDArray[Any]) -> Any:
        """Apply actions (N,) and wait for the result."""
        self.send(actions)
        return self.recv()

    def send(self, actions: NDArray[Any]) -> None:
        """Apply actions (N,)."""
        self.env.send(actions)  # type: ignore[attr-defined]

    def recv(self) -> Any:
        """The result of the actions sent last, as from `step`."""
        observation, *outcome = self.env.recv()  # type: ignore[attr-defined]
        self._age = np.where(self._over, 0, self._age + 1)
        terminated, truncated = outcome[1:3]
        self._over = terminated | truncated
        for i in np.flatnonzero(self._age < observation.shape[1] - 1):
            observation[i, : -1 - self._age[i]] = 0
        return observation, *outcome
