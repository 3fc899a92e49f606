"""`python resident_memory.py 20000`: so many iterations of the textbook loop, and the resident memory on the way."""

import sys
from pathlib import Path

import lightning.pytorch as pl
from conftest import quiet_trainer

from lightning_dqn import DQN, DQNDataModule, EpsilonDecay, SoftTargetUpdate
from lightning_dqn.monitoring.episode_statistics import EpisodeStatistics
from lightning_dqn.monitoring.finite_check import FiniteCheck
from lightning_dqn.resume.stop_on_signal import StopOnSignal

STARTED = 5_000


class Watch(pl.Callback):
    """Prints kB resident from iteration 5,000 on, when all that is made once is made, ten times in all."""

    def __init__(self, iterations):
        self.iterations, self.seen = iterations, 0

    def on_train_batch_end(self, *_):
        self.seen += 1
        if self.seen >= STARTED and (self.seen - STARTED) % ((self.iterations - STARTED) // 9) == 0:
            status = Path("/proc/self/status").read_text()
            resident = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
            sys.stdout.write(f"{self.seen} {resident}\n")
            sys.stdout.flush()


def main(iterations):
    """Fit with what the command line adds, but for what is drawn and written."""
    pl.seed_everything(0)
    data = DQNDataModule(epoch_env_steps=iterations // 20, eval_episodes=2, iterations_per_chunk=1)
    callbacks = [SoftTargetUpdate(), EpsilonDecay(), EpisodeStatistics(), FiniteCheck(), Watch(iterations)]
    trainer = quiet_trainer(max_epochs=20, callbacks=[*callbacks, StopOnSignal()])
    trainer.fit(DQN(data.observation_space, data.action_space, compile=False), data)


if __name__ == "__main__":
    main(int(sys.argv[1]))
