"""The data side of a run behind Lightning's interface: environments, memory and evaluation episodes."""

from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dqn.data.datasets import make_evaluation, make_replay, make_rollouts
from lightning_dqn.data.episode_dataset import Episode, EpisodeDataset
from lightning_dqn.data.knobs import MemoryDevice, check_knobs, check_learner, check_masks, check_memory
from lightning_dqn.data.loaders import TrainLoader, ignore_warnings, in_this_process
from lightning_dqn.data.player import EpisodeHistory, Policy
from lightning_dqn.data.replay_dataset import ReplayDataset
from lightning_dqn.data.resuming import announce_inexact, deal_anew, find_obstacle, put_back
from lightning_dqn.data.rollout_dataset import Rollout, RolloutDataset
from lightning_dqn.envs import EnvSettings, EnvWrapper, Vectorization, make_env
from lightning_dqn.fingerprint import environment_in_words, refuse_other_knobs
from lightning_dqn.ranks import Ranks
from lightning_dqn.replay import MaskedTransition, SamplerCallable, Transition, UniformSampler, try_out
from lightning_dqn.snapshots import CannotSnapshotError

# what another value of would make another run of it; evaluation may change at a resume
LEARNING_KNOBS = (
    "num_envs",
    "vectorization",
    "steps_per_iteration",
    "updates_per_iteration",
    "batch_size",
    "memory_capacity",
    "warmup_env_steps",
    "gamma",
    "n_step",
    "epoch_env_steps",
    "action_masks",
    "frame_stack",
    "overlap",
)


class DQNDataModule(pl.LightningDataModule):
    """The environment, the memory and the evaluation episodes of one run.

    For a learner of rollouts (PQN) there is no memory: the knobs of one are not used.

    Args:
        env_id: Gymnasium id of an environment with discrete actions; `module:Env-v0` imports the module first.
        env_kwargs: arguments of the environment, of an Atari game those of `envs.atari.GameProtocol`; a secret (token,
            key, ...) is given as {from_env: NAME}, the name of an environment variable.
        wrappers: Gymnasium wrappers around each environment, the innermost first.
        frame_stack: observations that the agent sees together, oldest first; 1 for each by itself.
        num_envs: environments played side by side, N; of each rank, where there are several.
        vectorization: how they are stepped: auto, sync, async or vector_entry_point (the environment's own).
        steps_per_iteration: env steps in each environment per iteration.
        updates_per_iteration: updates per iteration, U.
        batch_size: transitions per update and device.
        memory_capacity: transitions kept, over all environments and ranks.
        memory_device: where observations lie in the memory: cpu, cuda, or auto: images on the GPU that learns, if it
            has room for them.
        memory_folder: where a file holds them instead; null for no file.
        sampler: what chooses among them: lightning_dqn.UniformSampler or lightning_dqn.PrioritizedSampler.
        warmup_env_steps: env steps before the first update, over all environments and ranks.
        gamma: discount of one env step, in [0, 1].
        n_step: rewards summed before the value is trusted.
        epoch_env_steps: env steps between evaluations, over all environments and ranks; one epoch.
        eval_episodes: greedy episodes of one evaluation.
        eval_max_steps: env steps after which an evaluation episode is cut.
        save_memory: whether checkpoints hold the memory; without it a resumed run warms up an empty one.
        action_masks: whether actions are left out that the environment rules out by info["action_mask"].
        overlap: whether environments step while the device learns, with the actions of one iteration before.

    Raises:
        ValueError: if a value is out of its range, there is no such environment, or the memory is too large.
    """

    def __init__(
        self,
        *,
        env_id: str = "CartPole-v1",
        env_kwargs: dict[str, Any] | None = None,
        wrappers: list[EnvWrapper] | None = None,
        frame_stack: int = 1,
        num_envs: int = 1,
        vectorization: Vectorization = "auto",
        steps_per_iteration: int = 1,
        updates_per_iteration: int = 1,
        batch_size: int = 128,
        memory_capacity: int = 10_000,
        memory_device: MemoryDevice = "auto",
        memory_folder: str | None = None,
        sampler: SamplerCallable = UniformSampler,
        warmup_env_steps: int = 128,
        gamma: float = 0.99,
        n_step: int = 1,
        epoch_env_steps: int = 2_500,
        eval_episodes: int = 20,
        eval_max_steps: int = 27_000,
        save_memory: bool = True,
        action_masks: bool = False,
        overlap: bool = False,
    ) -> None:
        super().__init__()
        self.env_id = env_id
        self.env_kwargs = env_kwargs or {}
        self.wrappers = wrappers or []
        self.frame_stack = frame_stack
        self.num_envs = num_envs
        self.vectorization = vectorization
        self.steps_per_iteration = steps_per_iteration
        self.updates_per_iteration = updates_per_iteration
        self.batch_size = batch_size
        self.memory_capacity = memory_capacity
        self.memory_device = memory_device
        self.memory_folder = memory_folder
        self.sampler = sampler
        self.warmup_env_steps = warmup_env_steps
        self.gamma = gamma
        self.n_step = n_step
        self.epoch_env_steps = epoch_env_steps
        self.eval_episodes = eval_episodes
        self.eval_max_steps = eval_max_steps
        self.save_memory = save_memory
        self.action_masks = action_masks
        self.overlap = overlap
        self.env_settings = EnvSettings(env_id, self.env_kwargs, self.wrappers, frame_stack)
        self.ranks = Ranks()
        check_knobs(self)
        self._sampler_words, self.bytes_besides = try_out(sampler)
        env = make_env(self.env_settings)
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.render_modes: list[str] = env.metadata.get("render_modes", [])
        self.mask_size = check_masks(env) if action_masks else 0
        self._environment = environment_in_words(env, env_id, self.env_kwargs)
        env.close()
        self.bytes_besides += self.mask_size
        check_memory(self)
        # why checkpoints can't hold the environments as they are, if so
        self._inexact: str | None = None
        self.train_dataset: ReplayDataset | RolloutDataset | None = None
        self.eval_dataset: EpisodeDataset | None = None

    @property
    def env_steps(self) -> int:
        """Env steps played in training so far, by all ranks."""
        return self.train_dataset.env_steps if self.train_dataset else 0

    @property
    def episodes(self) -> EpisodeHistory:
        """Training episodes of this rank that ended so far."""
        return self.train_dataset.episodes if self.train_dataset else EpisodeHistory()

    def setup(self, stage: str) -> None:
        """Make environments and memory; their seeds come from the first rank's of torch, and from the rank.

        `seed_everything` sets torch's. Evaluation has the same seeds on all ranks, which share its episodes.

        Raises:
            ValueError: if the learner can't use a knob.
        """
        assert self.trainer is not None
        learner: Any = self.trainer.lightning_module
        check_learner(self, on_policy=learner.on_policy, munchausen=learner.munchausen)
        policy = cast(Policy, learner.act)
        # Lightning has it nowhere else
        timeout = getattr(self.trainer.strategy, "_timeout", None)
        self.ranks = Ranks(self.trainer.global_rank, self.trainer.world_size, timeout)
        seed = torch.initial_seed() if self.ranks.alone else self.trainer.strategy.broadcast(torch.initial_seed())
        play_seed, sample_seed, *_ = np.random.SeedSequence([seed, self.ranks.rank]).spawn(4)
        *_, eval_seed, test_seed = np.random.SeedSequence([seed, 0]).spawn(4)
        self.close()
        if stage == "fit":
            # of many environments two show as much as all; where a memory is left out, so are they
            prove_it = self.save_memory or learner.on_policy
            self._inexact = find_obstacle(
                self.env_settings,
                min(self.num_envs, 2),
                self.vectorization,
                overlap=self.overlap,
                prove_it=prove_it,
            )
            make = make_rollouts if learner.on_policy else make_replay
            self.train_dataset = make(self, policy, play_seed, sample_seed)
        # the episodes that chose the best checkpoint don't judge it
        episode_seed = eval_seed if stage in ("fit", "validate") else test_seed
        self.eval_dataset = make_evaluation(self, policy, episode_seed, keep_steps=stage == "predict")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches that are where they shall be are not taken apart to find that out."""
        if isinstance(batch, (Transition, MaskedTransition, Rollout)) and batch.reward.device == device:
            return batch
        if device.type == "cuda" and isinstance(batch, (Transition, MaskedTransition, Rollout)):
            # from pinned memory the copy is under way while the device still works on the last batch
            return type(batch)(*(part if part.is_cuda else _upload(part, device) for part in batch))
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def train_dataloader(self) -> TrainLoader:
        """Iterations of play and replay."""
        assert self.train_dataset is not None
        ignore_warnings()
        return TrainLoader(self.train_dataset)

    def val_dataloader(self) -> DataLoader[Episode]:
        """Greedy episodes."""
        return in_this_process(self.eval_dataset)

    def test_dataloader(self) -> DataLoader[Episode]:
        """Greedy episodes from starts that validation never sees."""
        return in_this_process(self.eval_dataset)

    def predict_dataloader(self) -> DataLoader[Episode]:
        """Greedy episodes with all their steps."""
        return in_this_process(self.eval_dataset)

    def state_dict(self) -> dict[str, Any]:
        """The data side of the run, see `state_dict` of its dataset, and its knobs; nothing outside training."""
        if self.train_dataset is None:
            return {}
        try:
            train = self.train_dataset.state_dict(with_envs=self._inexact is None)
        except CannotSnapshotError as refusal:
            # they could at first, and have changed
            self._inexact = str(refusal)
            announce_inexact(self._inexact)
            train = self.train_dataset.state_dict(with_envs=False)
        return {"knobs": self._knobs(), "save_memory": "memory" in train, "train": train}

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to continue another run than this one, or one whose memory has got lost.

        Args:
            checkpoint: as Lightning writes it.

        Raises:
            MisconfigurationException: naming the knob, its value then and its value now, or what is missing.
        """
        name = type(self).__qualname__
        state = checkpoint.get(name, {})
        train = state.get("train", {})
        if not train or (not {"memory", "memories"} & train.keys() and state.get("save_memory", True)):
            raise MisconfigurationException(
                f"The checkpoint has no memory of a {name}, so this run can't go on from it: use the data module that "
                "it was made with, or start anew from its weights by DQN.load_from_checkpoint"
            )
        # before there was a choice, draws were uniform
        refuse_other_knobs({"sampler": "UniformSampler", **state["knobs"]}, self._knobs())

    def _knobs(self) -> dict[str, Any]:
        return {**self._environment, **self._sampler_words, **{name: getattr(self, name) for name in LEARNING_KNOBS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run; called by Lightning after `setup`, also where there is nothing to continue.

        Raises:
            MisconfigurationException: if it was another run, or its environments were made in another way.
        """
        assert self.trainer is not None
        if self.trainer.state.fn != "fit" or self.train_dataset is None:
            return
        self.check_checkpoint({type(self).__qualname__: state})
        put_back(self.train_dataset, state["train"], with_envs=self._inexact is None)

    def deal_anew(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """What this rank goes on from, of the states that another number of ranks had; see `resuming.deal_anew`."""
        train = [state["train"] for state in states]
        return {**states[0], "train": deal_anew(train, self.ranks, torch.initial_seed())}

    def teardown(self, stage: str) -> None:
        """Close the environments; clock, history and memory stay readable."""
        self.close()

    def on_exception(self, exception: BaseException) -> None:
        """Close the environments, since Lightning calls no teardown after an exception."""
        self.close()

    def close(self) -> None:
        """Close all environments that are open."""
        if self.train_dataset is not None:
            self.train_dataset.envs.close()
        if self.eval_dataset is not None:
            self.eval_dataset.close()


def _upload(part: Tensor, device: torch.device) -> Tensor:
    return part.pin_memory().to(device, non_blocking=True)
