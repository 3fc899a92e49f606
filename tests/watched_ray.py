"""Runs a script of Ray Train on a local Ray of two cores, and lets each worker write down what it learns from.

`python tests/watched_ray.py script.py folder`: the folder then has one file for each worker that began. Where Ray keeps
its own files, RAY_TMPDIR says.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import ray
import ray.train.torch
import torch
from ray.train.torch import TorchTrainer

from lightning_dqn.callbacks import UpdateCallback

# by then the first epoch has been reported
LETHAL_UPDATE = 2700


class Witness(UpdateCallback):
    """Writes down a worker's first batch and its last weights; kills the second worker once, in mid-training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen = {}

    def on_train_start(self, trainer, pl_module):
        self.seen = {"world_size": trainer.world_size, "started_at": trainer.global_step, "pid": os.getpid()}
        self.note(trainer)

    def on_iteration_end(self, trainer, pl_module, batch, results):
        if "first_batch" not in self.seen and len(batch.reward):
            self.seen["first_batch"] = batch.observation.clone()
            self.note(trainer)
        if trainer.global_rank == 1 and not self.seen["started_at"] and trainer.global_step >= LETHAL_UPDATE:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_end(self, trainer, pl_module):
        self.seen["weights"] = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.seen["ended_at"] = trainer.global_step
        self.note(trainer)

    def note(self, trainer):
        """One file a worker: the second group, which resumes, writes other files than the first."""
        group = "resumed" if self.seen["started_at"] else "first"
        torch.save(self.seen, self.folder / f"{group}-{trainer.global_rank}.pt")


def watched(train, folder):
    """What a worker does, under the eyes of a witness."""

    def train_and_note():
        fit = pl.Trainer.fit

        def fit_and_note(trainer, *args, **kwargs):
            trainer.callbacks.append(Witness(folder))
            return fit(trainer, *args, **kwargs)

        pl.Trainer.fit = fit_and_note
        train()

    return train_and_note


class WatchedTrainer(TorchTrainer):
    """In the place of Ray's own, for a script that knows nothing of it."""

    def __init__(self, train_loop_per_worker, **kwargs):
        super().__init__(watched(train_loop_per_worker, Path(sys.argv[2])), **kwargs)


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, _node_ip_address="127.0.0.1")
    ray.train.torch.TorchTrainer = WatchedTrainer
    try:
        runpy.run_path(sys.argv[1], run_name="__main__")
    finally:
        ray.shutdown()
