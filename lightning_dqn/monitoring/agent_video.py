"""Records videos of the greedy agent without a display."""

import importlib
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import NDArray

from lightning_dqn.envs import make_env
from lightning_dqn.run import data_of, run_folder

if TYPE_CHECKING:
    from lightning_dqn.module import DQN

# sides of a video in pixels: frames with a side below the first are enlarged to about the second
MIN_SIDE, TARGET_SIDE = 32, 160


class AgentVideo(Callback):
    """Records episodes of the agent as mp4 when training or a test ends, and logs them to W&B.

    Args:
        episodes: number of episodes to record at the end of training or of a test; 0 for none.
        max_env_steps: env steps after which a video ends.

    Raises:
        ValueError: if a value is out of its range.
    """

    def __init__(self, *, episodes: int = 1, max_env_steps: int = 1000) -> None:
        if episodes < 0:
            raise ValueError(f"episodes={episodes}: must be 0 or more")
        if max_env_steps < 1:
            raise ValueError(f"max_env_steps={max_env_steps}: must be at least 1")
        self.episodes = episodes
        self.max_env_steps = max_env_steps
        self.paths: list[str] = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the trained agent."""
        self._record(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the first of the tested episodes."""
        self._record(trainer, pl_module)
        for path in self.paths:
            rank_zero_info(f"video: {path}")

    def _record(self, trainer: Trainer, pl_module: Any) -> None:
        self.paths = []
        if not self.episodes or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        data = data_of(trainer)
        assert data.eval_dataset is not None
        if "rgb_array" not in data.render_modes:
            rank_zero_info(f"No video: {data.env_id} does not support render_mode rgb_array.")
            return
        folder = run_folder(trainer) / "videos"
        folder.mkdir(exist_ok=True)
        try:
            with _no_display(), closing(make_env(data.env_settings, render_mode="rgb_array")) as env:
                for seed in range(data.eval_dataset.seed, data.eval_dataset.seed + self.episodes):
                    path = folder / f"agent-{seed}.mp4"
                    self._record_episode(env, pl_module, path, seed, action_masks=data.action_masks)
                    self.paths.append(str(path))
        except Exception as error:  # an error of the renderer must not end the run
            rank_zero_info(f"No video: {data.env_id}: {type(error).__name__}: {error}")
            return
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_video("agent", self.paths, format=["mp4"] * len(self.paths))

    def _record_episode(
        self, env: "gym.Env[object, object]", module: "DQN", path: Path, seed: int, *, action_masks: bool
    ) -> None:
        """Record one greedy episode."""
        # the import takes a second
        imageio: Any = importlib.import_module("imageio.v2")
        observation, info = env.reset(seed=seed)
        state, first = None, np.ones(1, np.bool_)
        # yuv420 needs even sides; the default of imageio, 16, would rescale most frames
        with imageio.get_writer(path, fps=env.metadata.get("render_fps", 30), macro_block_size=2) as video:
            video.append_data(_frame(env))
            for _ in range(self.max_env_steps):
                mask = np.asarray(info["action_mask"], np.bool_)[None] if action_masks else None
                seen = np.expand_dims(np.asarray(observation), 0)
                [action], state = module.policy(seen, state, first, None, mask)
                first = np.zeros(1, np.bool_)
                observation, _, terminated, truncated, info = env.step(action)
                video.append_data(_frame(env))
                if terminated or truncated:
                    break


def _frame(env: "gym.Env[object, object]") -> NDArray[np.uint8]:
    """The rendered frame (H, W, 3) as uint8, enlarged if it is small."""
    frame = np.asarray(env.render())
    if frame.dtype != np.uint8:
        # MinAtar renders floats in [0, 1]
        frame = (255 * frame).astype(np.uint8)
    smallest = min(frame.shape[:2])
    scale = TARGET_SIDE // smallest if smallest < MIN_SIDE else 1
    return frame.repeat(scale, 0).repeat(scale, 1)


@contextmanager
def _no_display() -> Iterator[None]:
    """Context manager: pygame opens no display or sound card, and prints no greeting."""
    ours = {"SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy", "PYGAME_HIDE_SUPPORT_PROMPT": "1"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
