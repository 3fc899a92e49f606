"""One trial of a sweep, in a process of its own: `python -m lightning_dqn.sweep.trial fit ...`, started by `study`.

Its command line is that of a plain fit, so that Lightning can start the other ranks of a trial on several devices by
the same words. Where the study lies comes by the environment: the address of a storage may hold a password.
"""

import json
import os
import sys
import warnings
from typing import Any

import optuna
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from optuna.pruners import BasePruner, NopPruner, PercentilePruner
from optuna_integration import PyTorchLightningPruningCallback

from lightning_dqn.callbacks import run_folder
from lightning_dqn.cli import main as fit

# the environment's variable that says, as JSON, which trial this is
PLACE = "LIGHTNING_DQN_TRIAL"
# exit code of a trial that was pruned; those of shells begin at 126, Python's own are 1 and 2
PRUNED = 75


class TrialFolder(Callback):
    """Notes in the study where the run's files lie.

    Args:
        trial: of the study.
    """

    def __init__(self, trial: optuna.Trial) -> None:
        self._trial = trial

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note it while the trial runs: a finished one takes no notes."""
        if trainer.is_global_zero:
            self._trial.set_user_attr("folder", str(run_folder(trainer)))


def make_pruner(knobs: dict[str, Any] | None) -> BasePruner:
    """Stops trials whose best evaluation so far is not among the best 1/eta, at the same epoch, of the complete ones.

    It is what W&B's Hyperband does unless it is told to be strict, but for who is compared: W&B takes all runs, and
    begins with the second. With eta 2 it is Optuna's MedianPruner. Optuna's own Hyperband looks at the last evaluation
    instead of the best, and returns rise and fall; it also divides the trials into brackets that know nothing of each
    other, for which twenty are few.

    Args:
        knobs: `eta`, `min_iter` and `full_trials`; None for no pruning.
    """
    if knobs is None:
        return NopPruner()
    # the first evaluation has step 0
    warmup = knobs["min_iter"] - 1
    return PercentilePruner(100 / knobs["eta"], n_startup_trials=knobs["full_trials"], n_warmup_steps=warmup)


def main() -> None:
    """Run the fit; where Optuna stops it, end with exit code PRUNED."""
    place = json.loads(os.environ[PLACE])
    # what is asked here has been answered: the sampler has nothing to do
    study = optuna.load_study(
        study_name=place["study"],
        storage=place["storage"],
        sampler=optuna.samplers.RandomSampler(),
        pruner=make_pruner(place["pruning"]),
    )
    trial = optuna.Trial(study, place["trial"])
    pruning = PyTorchLightningPruningCallback(trial, monitor=place["metric"])
    try:
        fit(sys.argv[1:], callbacks=[TrialFolder(trial), pruning])
        # on several devices it does not raise
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            with warnings.catch_warnings():
                # it reports all values once more
                warnings.filterwarnings("ignore", message="The reported value is ignored")
                pruning.check_pruned()
    except optuna.TrialPruned as pruned:
        sys.stderr.write(f"{pruned}\n")
        sys.exit(PRUNED)


if __name__ == "__main__":
    main()
