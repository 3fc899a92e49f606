"""Asks Optuna for trials, runs each as a fit in a process of its own, and tells Optuna what came of it."""

import dataclasses
import json
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from lightning_dqn.sweep.process import TrialProcess, reason
from lightning_dqn.sweep.sweep_file import SweepFile
from lightning_dqn.sweep.trial import PLACE, PRUNED

LOGGER = "--trainer.logger"
STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search on this machine, trial by trial.

    A trial is a process of its own: its memory, its GPU, its W&B run and its random generators are gone with it, and
    whatever ends it (a refusal, an error, the system's out-of-memory killer) ends nothing else. It costs the imports,
    some 4 s. The study lies in a storage that both processes open.

    Args:
        file: the sweep.
        extra: words of `fit` that the user adds.
        storage: address of the study's database.
        seed: of the sampler.
        full_trials: trials that are complete before one may be pruned.
        folder: where the trials' output goes.
    """

    file: SweepFile
    extra: list[str]
    storage: str
    seed: int
    full_trials: int
    folder: Path

    def open(self) -> optuna.Study:
        """The study; a new one, or the one that is there already.

        Raises:
            ValueError: if there is another search in its place, or no storage.
        """
        file = self.file
        said = {
            "words": [*file.before, *self.extra, *file.after],
            "metric": f"{file.goal} {file.metric}",
            **{parameter.name: _plain(parameter) for parameter in file.parameters},
        }
        if "://" not in self.storage:
            raise ValueError(f"--storage {self.storage}: must be the address of a database, sqlite:///{self.storage}")
        try:
            try:
                study = self._create()
            except sqlalchemy.exc.DBAPIError:
                # another process may have made the tables at the same moment
                time.sleep(1)
                study = self._create()
        except (sqlalchemy.exc.SQLAlchemyError, ImportError, optuna.exceptions.OptunaError) as error:
            raise ValueError(f"--storage {shown(self.storage)}: {str(error).splitlines()[0]}") from error
        earlier = study.user_attrs.get("search", said)
        for key in sorted(said.keys() | earlier.keys()):
            if said.get(key) != earlier.get(key):
                raise ValueError(
                    f"--storage {shown(self.storage)}: its study {file.name} was made with {key} {earlier.get(key)}, "
                    f"not {said.get(key)}; scores would not compare: choose another storage, or leave it as it was"
                )
        study.set_user_attr("search", said)
        return study

    def _create(self) -> optuna.Study:
        file = self.file
        return optuna.create_study(study_name=file.name, storage=self.storage, direction=file.goal, load_if_exists=True)

    def play(self, study: optuna.Study, trials: int) -> int | None:
        """Go on until so many trials have ended.

        Args:
            study: that takes them.
            trials: that it shall have, those of before included.

        Returns:
            The signal that stopped the search before; None if none did.
        """
        with TrialProcess() as process:
            while len(ended(study)) < trials and process.received is None:
                self._play_one(study, process)
            return process.received

    def ask(self, study: optuna.Study) -> tuple[optuna.Trial, dict[str, Any]]:
        """The next trial, and the values of its parameters."""
        trial = study.ask()
        study.sampler = self._sampler(study, trial.number)
        return trial, {parameter.name: parameter.ask(trial) for parameter in self.file.parameters}

    def _play_one(self, study: optuna.Study, process: TrialProcess) -> None:
        """Ask, run, tell, and say so."""
        begun = time.monotonic()
        trial, values = self.ask(study)
        words = self.file.words(values, self.extra)
        trial.set_user_attr("words", words)
        say(f"trial {trial.number:<3} {' '.join(f'{name}={_short(value)}' for name, value in values.items())}")
        log = self.folder / f"trial_{trial.number}.log"
        code = process.run(self._command(words), self._environment(trial), log)
        what = self._tell(study, trial, code, log, stopped=process.received is not None)
        # what the trial's own process has noted there
        folder = study.get_trials(deepcopy=False)[trial.number].user_attrs.get("folder")
        where = folder if code in (0, PRUNED) else f"{folder}, {log}" if folder else log
        say(f"          {what}; {time.monotonic() - begun:.0f} s; {where}")

    def _tell(self, study: optuna.Study, trial: optuna.Trial, code: int, log: Path, *, stopped: bool) -> str:
        """Tell Optuna what came of a trial, and say it in words."""
        reported = study.get_trials(deepcopy=False)[trial.number].intermediate_values
        values = [value for value in reported.values() if math.isfinite(value)]
        best = (max if self.file.goal == "maximize" else min)(values, default=math.nan)
        counted = f"{best:.2f}, the best of {len(values)} evaluation{'s' if len(values) != 1 else ''}"
        if code == 0 and values:
            # W&B's own search takes the best too; and it is what best.ckpt plays
            study.tell(trial, best)
            return counted
        if code == PRUNED:
            study.tell(trial, state=TrialState.PRUNED)
            return f"pruned: {counted}"
        why = reason(code, log) if code else f"{self.file.metric} was never logged, which metric.name asks for"
        trial.set_user_attr("failure", why)
        trial.set_user_attr("stopped", stopped)
        study.tell(trial, state=TrialState.FAIL)
        return why if stopped else f"failed: {why}"

    def _sampler(self, study: optuna.Study, trial_number: int) -> optuna.samplers.BaseSampler:
        """That of a trial: a search that was stopped asks for the same ones as one that was not, two at once never."""
        earlier = study.get_trials(deepcopy=False)[:trial_number]
        number = sum(not trial.user_attrs.get("stopped") for trial in earlier)
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        if self.file.method == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed)

    def _command(self, words: list[str]) -> list[str]:
        """The trial's; without W&B unless a word says otherwise."""
        quiet = [] if any(word.startswith(LOGGER) for word in words) else [f"{LOGGER}=CSVLogger"]
        return [sys.executable, "-m", "lightning_dqn.sweep.trial", "fit", *quiet, *words]

    def _environment(self, trial: optuna.Trial) -> dict[str, str]:
        pruning = self.file.pruning
        knobs = pruning and {**dataclasses.asdict(pruning), "full_trials": self.full_trials}
        place = {
            "storage": self.storage,
            "study": self.file.name,
            "trial": trial._trial_id,
            "metric": self.file.metric,
            "pruning": knobs,
        }
        return {**os.environ, PLACE: json.dumps(place)}


def _short(value: Any) -> str:
    """To be read; the study has all digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(parameter: Any) -> Any:
    """As a storage gives it back: its tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(parameter), default=str))


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that count: not those that were stopped with their sweep, nor those that were cut short with it."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state.is_finished() and not trial.user_attrs.get("stopped")
    ]


def summary(study: optuna.Study) -> list[str]:
    """What came of a study, and how to have its best trial again."""
    trials = ended(study)
    counts = [(name, sum(trial.state == state for trial in trials)) for state, name in STATES.items()]
    lines = [f"{len(trials)} trials: {', '.join(f'{count} {name}' for name, count in counts)}"]
    if not counts[0][1]:
        return lines
    best = study.best_trial
    folder = best.user_attrs["folder"]
    again = ["python", "-m", "lightning_dqn", "fit", *best.user_attrs["words"]]
    replay = ["python", "-m", "lightning_dqn", "test", "--ckpt_path", f"{folder}/checkpoints/best.ckpt"]
    return [
        *lines,
        f"  best       {best.value:.2f}, trial {best.number}, {folder}",
        f"  train      {shlex.join(again)}",
        f"  replay     {shlex.join(replay)}",
    ]


def shown(storage: str) -> str:
    """The address of a storage without its password."""
    try:
        return sqlalchemy.make_url(storage).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return storage


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
