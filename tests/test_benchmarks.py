"""`python -m benchmarks`: Atari's rows do the work they state, and a loop that doesn't learn is rejected."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from benchmarks.atari import floor, ours, work
from benchmarks.atari.proof import moved, weights
from benchmarks.launch import ROOT, measure
from benchmarks.marks import RateMarks
from benchmarks.plan import MEASUREMENTS
from benchmarks.settings import Job
from lightning_dqn import DQN, NatureCNN

PLANNED = {measurement.name: measurement for measurement in MEASUREMENTS}


def test_every_row_names_a_function_that_is_there():
    for measurement in MEASUREMENTS:
        names = [system.name for system in measurement.systems]
        assert len(set(names)) == len(names)
        assert set(measurement.yardsticks) <= set(names)
        for system in measurement.systems:
            module, _, function = system.entry.partition(":")
            # not imported: peers may be absent
            path = Path(importlib.util.find_spec(module).origin)
            assert f"\ndef {function}(job: Job)" in path.read_text()


@pytest.mark.integration
def test_pong_is_measured_with_the_settings_that_atari_is_learnt_with():
    config = yaml.safe_load((ROOT / "configs" / "atari.yaml").read_text())
    job = next(system.job for system in PLANNED["atari"].systems if system.name.startswith("ours, 4 envs"))
    data = ours.make_data(job, work.LEARNING_STARTS)
    fewer = {"memory_capacity", "memory_device", "warmup_env_steps", "eval_episodes"}
    for option, value in config["data"].items():
        assert option in fewer or getattr(data, option) == value, option
    assert data.steps_per_iteration == 1
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == work.LEARNING_RATE
    assert config["target_update"]["every_n_env_steps"] == work.TARGET_ENV_STEPS
    assert config["epsilon"]["end"] == work.EPSILON
    # one game plays the same steps an update
    alone = ours.make_data(replace(job, num_envs=1), work.LEARNING_STARTS)
    assert (alone.steps_per_iteration, alone.updates_per_iteration) == (work.ENV_STEPS_PER_UPDATE, 1)


@pytest.mark.integration
def test_the_floor_s_own_network_is_the_one_that_learns():
    data = ours.make_data(Job(num_envs=4), work.LEARNING_STARTS)
    model = ours.make_model(data, DQN, compiled=False)
    own = floor._network()
    assert isinstance(model.policy_net, NatureCNN)
    assert model.num_actions == work.NUM_ACTIONS
    for mine, theirs in zip(own.parameters(), model.policy_net.parameters(), strict=True):
        mine.data = theirs.data
    observation = floor._batches("cpu")[0][0]
    assert torch.allclose(own(observation), model.policy_net(observation), atol=1e-5)


def test_a_loop_that_does_not_learn_has_no_speed():
    net = nn.Linear(2, 2)
    before = weights(net)
    with pytest.raises(RuntimeError, match="the loop did not learn"):
        moved(before, weights(net))
    with torch.no_grad():
        net.weight += 0.3
    # four weights of 0.3, two biases of 0
    assert moved(before, weights(net)) == pytest.approx(0.2)


def test_rates_are_taken_behind_the_warm_up_that_was_asked_for():
    marks = RateMarks(0.0, warmup_env_steps=10)
    assert not marks.over(9, 1)
    with pytest.raises(RuntimeError, match="ended before"):
        marks.rates({})
    assert not marks.over(12, 3)
    assert marks.over(32, 8)
    notes = marks.rates({"weights_moved": 1.0})["notes"]
    assert (notes["env_steps"], notes["updates"], notes["weights_moved"]) == (20, 5, 1.0)


@pytest.mark.learning
def test_games_are_stepped_in_processes_of_their_own(tmp_path):
    outcomes = measure(PLANNED["atari_stepping"], Job(seconds=0.2, scratch=str(tmp_path)), rounds=1)
    for name, outcome in outcomes.items():
        assert not outcome.failures, (name, outcome.failures)
        assert outcome.figures["env_steps_per_s"][0] > 0
        assert outcome.notes[0]["env_steps"] > 0
