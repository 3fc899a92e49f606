"""`python -m lightning_dqn.sweep`: the search of a W&B sweep file on one machine, by Optuna."""

import argparse
import contextlib
import difflib
import importlib
import io
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import yaml

from lightning_dqn.cli import main as fit
from lightning_dqn.cli.errors import exit_with_error
from lightning_dqn.cli.runs import DEFAULT_ROOT, new_run_folder
from lightning_dqn.envs.arguments import check_secrets

if TYPE_CHECKING:
    import optuna

    from lightning_dqn.sweep.search import Search

DESCRIPTION = """Searches for hyperparameters on this machine: the search of a W&B sweep file, by Optuna.

Each trial is the command line that W&B's agent would run, in a process of its own. Its score is its best evaluation.
Bad ones are stopped early where the file says early_terminate. Runs lie where others do (runs/), with a CSV logger
unless --trainer.logger says otherwise; what they print lies in runs/sweeps/<time>/trial_<number>.log.
"""
EPILOG = """All other words go to `fit`, in front of the file's parameters, as --trainer.max_epochs 8.

  python -m lightning_dqn.sweep configs/sweep.yaml --trials 20 --storage sqlite:///study.db

Ctrl-C stops it, the same command goes on. Run twice at the same time on one storage, it plays two trials side by side.
W&B's way to the same search: `wandb sweep configs/sweep.yaml`, and `wandb agent` with what that prints.
"""


def arguments(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line: our own options, and the words of `fit`."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_dqn.sweep",
        usage="%(prog)s FILE [options] [options of fit]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a W&B sweep file, as configs/sweep.yaml")
    parser.add_argument(
        "--trials",
        type=int,
        default=20,
        metavar="N",
        help="trials that the study shall have, earlier ones included (20)",
    )
    parser.add_argument(
        "--storage", metavar="URL", help="database of the study, sqlite:///study.db (a new one in runs/sweeps/<time>/)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of trials, not of training (0)")
    parser.add_argument(
        "--full_trials", type=int, default=5, metavar="N", help="trials complete before one is stopped early (5)"
    )
    given, extra = parser.parse_known_args(words)
    for name, least in (("trials", 1), ("seed", 0), ("full_trials", 1)):
        if getattr(given, name) < least:
            exit_with_error(ValueError(f"--{name} {getattr(given, name)}: must be at least {least}"))
    for word in extra:
        near = difflib.get_close_matches(word.partition("=")[0], parser._option_string_actions, n=1, cutoff=0.8)
        if near and word.startswith("--"):
            exit_with_error(ValueError(f"{word}: no such option; did you mean {near[0]}?"))
    return given, extra


def main(words: list[str] | None = None) -> None:
    """Run the command line."""
    given, extra = arguments(sys.argv[1:] if words is None else words)
    for module in ("optuna", "optuna_integration"):
        try:
            importlib.import_module(module)
        except ImportError:
            exit_with_error(
                ImportError(f'{module} is not installed, which chooses the trials: pip install -e ".[sweep]"')
            )
    try:
        _search(given, extra)
    except KeyboardInterrupt:
        # before the first trial
        _exit(signal.SIGINT)


def _search(given: argparse.Namespace, extra: list[str]) -> None:
    import optuna  # noqa: PLC0415  what follows needs the extra `sweep`

    from lightning_dqn.sweep.search import ended, say, shown, summary  # noqa: PLC0415

    # it would report each trial a second time
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        search = _prepare(given, extra)
        study = _open(search)
    except (ValueError, OSError) as error:
        exit_with_error(error)
    file, before = search.file, len(ended(study))
    said = f"{given.trials} trials of {given.file}, to {file.goal} {file.metric}"
    say(f"{said}; {before} of them are there already" if before else said)
    say(f"Study: {shown(search.storage)}; what the trials print: {search.folder}/trial_<number>.log; Ctrl-C stops")
    stopped = search.play(study, given.trials)
    for line in summary(study):
        say(line)
    if stopped is not None:
        again = f"the same command with --storage {shown(search.storage)} goes on"
        say(f"Stopped by {signal.Signals(stopped).name}: {again}")
        _exit(stopped)
    complete = any(trial.state == optuna.trial.TrialState.COMPLETE for trial in ended(study))
    sys.exit(0 if complete else 1)


def _prepare(given: argparse.Namespace, extra: list[str]) -> "Search":
    """The search, if a trial can have the words that all of them have; its folder is made."""
    from lightning_dqn.sweep.search import Search  # noqa: PLC0415
    from lightning_dqn.sweep.sweep_file import read_sweep_file  # noqa: PLC0415

    file = read_sweep_file(given.file)
    flags = {word.partition("=")[0] for word in extra}
    for parameter in file.parameters:
        if f"--{parameter.name}" in flags:
            raise ValueError(f"--{parameter.name}: is a parameter of {given.file}; leave it out, or change the file")
    _check(file.words({parameter.name: parameter.example for parameter in file.parameters}, extra))
    folder = new_run_folder(Path(DEFAULT_ROOT), "sweeps")
    return Search(
        file=file,
        extra=extra,
        storage=given.storage or f"sqlite:///{folder / 'study.db'}",
        seed=given.seed,
        full_trials=given.full_trials,
        folder=folder,
    )


def _open(search: "Search") -> "optuna.Study":
    """The study, or no folder."""
    try:
        return search.open()
    except ValueError:
        with contextlib.suppress(OSError):
            os.removedirs(search.folder)
        raise


def _check(words: list[str]) -> None:
    """Refuse words that no trial could run with, before there is any."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            fit(["fit", *words, "--print_config"])
        except SystemExit as left:
            if left.code:
                raise
    # the words are saved in the study
    check_secrets(yaml.safe_load(printed.getvalue())["data"]["env_kwargs"] or {})


def _exit(signum: int) -> NoReturn:
    """As a shell says it; one Ctrl-C more would only make a traceback of it while Python shuts down."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(128 + signum)


if __name__ == "__main__":
    main()
