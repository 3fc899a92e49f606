"""Agents that have learnt: minutes, so after everything else."""

import csv
import re
from pathlib import Path

import pytest
from conftest import clean_environment, run_cli

from lightning_dqn.cli import main

pytestmark = pytest.mark.learning
ROOT = Path(__file__).parent.parent


def test_the_readmes_ten_lines_of_python_learn_as_they_stand_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [block, *_] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = {}
    exec(compile(block, "README.md", "exec"), lines)  # the README is ours
    # a policy that acts by chance lasts 20 steps or so
    assert lines["trainer"].callback_metrics["test/episode_return"] > 150


def best_val_return(*arguments):
    """The best mean greedy return of a run of the command line in this folder."""
    main(["fit", "--trainer.logger", "CSVLogger", "--video.episodes", "0", *arguments])
    [metrics] = Path("runs").glob("*/*/metrics.csv")
    with metrics.open() as rows:
        return max(float(row["val/episode_return"]) for row in csv.DictReader(rows) if row["val/episode_return"])


def test_frozen_lake_is_crossed_by_the_command_line_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "--data.env_id FrozenLake-v1 --data.env_kwargs.is_slippery false --epsilon.decay_env_steps 5000"
    words += " --model.optimizer.lr 1e-3 --data.epoch_env_steps 5000 --trainer.max_epochs 4 --data.eval_episodes 1"
    # the lake is the same each time, so one greedy episode tells: 1 for the goal, 0 for a hole or the time limit
    assert best_val_return(*words.split()) == 1.0


def test_vector_environments_learn_cartpole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "--data.num_envs 8 --data.updates_per_iteration 8 --trainer.max_epochs 8 --seed_everything 1"
    # eight epochs are 20k env steps; chance lasts 20 steps or so
    assert best_val_return(*words.split()) > 120


def test_the_fast_configuration_solves_cartpole_in_seconds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # solved at the eighth epoch or so on all of ten seeds; 475 of 500 over 100 greedy episodes
    assert best_val_return("--config", str(ROOT / "configs" / "cartpole_fast.yaml"), "--seed_everything", "1") >= 475


def test_two_ranks_solve_cartpole_in_as_many_env_steps_as_one(tmp_path):
    fast = f"fit --config {ROOT / 'configs' / 'cartpole_fast.yaml'} --trainer.logger false --video.episodes 0"
    # the same run whole, and cut into two
    ways = {
        "one": "--trainer.devices 1",
        "two": "--trainer.devices 2 --trainer.strategy ddp --data.num_envs 16 --data.batch_size 64",
    }
    taken = dict.fromkeys(ways, 0)
    for seed in ("0", "1", "2"):
        for name, words in ways.items():
            done = run_cli(
                tmp_path, clean_environment(tmp_path), *fast.split(), *words.split(), "--seed_everything", seed
            )
            assert done.exit_code == 0, done.text
            assert float(re.search(r"return +best ([\d.]+)", done.text)[1]) >= 475
            taken[name] += int(re.search(r"Finished: ([\d,]+) env steps", done.text)[1].replace(",", ""))
    # single seeds take 10,000 to 23,000
    assert taken["two"] == pytest.approx(taken["one"], rel=0.25)
