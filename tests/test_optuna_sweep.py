"""The Optuna script in configs/ and the sweep file of W&B: real trials, and options that the command line has."""

import csv
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from lightning_dqn.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
pytestmark = pytest.mark.integration
optuna = pytest.importorskip("optuna")
# trials of two epochs of 200 env steps
SHORT = ["--epochs", "2", "--epoch_env_steps", "200", "--trials"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(CONFIGS))
    import optuna_sweep  # noqa: PLC0415  it is no module of a package

    return optuna_sweep


def accepts(words):
    """Whether the command line takes these words: it prints the resulting configuration and exits with 0."""
    with pytest.raises(SystemExit) as ended:
        main([*words, "--print_config"])
    return not ended.value.code


def test_a_study_is_resumed_from_its_storage_with_new_points(script, tmp_path):
    storage = f"sqlite:///{tmp_path}/study.db"
    before = script.main([*SHORT, "2", "--storage", storage]).trials
    study = script.main([*SHORT, "1", "--storage", storage])
    assert [trial.number for trial in study.trials] == [0, 1, 2]
    assert [trial.value for trial in before] == [trial.value for trial in study.trials[:2]]
    # CartPole ends no episode before its 8th step
    assert study.best_value >= 8
    assert len({trial.params["model.optimizer.lr"] for trial in study.trials}) == 3


def test_the_printed_command_repeats_the_best_trial(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    study = script.main([*SHORT, "1"])
    command = shlex.split(capsys.readouterr().out.splitlines()[-2])
    main([*command[3:], "--trainer.logger=CSVLogger", "--video.episodes=0"])
    (file,) = tmp_path.glob("runs/*/*/metrics.csv")
    returns = [row["val/episode_return"] for row in csv.DictReader(file.open())]
    assert max(float(value) for value in returns if value) == pytest.approx(study.best_value)


def test_the_value_of_a_trial_is_its_best_evaluation(script):
    (trial,) = script.main([*SHORT, "1"]).trials
    assert list(trial.intermediate_values) == [0, 1]
    assert trial.value == max(trial.intermediate_values.values())


def test_a_trial_below_the_median_is_pruned(script):
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
    distributions = {}
    study.add_trial(
        optuna.trial.create_trial(value=500.0, intermediate_values={0: 500.0, 1: 500.0}, distributions=distributions)
    )
    study.optimize(lambda trial: script.train(trial, epochs=2, epoch_env_steps=100, seed=0), n_trials=1)
    assert study.trials[-1].state == optuna.trial.TrialState.PRUNED


def test_the_sweep_file_names_options_that_the_command_line_has():
    sweep = yaml.safe_load((CONFIGS / "sweep.yaml").read_text())
    words = [word for word in sweep["command"] if not word.startswith("${")]
    assert words[:3] == ["-m", "lightning_dqn", "fit"]
    words = [word.replace("configs/", f"{CONFIGS}/") for word in words[2:]]
    for name, parameter in sweep["parameters"].items():
        value = parameter["values"][0] if "values" in parameter else parameter["min"]
        words.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
    assert accepts(words), sys.argv
