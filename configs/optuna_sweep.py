"""Hyperparameter search on CartPole-v1 with Optuna: copy this file and change `suggest`.

    pip install -e ".[sweep]"
    python configs/optuna_sweep.py --trials 20 --storage sqlite:///study.db

With a storage, the same command resumes the study. Several processes can work on it at the same time, each with a
`--seed` of its own.
"""

import argparse
import json
import shlex
import sys
from typing import Any

import lightning.pytorch as pl
import optuna
import torch
from optuna_integration import PyTorchLightningPruningCallback

from lightning_dqn import DQN, MLP, DQNDataModule, EpsilonDecay, SoftTargetUpdate
from lightning_dqn.callbacks import data_of

METRIC = "val/episode_return"
# options that all trials share
FIXED = {"data.num_envs": 16, "data.updates_per_iteration": 16}


class BestReturn(pl.Callback):
    """Records the best mean return of the evaluations."""

    def __init__(self) -> None:
        self.value = float("-inf")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the last evaluation."""
        self.value = max(self.value, float(trainer.callback_metrics[METRIC]))


class DivergenceCheck(pl.Callback):
    """Prunes a trial whose loss is not finite."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check the losses (U,) of the iteration."""
        if outputs and not torch.isfinite(outputs["loss"]).all():
            raise optuna.TrialPruned(f"the loss is not finite after {data_of(trainer).env_steps} env steps")


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    """The search space: values by the names of the command line's options."""
    width = trial.suggest_categorical("model.network.hidden_size", [64, 128, 256])
    return {
        "model.optimizer.lr": trial.suggest_float("model.optimizer.lr", 1e-4, 1e-2, log=True),
        "model.network.hidden_sizes": [width, width],
        "model.double": trial.suggest_categorical("model.double", [True, False]),
        "target_update.tau": trial.suggest_float("target_update.tau", 3e-3, 0.3, log=True),
        "data.n_step": trial.suggest_int("data.n_step", 1, 5),
        "epsilon.decay_env_steps": trial.suggest_int("epsilon.decay_env_steps", 1000, 10_000, step=500),
    }


def train(trial: optuna.Trial, *, epochs: int, epoch_env_steps: int, seed: int) -> float:
    """Train one agent; returns its best mean return of an evaluation."""
    options = {"seed_everything": seed, "trainer.max_epochs": epochs, "data.epoch_env_steps": epoch_env_steps}
    options |= FIXED | suggest(trial)
    trial.set_user_attr("options", options)
    pl.seed_everything(seed, workers=True, verbose=False)
    data = DQNDataModule(
        num_envs=options["data.num_envs"],
        updates_per_iteration=options["data.updates_per_iteration"],
        n_step=options["data.n_step"],
        epoch_env_steps=epoch_env_steps,
    )
    model = DQN(
        data.observation_space,
        data.action_space,
        network=lambda space, outputs: MLP(space, outputs, hidden_sizes=options["model.network.hidden_sizes"]),
        # the default optimizer of the command line uses amsgrad
        optimizer=lambda params: torch.optim.AdamW(params, lr=options["model.optimizer.lr"], amsgrad=True),
        double=options["model.double"],
    )
    best = BestReturn()
    callbacks = [
        SoftTargetUpdate(tau=options["target_update.tau"]),
        EpsilonDecay(decay_env_steps=options["epsilon.decay_env_steps"]),
        DivergenceCheck(),
        best,
        PyTorchLightningPruningCallback(trial, monitor=METRIC),
    ]
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, data)
    return best.value


def command_of(trial: optuna.trial.FrozenTrial) -> str:
    """The command that repeats the training of a trial."""
    options = [f"--{name}={json.dumps(value)}" for name, value in trial.user_attrs["options"].items()]
    return shlex.join(["python", "-m", "lightning_dqn", "fit", *options])


def main(arguments: list[str] | None = None) -> optuna.Study:
    """Run trials and print the best one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="trials of this call")
    parser.add_argument("--study", default="lightning_dqn", help="name of the study in its storage")
    parser.add_argument("--storage", default=None, help="database of the study; RAM without it")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of a trial, each with one evaluation")
    parser.add_argument("--epoch_env_steps", type=int, default=2500, help="env steps of an epoch")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first trial; each trial adds 1")
    options = parser.parse_args(arguments)
    study = optuna.create_study(
        study_name=options.study,
        storage=options.storage,
        load_if_exists=True,
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
    )
    # so that a resumed study draws new points
    study.sampler = optuna.samplers.TPESampler(seed=1000 * options.seed + len(study.trials))

    def objective(trial: optuna.Trial) -> float:
        seed = options.seed + trial.number
        try:
            return train(trial, epochs=options.epochs, epoch_env_steps=options.epoch_env_steps, seed=seed)
        except SystemExit:
            # Lightning converts Ctrl-C into this; without a state the trial would stay running
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            raise

    study.optimize(objective, n_trials=options.trials)
    if any(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.trials):
        best = study.best_trial
        sys.stdout.write(f"Best: trial {best.number}, {METRIC} {best.value:.1f}\n{command_of(best)}\n")
        sys.stdout.write("Train it with several seeds before you trust the result.\n")
    return study


if __name__ == "__main__":
    main()
