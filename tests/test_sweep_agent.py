"""Sweeps by W&B: its own agent, which needs its server only to be told what to run, runs configs/sweep.yaml."""

import os
import queue
import time
from pathlib import Path
from unittest import mock

import optuna
import pytest
import yaml
from conftest import clean_environment, read_offline_run
from wandb.wandb_agent import Agent

from lightning_dqn.cli import main as fit
from lightning_dqn.sweep.sweep_file import read_sweep_file

ROOT = Path(__file__).parent.parent
FILE = ROOT / "configs" / "sweep.yaml"
SAID = yaml.safe_load(FILE.read_text())
# what a user would write under `parameters` to make runs short
SHORT = {"trainer.max_epochs": 1, "data.epoch_env_steps": 300, "data.eval_episodes": 2, "video.episodes": 0}


def choice(seed):
    """Values of the parameters as W&B's server would send them, and the words that a search by Optuna makes of them."""
    file = read_sweep_file(FILE)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    values = {parameter.name: parameter.ask(study.ask()) for parameter in file.parameters}
    sent = dict(values)
    for name, said in SAID["parameters"].items():
        if "values" in said:
            [sent[name]] = [value for value in said["values"] if str(value) == values[name]]
    return sent, file.words(values, [])


@pytest.fixture
def agent(tmp_path, monkeypatch):
    """W&B's agent in a newcomer's world, with a folder of configurations; it is told what a server would tell it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(FILE.parent)
    # the agent changes the environment of its process
    with mock.patch.dict(os.environ, clean_environment(tmp_path, WANDB_SWEEP_ID="search01"), clear=True):
        agent = Agent(api=None, queue=queue.Queue(), sweep_id="search01")
        agent._sweep_command = list(SAID["command"])
        yield agent
        for process in agent._run_processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()


def tell(agent, kind, **command):
    """A command of the server."""
    response = agent._process_command({"type": kind, "run_id": "run12345", **command})
    assert "exception" not in response, response
    return agent._run_processes["run12345"]


def sent(values):
    """Parameters in the server's form."""
    return {"program": None, "args": {name: {"value": value} for name, value in values.items()}}


@pytest.mark.parametrize("seed", range(3))
def test_a_trial_of_ours_has_the_words_that_wandbs_agent_runs(agent, tmp_path, monkeypatch, seed):
    # an interpreter that only notes what it is given
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{python.parent}:{os.environ['PATH']}")
    values, words = choice(seed)
    assert tell(agent, "run", **sent(values)).wait(10) == 0
    assert (tmp_path / "words").read_text().splitlines() == ["-m", "lightning_dqn", "fit", *words]


@pytest.mark.parametrize("seed", range(3))
def test_the_command_line_takes_each_of_the_agents_words_as_it_was_meant(capsys, monkeypatch, seed):
    monkeypatch.chdir(ROOT)
    values, words = choice(seed)
    with pytest.raises(SystemExit) as left:
        fit(["fit", *words, "--print_config"])
    assert left.value.code == 0
    run = yaml.safe_load(capsys.readouterr().out)
    model = run["model"]["init_args"]
    assert model["optimizer"]["init_args"]["lr"] == values["model.optimizer.lr"]
    assert model["network"]["init_args"]["hidden_sizes"] == values["model.network.hidden_sizes"]
    assert model["double"] is values["model.double"]
    assert run["target_update"]["tau"] == values["target_update.tau"]
    assert run["target_update"]["every_n_updates"] == values["target_update.every_n_updates"]
    assert run["data"]["n_step"] == values["data.n_step"]
    assert run["epsilon"]["decay_env_steps"] == values["epsilon.decay_env_steps"]
    # what the file says for all
    assert (run["trainer"]["max_epochs"], run["data"]["num_envs"], model["compile"]) == (4, 32, "auto")


@pytest.mark.learning
def test_a_run_of_wandbs_agent_logs_the_score_and_what_it_was_chosen_with(agent, tmp_path, capfd):
    values, _ = choice(0)
    process = tell(agent, "run", **sent({**values, **SHORT, "seed_everything": 3}))
    assert process.wait(300) == 0
    [folder] = tmp_path.glob("runs/*/*")
    # the agent's run, in the folder of ours
    [path] = folder.glob("wandb/offline-run-*")
    assert path.name.endswith("-run12345")
    records = read_offline_run(folder)
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [row["env_steps"] for row in rows if row.get("val/episode_return", 0) >= 8] == [pytest.approx(300, abs=40)]
    [run] = [record["run"] for record in records if record["type"] == "run"]
    assert run["sweep_id"] == "search01"
    logged = dict(run["config"]["update"])
    for record in records:
        if record["type"] == "config":
            logged.update(record["config"].get("update", {}))
    for name, value in values.items():
        assert logged[name] == value, name
    assert logged["model"]["init_args"]["optimizer"]["init_args"]["lr"] == values["model.optimizer.lr"]
    assert logged["seed_everything"] == 3
    # a sweep has its own project
    assert "Ignoring" not in capfd.readouterr().err


@pytest.mark.learning
def test_a_run_that_wandbs_agent_stops_saves_its_state_and_counts_as_no_failure(agent, tmp_path):
    process = tell(agent, "run", **sent({**SHORT, "trainer.max_epochs": 10_000}))
    while not list(tmp_path.glob("runs/*/*/checkpoints/best.ckpt")):
        assert process.poll() is None
        time.sleep(0.2)
    saved = time.time()
    tell(agent, "stop")
    # more than 0 is a failure to the agent, and three of them its end
    assert process.wait(60) == 0
    [last] = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    assert last.stat().st_mtime > saved
    [folder] = tmp_path.glob("runs/*/*")
    [end] = [record["exit"] for record in read_offline_run(folder) if record["type"] == "exit"]
    assert not end.get("exit_code")
