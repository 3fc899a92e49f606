"""One run on two workers of Ray Train: `pip install -e ".[ray]" && python configs/ray_train.py`.

Without a cluster, Ray starts a local one. If a worker fails, it is replaced and all resume from the last report; if the
script is started again, it resumes the run of this name.
"""

import sys
from pathlib import Path

import lightning as L
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback, prepare_trainer
from ray.train.torch import TorchTrainer

from lightning_dqn import DQN, DQNDataModule, EpsilonDecay, SoftTargetUpdate
from lightning_dqn.resume.checkpoint_io import AtomicCheckpointIO

NAME = "cartpole"
FOLDER = Path("runs/ray").resolve()  # with several machines: a folder that they share


def train() -> None:
    """The training function of each worker."""
    L.seed_everything(0)
    data = DQNDataModule(env_id="CartPole-v1")
    model = DQN(data.observation_space, data.action_space)
    trainer = L.Trainer(
        max_epochs=4,
        strategy=RayDDPStrategy(),
        plugins=[RayLightningEnvironment(), AtomicCheckpointIO()],
        # last, so that its checkpoint includes the state of the others
        callbacks=[SoftTargetUpdate(), EpsilonDecay(), RayTrainReportCallback()],
        default_root_dir=FOLDER / NAME,
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
    )
    trainer = prepare_trainer(trainer)
    earlier = ray.train.get_checkpoint()
    if earlier is None:
        trainer.fit(model, data)
        return
    with earlier.as_directory() as folder:
        trainer.fit(model, data, ckpt_path=f"{folder}/{RayTrainReportCallback.CHECKPOINT_NAME}")


if __name__ == "__main__":
    result = TorchTrainer(
        train,
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),  # True for one GPU per worker
        run_config=RunConfig(
            name=NAME,
            storage_path=str(FOLDER),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=3),
        ),
    ).fit()
    sys.stdout.write(f"return {result.metrics['val/episode_return']:.1f}, {result.checkpoint.path}\n")
