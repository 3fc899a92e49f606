"""Atari games as they are learnt from (Mnih et al. 2015, methods; Machado et al. 2018).

One protocol for both forms of a game: many of them stepped by the emulator's own threads, to learn from, and a single
one behind Gymnasium's wrapper, to be evaluated and filmed.
"""

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.wrappers import AtariPreprocessing
from numpy.typing import NDArray

# of the console, in real time
FRAMES_PER_SECOND = 60


@dataclass(frozen=True, kw_only=True)
class AtariConfig:
    """How a game is played and shown: the arguments that an Atari game takes here.

    Attributes:
        frameskip: frames that an action lasts; of the last two the brighter pixels are shown.
        noop_max: most steps without an action at the start of an episode; as many as chance says are played.
        repeat_action_probability: chance in each frame that the last action sticks: .25 as in v5 (Machado et al. 2018,
            section 5), 0 as in the classical protocol.
        full_action_space: whether there are 18 actions in every game, not those alone that it knows.
        max_num_frames_per_episode: after which an episode is cut: half an hour.
        grayscale: whether colours are left out.
        screen_size: height and width of a frame in pixels.
        reward_clipping: whether rewards learnt from are cut off at -1 and 1; evaluation never does that.
        episodic_life: whether a lost life terminates the episode in training, while the game continues; evaluation
            plays whole games.
        num_threads: of the emulators that are learnt from; 0 for one a core.
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
    """One game, with its true rewards and whole episodes; observations (H, W) or (H, W, 3), uint8.

    Args:
        env_id: of a game of the Arcade Learning Environment.
        protocol: how it is played.
        render_mode: as in `gymnasium.make`.
    """
    game = gym.make(
        env_id,
        # the wrapper skips
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
    # a film has one picture a step
    env.metadata = {**env.metadata, "render_fps": FRAMES_PER_SECOND / protocol.frameskip}
    return env


def make_atari_vec(env_id: str, num_envs: int, protocol: AtariConfig, frame_stack: int) -> VectorEnv[Any, Any, Any]:
    """Games to learn from; observations (N, frame_stack, H, W), or (N, frame_stack, H, W, 3), uint8.

    Args:
        env_id: of a game of the Arcade Learning Environment.
        num_envs: how many, N.
        protocol: how they are played.
        frame_stack: frames that are shown together, oldest first, black ones before an episode's first.
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
        # what it calls episodic_life starts the whole game anew
        life_loss_info=protocol.episodic_life,
        num_threads=protocol.num_threads,
        # an agent that has to press it learns to, and is evaluated without help
        use_fire_reset=False,
    )
    return EpisodicLifeVectorEnv(games) if protocol.episodic_life else games


class EpisodicLifeVectorEnv(VectorWrapper[NDArray[np.uint8], NDArray[Any], NDArray[Any]]):
    """Makes each life of a game an episode; frames before its first are zeros.

    The step after a lost life is a real step; treating it as a reset step drops one transition.

    Args:
        games: return terminated=True for a lost life, without a reset; observations (N, frame_stack, H, W).
    """

    def __init__(self, games: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(games)
        self._age = np.zeros(games.num_envs, np.int64)
        self._over = np.zeros(games.num_envs, np.bool_)

    def reset(self, **kwargs: Any) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Begin a game in each."""
        self._age[:], self._over[:] = 0, False
        return self.env.reset(**kwargs)

    def step(self, actions: NDArray[Any]) -> Any:
        """Apply actions (N,) and wait for what comes of them."""
        self.send(actions)
        return self.recv()

    def send(self, actions: NDArray[Any]) -> None:
        """Apply actions (N,)."""
        self.env.send(actions)  # type: ignore[attr-defined]

    def recv(self) -> Any:
        """What came of the actions sent last, as from `step`."""
        observation, *outcome = self.env.recv()  # type: ignore[attr-defined]
        self._age = np.where(self._over, 0, self._age + 1)
        terminated, truncated = outcome[1:3]
        self._over = terminated | truncated
        for i in np.flatnonzero(self._age < observation.shape[1] - 1):
            observation[i, : -1 - self._age[i]] = 0
        return observation, *outcome
