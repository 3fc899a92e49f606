"""Stopped anywhere, a run resumes exactly, in one process.

A run of 600 iterations is compared, to the bit, with one of 300, another seed in a fresh trainer, and 300 more.
"""

import importlib
import random
from pathlib import Path

import gymnasium as gym
import lightning.pytorch as pl
import numpy as np
import pytest
import test_action_masks  # noqa: F401  registers Walk-v0
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from runs import Dropout, Unrepeatable, assert_same_run, fit, load, make_pair
from test_replay_dataset import countdown, make_dataset, one_step, take, transitions, written_by

from lightning_dqn import C51, IQN, MLP, PQN, QRDQN, PrioritizedSampler
from lightning_dqn.envs import EnvSettings, make_vector_env
from lightning_dqn.monitoring.episode_statistics import EpisodeStatistics
from lightning_dqn.monitoring.run_progress_bar import RunProgressBar
from lightning_dqn.resume.content import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")
TAXI = max((env_id for env_id in gym.registry if env_id.startswith("Taxi-v")), key=lambda i: int(i[6:]))


def falling(optimizer):
    """A rate that goes down all the time."""
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)


RUNS = {
    "one-environment": {},
    "four-one-after-the-other": {"num_envs": 4, "vectorization": "sync", "epoch_env_steps": 1200},
    "four-in-their-own-vector-form": {"num_envs": 4, "epoch_env_steps": 1200},
    "three-step-returns": {"num_envs": 2, "n_step": 3, "epoch_env_steps": 600},
    "several-updates": {
        **{"num_envs": 3, "steps_per_iteration": 2, "updates_per_iteration": 3, "learner": {"double": True}},
        **{"epoch_env_steps": 1800, "every_n_updates": 999},
    },
    "frozen-lake": {"env_id": "FrozenLake-v1"},
    "taxi": {"env_id": TAXI},
    "acrobot": {"env_id": "Acrobot-v1"},
    "dropout": {"network": Dropout},
    "prioritised": {"num_envs": 3, "n_step": 3, "sampler": PrioritizedSampler, "epoch_env_steps": 900},
    "c51-noisy-dueling": {
        "model": C51,
        "learner": {"num_atoms": 11},
        "network": lambda space, outputs: MLP(space, outputs, hidden_sizes=[16, 16], noisy=True, dueling=True),
    },
    "qrdqn-munchausen": {"model": QRDQN, "learner": {"munchausen": True, "num_quantiles": 8}},
    "iqn-double": {"model": IQN, "learner": {"double": True, "num_cosines": 8}},
    "boltzmann": {"learner": {"boltzmann_temperature": 1.0}},
    "falling-rate-and-clipped-norm": {"learner": {"lr_scheduler": falling, "clip_grad_norm": 0.5}},
    "masks": {"env_id": "Walk-v0", "num_envs": 2, "action_masks": True, "epoch_env_steps": 600},
    "normalized": {"learner": {"normalize_observations": True, "reward_scale": 0.3}},
    "normalized-c51": {
        **{"model": C51, "num_envs": 3, "epoch_env_steps": 900},
        "learner": {"normalize_observations": True, "reward_scale": 0.3},
    },
    "normalized-pqn": {
        **{"model": PQN, "num_envs": 4, "steps_per_iteration": 5, "updates_per_iteration": 4, "batch_size": 10},
        **{"save_memory": False, "learner": {"normalize_observations": True, "reward_scale": 0.3}},
    },
    "hard-target-by-env-steps": {
        "num_envs": 4,
        "epoch_env_steps": 1200,
        "target": {"tau": 1.0, "every_n_env_steps": 70},
    },
}


def flat_image(env):
    """What MiniGrid's agent sees, as one vector."""
    return gym.wrappers.FlattenObservation(importlib.import_module("minigrid.wrappers").ImgObsWrapper(env))


# state in C, in other processes, on the way, or in packages of others
OTHERS = {
    "lunar-lander": {"env_id": "LunarLander-v3", "eval_max_steps": 20},
    "four-lunar-landers": {
        **{"env_id": "LunarLander-v3", "eval_max_steps": 20, "num_envs": 4},
        **{"vectorization": "sync", "epoch_env_steps": 1200, "every_n_updates": 999},
    },
    "async": {"num_envs": 2, "vectorization": "async", "epoch_env_steps": 600},
    "overlap": {"num_envs": 2, "vectorization": "async", "overlap": True, "epoch_env_steps": 600},
    "minigrid": {"env_id": "minigrid:MiniGrid-DoorKey-5x5-v0", "wrappers": [flat_image], "eval_max_steps": 20},
    "highway": {
        **{"env_id": "highway_env:highway-fast-v0", "epoch_env_steps": 80, "warmup_env_steps": 20},
        **{"eval_max_steps": 3, "batch_size": 8, "every_n_updates": 999},
    },
}
# the others take their time
QUICK = {
    *("one-environment", "four-in-their-own-vector-form", "three-step-returns", "dropout", "prioritised"),
    *("falling-rate-and-clipped-norm", "masks", "normalized", "normalized-c51", "normalized-pqn"),
}


def slow(value):
    """A parameter of the faults tier."""
    return pytest.param(value, marks=pytest.mark.faults)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[pytest.mark.faults] * (name not in QUICK))
        for name, options in RUNS.items()
    ],
)
def test_300_iterations_and_300_resumed_equal_600(tmp_path, messages, options):
    fit(tmp_path / "whole", **options)
    fit(tmp_path / "part", **options, limits={"max_epochs": 1})
    fit(tmp_path / "resumed", **options, ckpt_path=tmp_path / "part" / "epoch0.ckpt", seed=77)
    assert_same_run(tmp_path / "whole" / "epoch1.ckpt", tmp_path / "resumed" / "epoch1.ckpt")
    reported = [line for line in messages if line.startswith(("Resumed", "Checkpoints hold", "Environments"))]
    assert len(reported) == 1
    assert reported[0].endswith((" transitions.", " env steps.")), "nothing that is not exact"


@pytest.mark.parametrize("name", [slow(name) if name == "highway" else name for name in OTHERS])
@pytest.mark.integration
def test_environments_of_all_kinds_resume_exactly(tmp_path, messages, name):
    options = OTHERS[name]
    module, _, given = options.get("env_id", "").rpartition(":")
    pytest.importorskip(module or "gymnasium")
    assert module or not given or given in gym.registry
    fit(tmp_path / "whole", **options)
    fit(tmp_path / "resumed", **options, ckpt_path=tmp_path / "whole" / "epoch0.ckpt", seed=77)
    wrappers = options.get("wrappers", ())
    assert_same_run(tmp_path / "whole" / "epoch1.ckpt", tmp_path / "resumed" / "epoch1.ckpt", wrappers=wrappers)
    (line,) = [line for line in messages if line.startswith(("Resumed", "Checkpoints hold", "Environments"))]
    assert line.endswith(" transitions."), "nothing that is not exact"


def test_the_comparison_would_show_another_seed(tmp_path):
    for name, seed in (("one", 3), ("other", 4)):
        fit(tmp_path / name, seed=seed)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "one" / "epoch1.ckpt", tmp_path / "other" / "epoch1.ckpt")


@pytest.mark.parametrize("compile", [slow(True), "auto"])
@pytest.mark.integration
def test_a_compiled_run_resumes_compiled(tmp_path, monkeypatch, compile):
    # 551 updates are worth it, the 300 that are left after the first epoch would not be
    monkeypatch.setattr("lightning_dqn.speed.compiled.WORTH_COMPILING", 400)
    fit(tmp_path / "whole", compile=compile)
    fit(tmp_path / "resumed", compile=compile, ckpt_path=tmp_path / "whole" / "epoch0.ckpt", seed=77)
    assert load(tmp_path / "resumed" / "epoch1.ckpt")["compiled"] is True
    assert_same_run(tmp_path / "whole" / "epoch1.ckpt", tmp_path / "resumed" / "epoch1.ckpt")


@pytest.mark.learning
@pytest.mark.parametrize("name", ["c51-noisy-dueling", "iqn-double", "frozen-lake"])
def test_a_compiled_run_that_draws_numbers_resumes_exactly_from_mid_run(tmp_path, name):
    options = {**RUNS[name], "compile": True}
    fit(tmp_path / "whole", **options)
    for part in ("mid222", "epoch0"):
        fit(tmp_path / part, **options, ckpt_path=tmp_path / "whole" / f"{part}.ckpt", seed=77)
        assert load(tmp_path / part / "epoch1.ckpt")["compiled"] is True
        assert_same_run(tmp_path / "whole" / "epoch1.ckpt", tmp_path / part / "epoch1.ckpt")


class DrawRecorder(pl.Callback):
    """Draws from every generator of the process after each iteration."""

    def __init__(self):
        self.drawn = []

    def on_train_batch_end(self, *_):
        self.drawn.append((random.random(), random.gauss(), np.random.normal(), torch.rand(1).item()))


def test_the_generators_of_the_process_resume(tmp_path):
    whole, resumed = DrawRecorder(), DrawRecorder()
    fit(tmp_path / "whole", callbacks=[whole])
    # an odd number of normal draws, of which numpy and Python make two at a time
    fit(tmp_path / "resumed", callbacks=[resumed], ckpt_path=tmp_path / "whole" / "mid333.ckpt", seed=77)
    assert len(resumed.drawn) == 600 - (333 + 49)
    assert resumed.drawn == whole.drawn[-len(resumed.drawn) :]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two epochs with all its checkpoints: 49 iterations without an update, then 551 with one."""
    folder = tmp_path_factory.mktemp("whole")
    fit(folder)
    return folder


@pytest.fixture(scope="module")
def whole_by_steps(tmp_path_factory):
    """The same as long as the update clock says."""
    folder = tmp_path_factory.mktemp("whole")
    fit(folder, limits={"max_epochs": -1, "max_steps": 500})
    return folder


@pytest.mark.parametrize("name", ["epoch0", slow("mid111"), "mid222", slow("mid333"), "mid444"])
def test_any_checkpoint_of_a_run_by_epochs_leads_to_the_same_end(tmp_path, whole, name):
    fit(tmp_path, ckpt_path=whole / f"{name}.ckpt", seed=77)
    assert_same_run(whole / "epoch1.ckpt", tmp_path / "epoch1.ckpt")


@pytest.mark.parametrize("name", [slow("mid111"), "mid222", slow("mid333"), slow("mid444")])
def test_any_checkpoint_of_a_run_by_updates_leads_to_the_same_end(tmp_path, whole_by_steps, name):
    limits = {"max_epochs": -1, "max_steps": 500}
    fit(tmp_path, ckpt_path=whole_by_steps / f"{name}.ckpt", seed=77, limits=limits)
    assert_same_run(whole_by_steps / "epoch1.ckpt", tmp_path / "epoch1.ckpt")


def assert_same_but_for_epochs(folder, *paths):
    """Lightning counts an epoch twice where epochs are no limit."""
    for name, path in zip(("one", "other"), paths, strict=True):
        torch.save({key: part for key, part in load(path).items() if key not in ("loops", "epoch")}, folder / name)
    assert_same_run(folder / "one", folder / "other")


def test_an_epochs_end_in_a_run_by_updates_leads_to_the_same_end(tmp_path, whole_by_steps):
    limits = {"max_epochs": -1, "max_steps": 500}
    fit(tmp_path, ckpt_path=whole_by_steps / "epoch0.ckpt", seed=77, limits=limits)
    end = max(tmp_path.glob("epoch*.ckpt"), key=lambda path: path.name)
    assert_same_but_for_epochs(tmp_path, whole_by_steps / "epoch1.ckpt", end)


@pytest.mark.parametrize("stop", [100, slow(250), slow(251), slow(252), slow(400)])
@pytest.mark.parametrize("then", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 551}], ids=["epochs", "updates"])
def test_a_run_that_its_last_update_cut_in_mid_epoch_plays_the_rest(tmp_path, whole, stop, then):
    fit(tmp_path / "part", limits={"max_epochs": 2, "max_steps": stop})
    last = max((tmp_path / "part").glob("epoch*.ckpt"), key=lambda path: path.name)
    assert load(last)["global_step"] == stop
    fit(tmp_path / "rest", ckpt_path=last, seed=77, limits=then)
    end = max((tmp_path / "rest").glob("epoch*.ckpt"), key=lambda path: path.name)
    if then["max_epochs"] < 0 and stop == 251:
        assert_same_but_for_epochs(tmp_path, whole / "epoch1.ckpt", end)
    else:
        assert_same_run(whole / "epoch1.ckpt", end)


def test_an_evaluation_that_follows_a_checkpoint_is_not_left_out(tmp_path):
    # update 251 is in the last iteration of the first epoch; the loader of the evaluation draws from torch's generator
    options = {"every_n_updates": 251, "network": Dropout}
    fit(tmp_path / "whole", **options)
    fit(tmp_path / "resumed", **options, ckpt_path=tmp_path / "whole" / "mid251.ckpt", seed=77)
    assert_same_run(tmp_path / "whole" / "epoch1.ckpt", tmp_path / "resumed" / "epoch1.ckpt")
    # and from the end of the epoch with that evaluation once more
    fit(tmp_path / "again", **options, ckpt_path=tmp_path / "resumed" / "epoch0.ckpt", seed=78)
    assert_same_run(tmp_path / "whole" / "epoch1.ckpt", tmp_path / "again" / "epoch1.ckpt")


def test_priorities_resume_from_the_middle_of_an_epoch(tmp_path):
    options = {"num_envs": 2, "n_step": 3, "updates_per_iteration": 2, "epoch_env_steps": 600, "every_n_updates": 334}
    options["sampler"] = PrioritizedSampler
    fit(tmp_path / "whole", **options)
    fit(tmp_path / "resumed", **options, ckpt_path=tmp_path / "whole" / "mid334.ckpt", seed=77)
    assert_same_run(tmp_path / "whole" / "epoch1.ckpt", tmp_path / "resumed" / "epoch1.ckpt")
    sampler = load(tmp_path / "whole" / "epoch1.ckpt")["DQNDataModule"]["train"]["memory"]["sampler"]
    # neither of a run whose priorities or beta stayed as they were
    assert sampler["beta"] == 1.0
    assert len(sampler["priorities"].unique()) > 50


def test_a_checkpoint_after_the_last_iteration_keeps_the_generators(tmp_path, whole):
    # nothing is left to do: none are put back, and none may be lost
    trainer = fit(tmp_path, ckpt_path=whole / "epoch1.ckpt", seed=77)
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    fit(tmp_path / "on", ckpt_path=tmp_path / "again.ckpt", seed=78, limits={"max_epochs": 3})
    fit(tmp_path / "straight", ckpt_path=whole / "epoch1.ckpt", seed=79, limits={"max_epochs": 3})
    assert_same_run(tmp_path / "on" / "epoch2.ckpt", tmp_path / "straight" / "epoch2.ckpt")


def test_rates_are_counted_from_the_resume(tmp_path, whole):
    statistics, bar = EpisodeStatistics(), RunProgressBar()
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append((statistics._since[1:], bar._counted[1]))

    callbacks = [statistics, bar, Watch()]
    trainer = fit(tmp_path, ckpt_path=whole / "mid333.ckpt", callbacks=callbacks, show=True)
    # 49 env steps without an update, then one a step
    assert seen[0] == ((382, 333), 333)
    assert trainer.global_step == 551


def test_all_checkpoints_of_a_run_load_as_plain_values(whole):
    paths = list(whole.glob("*.ckpt"))
    assert len(paths) == 6
    for path in paths:
        envs = torch.load(path, weights_only=True)["DQNDataModule"]["train"]["under_way"]["envs"]
        assert len(envs["seeds"]) == len(envs["actions"]) == 1


def test_the_memory_is_saved_once(whole):
    # Lightning saves the state of what it takes for a loader with one
    assert load(whole / "epoch0.ckpt")["loops"]["fit_loop"]["state_dict"] == {}


def test_what_only_watches_may_change(tmp_path, whole):
    fit(tmp_path, ckpt_path=whole / "epoch0.ckpt", eval_episodes=3, eval_max_steps=20, save_memory=False)
    one, other = (load(folder / "epoch1.ckpt")["state_dict"] for folder in (whole, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def register(limit, *wrappers):
    """The same id for another environment."""
    gym.registry.pop("TestChanging-v0", None)
    gym.register(
        "TestChanging-v0",
        lambda **kwargs: [env := CartPoleEnv(**kwargs), *[env := wrapper(env) for wrapper in wrappers]][-1],
        max_episode_steps=limit,
    )


def test_a_checkpoint_of_another_wrapper_chain_or_time_limit_is_rejected(tmp_path):
    register(100)
    fit(tmp_path, env_id="TestChanging-v0", limits={"max_epochs": 1})
    for change in ((90,), (100, Unrepeatable)):
        register(*change)
        with pytest.raises(MisconfigurationException, match=r"env\.(max_episode_steps|layers)="):
            fit(tmp_path, env_id="TestChanging-v0", ckpt_path=tmp_path / "epoch0.ckpt")


@pytest.mark.parametrize("lost", ["all", "memory"])
def test_a_memory_that_got_lost_is_an_error(tmp_path, whole, lost):
    checkpoint = load(whole / "epoch0.ckpt")
    if lost == "all":
        del checkpoint["DQNDataModule"]
    else:
        del checkpoint["DQNDataModule"]["train"]["memory"]
    torch.save(checkpoint, tmp_path / "lost.ckpt")
    with pytest.raises(CheckpointError, match=r"DQNDataModule\S* is missing"):
        fit(tmp_path, ckpt_path=tmp_path / "lost.ckpt")


def test_a_memory_left_out_on_purpose_is_warmed_up_again(tmp_path, messages):
    first = fit(tmp_path, save_memory=False, limits={"max_epochs": 1})
    assert "memory" not in load(tmp_path / "epoch0.ckpt")["DQNDataModule"]["train"]
    resumed = fit(tmp_path, save_memory=False, ckpt_path=tmp_path / "epoch0.ckpt")
    (reported,) = [line for line in messages if line.startswith("Resumed")]
    assert "with 0 transitions" in reported
    assert "save_memory=False" in reported
    assert "warm-up of 50 env steps" in reported
    assert resumed.datamodule.env_steps == 600
    # none until 50 env steps are played
    assert resumed.global_step - first.global_step == 300 - 49


def test_environments_that_do_not_repeat_their_episodes_are_announced_and_cut(tmp_path, messages):
    register(100, Unrepeatable)
    first = fit(tmp_path, env_id="TestChanging-v0", num_envs=2, limits={"max_epochs": 1})
    collector = first.datamodule.train_dataset.collector
    cut = collector._lengths > 0
    assert cut.any(), "an episode is under way"
    played = len(first.datamodule.episodes)
    second = fit(tmp_path, env_id="TestChanging-v0", num_envs=2, ckpt_path=tmp_path / "epoch0.ckpt")
    (line,) = [line for line in messages if line.startswith("Environments")]
    assert f"Environments {np.flatnonzero(cut).tolist()} did not repeat their episodes" in line
    assert second.datamodule.env_steps in {599, 600}
    # what was cut is no episode of the history, and the next ones begin with their first step
    assert second.datamodule.episodes.returns[:played] == first.datamodule.episodes.returns
    assert sum(second.datamodule.episodes.lengths[played:]) <= 600 - first.datamodule.env_steps


def test_vector_environments_without_a_state_are_announced(tmp_path, messages):
    cartpole = gym.make_vec("CartPole-v1", 1, "vector_entry_point").unwrapped.__class__
    gym.registry.pop("TestForeign-v0", None)
    gym.register("TestForeign-v0", CartPoleEnv, vector_entry_point=type("Foreign", (cartpole,), {}))
    options = {"env_id": "TestForeign-v0", "num_envs": 2, "vectorization": "vector_entry_point"}
    fit(tmp_path, **options, limits={"max_epochs": 1})
    (line,) = [line for line in messages if line.startswith("Checkpoints hold no environments")]
    assert "Foreign" in line
    assert "under_way" not in load(tmp_path / "epoch0.ckpt")["DQNDataModule"]["train"]
    fit(tmp_path, **options, ckpt_path=tmp_path / "epoch0.ckpt")
    (line,) = [line for line in messages if line.startswith("Resumed")]
    assert "kept as truncated" in line


@pytest.mark.parametrize("num_envs", [1, 3])
def test_nothing_stored_crosses_a_reset_wherever_it_was_resumed(tmp_path, num_envs):
    # TimeLimit cuts at 5 what ends by itself after 1 to 8 steps
    dataset = countdown(num_envs)
    under_way = resetting = 0
    account = [[] for _ in range(num_envs)]
    for seed in range(40):
        take(dataset, 3)
        for steps, env, written in zip(account, dataset.envs.envs, written_by(dataset), strict=True):
            # a replay writes the last episode down again
            steps.extend(written[: len(written) - env.episode_log.length])
        torch.save(dataset.state_dict(), tmp_path / "state")
        resetting += int(dataset.collector.resetting.sum())
        under_way += int((dataset.collector._lengths > 0).sum())
        dataset = countdown(num_envs, seed=seed)
        dataset.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert min(under_way, resetting) > 5, "stopped in mid-episode and before a reset"
    written = [steps + rest for steps, rest in zip(account, written_by(dataset), strict=True)]
    fifth = {one.terminated for steps in written for one in steps if one.next_observation[1] == 5}
    assert fifth == {True, False}
    # the environments' own account: a cut bootstraps from the true last one
    assert transitions(dataset.memory) == one_step(written)


@pytest.mark.parametrize("vectorization", ["sync", "vector_entry_point"])
def test_a_time_limit_in_a_vector_form_bootstraps_after_a_resume(tmp_path, vectorization):
    def make():
        envs = make_vector_env(EnvSettings("CartPole-v1", {"max_episode_steps": 12}), 3, vectorization)
        return make_dataset(envs, lambda observation, rng: (observation[:, 2] > 0).astype(np.int64))

    dataset = make()
    for _ in range(20):
        take(dataset, 7)
        torch.save(dataset.state_dict(), tmp_path / "state")
        dataset = make()
        dataset.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    straight = make()
    take(straight, 140)
    assert transitions(dataset.memory) == transitions(straight.memory)
    assert dataset.episodes == straight.episodes
    lengths = set(dataset.episodes.lengths)
    assert max(lengths) == 12
    discounts = {round(row[3], 5) for row in transitions(dataset.memory)}
    assert 0.9 in discounts


@pytest.mark.parametrize("mode", ["SameStep", "Disabled"])
def test_other_ways_to_reset_are_rejected(mode):
    name = f"Test{mode}-v0"

    class Vector(gym.make_vec("CartPole-v1", 1, "vector_entry_point").unwrapped.__class__):
        metadata = {"autoreset_mode": gym.vector.AutoresetMode(mode)}  # noqa: RUF012  as Gymnasium declares it

    gym.register(name, CartPoleEnv, vector_entry_point=Vector)
    with pytest.raises(ValueError, match="only NEXT_STEP is supported"):
        make_vector_env(EnvSettings(name), 2, "vector_entry_point")


def test_a_module_made_from_a_checkpoint_starts_with_generators_of_its_own(tmp_path, whole):
    weights_only = Path(whole / "epoch0.ckpt")
    model, _ = make_pair()
    model.on_load_checkpoint(load(weights_only))
    assert model.rng_state is None
