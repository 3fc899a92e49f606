"""Snapshots of environments: what is put back goes on to the bit, and where it would not, the proof finds it."""

import io
import itertools
import os
import random
import subprocess
import sys
import warnings
from collections import deque
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import (
    DelayObservation,
    FlattenObservation,
    FrameStackObservation,
    NormalizeObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
    StickyAction,
    TimeAwareObservation,
    TransformReward,
)
from gymnasium.wrappers import vector as vector_wrappers
from toys import Toy, through_a_checkpoint, toys

from lightning_dqn.snapshots import CannotRestoreError, CannotSnapshotError, prove, restore, snapshot

IDS = [
    "CartPole-v1",
    "Acrobot-v1",
    "MountainCar-v0",
    "Taxi-v4",
    "FrozenLake-v1",
    "CliffWalking-v1",
    "Blackjack-v1",
]


def actions_for(envs, count, seed=0):
    """The same random actions for the same seed, from a space of their own."""
    space = gym.vector.utils.batch_space(envs.single_action_space, envs.num_envs)
    space.seed(seed)
    return [space.sample() for _ in range(count)]


def play(envs, actions):
    """What the steps give, to the bit."""
    outcomes = []
    for action in actions:
        observation, reward, terminated, truncated, _ = envs.step(action)
        parts = observation if isinstance(observation, tuple) else (observation,)
        outcomes.append([np.asarray(part).tobytes() for part in (*parts, reward, terminated, truncated)])
    return outcomes


def assert_goes_on(make, before, after=400, chance=True):
    """Play, snapshot, put it into new environments; both must give the same from then on.

    Where there is `chance`, another episode must not.
    """
    envs, again = make(), make()
    envs.reset(seed=3)
    play(envs, actions_for(envs, before))
    state = through_a_checkpoint(snapshot(envs))
    actions = actions_for(envs, after, seed=1)
    expected = play(envs, actions)
    restore(again, state)
    assert play(again, actions) == expected
    again.reset(seed=4)
    assert not chance or play(again, actions) != expected
    envs.close()
    again.close()


@pytest.mark.parametrize("before", [0, 7, 1000])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("env_id", IDS)
def test_a_restored_environment_goes_on_to_the_bit(env_id, num_envs, before):
    # 250 > 200: MountainCar and Taxi meet their time limit; 500 of Acrobot's are met by one environment
    after = 510 if num_envs == 1 else 250
    assert_goes_on(lambda: gym.make_vec(env_id, num_envs, "sync"), before, after, chance=env_id != "CliffWalking-v1")


@pytest.mark.parametrize("before", [0, 7, 1000])
def test_an_environment_of_vector_form_goes_on_to_the_bit(before):
    assert_goes_on(lambda: gym.make_vec("CartPole-v1", 4, "vector_entry_point"), before)


@pytest.mark.parametrize("vectorization", ["sync", "vector_entry_point"])
def test_a_snapshot_between_an_episodes_end_and_its_reset_goes_on_to_the_bit(vectorization):
    envs, again = (gym.make_vec("CartPole-v1", 3, vectorization) for _ in range(2))
    envs.reset(seed=0)
    actions = actions_for(envs, 300)
    moments = 0
    for i, action in enumerate(actions[:100]):
        _, _, terminated, _, _ = envs.step(action)
        if terminated.any():
            moments += 1
            restore(again, snapshot(envs))
            # so the next step of one of them only resets
            assert play(again, actions[i + 1 : i + 40]) == play(envs, actions[i + 1 : i + 40])
    assert moments >= 5


def test_a_time_limit_is_met_on_the_same_step():
    def make():
        return gym.make_vec("MountainCar-v0", 2, "sync", max_episode_steps=20)

    envs, again = make(), make()
    envs.reset(seed=0)
    actions = actions_for(envs, 60)
    play(envs, actions[:15])
    restore(again, snapshot(envs))
    # 15 steps are played: the 20th is the 5th from here
    ends = [bool(again.step(action)[3].all()) for action in actions[:6]]
    assert ends == [False, False, False, False, True, False]


@pytest.mark.parametrize(
    "wrapper",
    [
        RecordEpisodeStatistics,
        TimeAwareObservation,
        FlattenObservation,
        NormalizeObservation,
        NormalizeReward,
        lambda env: FrameStackObservation(env, 3),
        lambda env: DelayObservation(env, 2),
        lambda env: StickyAction(env, 0.3),
        lambda env: TransformReward(env, lambda reward: reward * 2),
        lambda env: FrameStackObservation(TimeAwareObservation(RecordEpisodeStatistics(env)), 2),
    ],
    ids=["stats", "time", "flat", "norm", "norm_reward", "stack", "delay", "sticky", "function", "several"],
)
@pytest.mark.parametrize("before", [0, 50])
def test_wrapped_environments_go_on_to_the_bit(wrapper, before):
    assert_goes_on(lambda: gym.make_vec("CartPole-v1", 2, "sync", wrappers=(wrapper,)), before)


@pytest.mark.parametrize(
    "wrapper",
    [vector_wrappers.RecordEpisodeStatistics, vector_wrappers.NormalizeReward, vector_wrappers.NormalizeObservation],
)
@pytest.mark.parametrize("vectorization", ["sync", "vector_entry_point"])
def test_wrapped_vectors_go_on_to_the_bit(wrapper, vectorization):
    assert_goes_on(lambda: wrapper(gym.make_vec("CartPole-v1", 2, vectorization)), 50)


def test_the_statistics_of_episodes_go_on():
    def make():
        return gym.make_vec("CartPole-v1", 1, "sync", wrappers=(RecordEpisodeStatistics,))

    envs, again = make(), make()
    envs.reset(seed=0)
    play(envs, actions_for(envs, 100))
    restore(again, snapshot(envs))
    queue = again.envs[0].return_queue
    assert isinstance(queue, deque)
    assert queue.maxlen == 100
    assert len(queue) >= 2
    assert queue == envs.envs[0].return_queue


class Switching(Toy):
    """Plays by one of two methods, which one is an attribute."""

    def __init__(self, value):
        super().__init__(value)
        self.rule = self.one

    def one(self):
        self.rule = self.two
        return 1.0

    def two(self):
        self.rule = self.one
        return 2.0

    def draw(self):
        return self.rule()


class SamplingItsSpace(Toy):
    """Draws from its own action space, whose generator is made when it is first drawn from."""

    def draw(self):
        return float(self.action_space.sample())


class Part:
    """Of an environment, and no plain value."""

    x = 0


class Unreset(Toy):
    """Makes its parts and attributes in `reset` only."""

    def reset(self, *, seed=None, options=None):
        self.part = Part()
        return super().reset(seed=seed, options=options)

    def draw(self):
        self.part.x += 1
        return self.part.x


@pytest.mark.parametrize("toy", [Switching, SamplingItsSpace, Unreset])
def test_states_in_unusual_places_go_on(toy):
    # the space draws from the operating system's randomness until it is seeded, so only a snapshot can repeat it
    envs, again = toys(None, None, toy=toy), toys(None, None, toy=toy)
    envs.reset(seed=0)
    actions = [np.zeros(2, dtype=np.int64)] * 30
    play(envs, actions[:5])
    restore(again, through_a_checkpoint(snapshot(envs)))
    assert play(again, actions) == play(envs, actions)
    assert prove(lambda: toys(None, toy=toy), seed=0) is None


def test_an_attribute_that_was_not_there_is_gone_after_a_restore():
    envs, again = toys(None), toys(None)
    again.envs[0].extra = 1
    restore(again, snapshot(envs))
    assert not hasattr(again.envs[0], "extra")


def test_a_snapshot_is_a_copy():
    envs, again, late = (gym.make_vec("CartPole-v1", 2, "sync") for _ in range(3))
    envs.reset(seed=0)
    state = snapshot(envs)
    restore(again, state)
    actions = actions_for(envs, 100)
    expected = play(envs, actions)
    assert play(again, actions) == expected
    restore(late, state)
    assert play(late, actions) == expected


def test_a_snapshot_goes_on_to_the_bit_in_another_process(tmp_path):
    script = """
import sys, torch, gymnasium as gym
from test_snapshots import actions_for, play
from lightning_dqn.snapshots import restore
envs = gym.make_vec("Taxi-v4", 2, "sync")
restore(envs, torch.load(sys.argv[1], weights_only=True))
torch.save([part for step in play(envs, actions_for(envs, 300)) for part in map(list, step)], sys.argv[1])
"""
    envs = gym.make_vec("Taxi-v4", 2, "sync")
    envs.reset(seed=0)
    play(envs, actions_for(envs, 150, seed=1))
    torch.save(snapshot(envs), tmp_path / "state")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "123"}
    subprocess.run([sys.executable, "-c", script, tmp_path / "state"], env=env, check=True)
    there = torch.load(tmp_path / "state", weights_only=True)
    assert there == [part for step in play(envs, actions_for(envs, 300)) for part in map(list, step)]


def test_taking_a_snapshot_disturbs_nothing():
    envs, undisturbed = (gym.make_vec("CartPole-v1", 2, "sync") for _ in range(2))
    actions = actions_for(envs, 100)
    for each in (envs, undisturbed):
        each.reset(seed=0)
    outcomes = []
    for action in actions:
        snapshot(envs)
        outcomes += play(envs, [action])
    assert outcomes == play(undisturbed, actions)


def test_a_snapshot_holds_plain_values_and_one_tensor_only():
    envs = gym.make_vec("Blackjack-v1", 3, "sync", wrappers=(RecordEpisodeStatistics,))
    envs.reset(seed=0)
    state = snapshot(envs)
    assert {key: type(value) for key, value in state.items()} == {
        "version": int,
        "num_envs": int,
        "nodes": str,
        "memory": torch.Tensor,
    }
    assert state["memory"].dtype == torch.uint8


class Keyed(Toy):
    """Keeps its arguments, as environments do."""

    def __init__(self, token, options):
        super().__init__([token, options])
        self.token = token


def test_arguments_of_the_environments_are_put_back_but_not_written_down():
    gym.register("Keyed-v0", entry_point=Keyed)
    try:
        make_kwargs = {"token": "sw0rdfish", "options": {"keys": ["0ther"]}}
        envs, again = (gym.make_vec("Keyed-v0", 2, "sync", **make_kwargs) for _ in range(2))
        envs.reset(seed=0)
        file = io.BytesIO()
        torch.save(snapshot(envs), file)
        assert b"sw0rdfish" not in file.getvalue()
        assert b"0ther" not in file.getvalue()
        again.envs[1].unwrapped.token = "lost"
        restore(again, snapshot(envs))
        assert again.envs[1].unwrapped.token == "sw0rdfish"
        assert again.envs[1].unwrapped.value == ["sw0rdfish", {"keys": ["0ther"]}]
    finally:
        gym.registry.pop("Keyed-v0")


def test_environments_in_processes_of_their_own_are_refused():
    envs = gym.make_vec("CartPole-v1", 1, "async")
    try:
        with pytest.raises(CannotSnapshotError, match="vectorization=sync"):
            snapshot(envs)
    finally:
        envs.close()


def test_other_environments_are_refused_by_what_is_different():
    state = snapshot(gym.make_vec("CartPole-v1", 2, "sync"))
    with pytest.raises(CannotRestoreError, match=r"num_envs=3: the snapshot is of 2"):
        restore(gym.make_vec("CartPole-v1", 3, "sync"), state)
    with pytest.raises(CannotRestoreError, match=r"CartPoleEnv there, these environments have a .*MountainCarEnv"):
        restore(gym.make_vec("MountainCar-v0", 2, "sync"), state)
    with pytest.raises(CannotRestoreError, match=r"envs\[0\]: the snapshot has .*TimeLimit there, .* a .*TimeAware"):
        restore(gym.make_vec("CartPole-v1", 2, "sync", wrappers=(TimeAwareObservation,)), state)
    with pytest.raises(CannotRestoreError, match="version 0"):
        restore(gym.make_vec("CartPole-v1", 2, "sync"), {**state, "version": 0})


COUNTER = itertools.count()


class Global(Toy):
    """Its state is a global variable."""

    def draw(self):
        return next(COUNTER)


class GlobalGenerators(Toy):
    """Draws from the generators of the process."""

    def draw(self):
        return np.random.rand() + random.random() + float(torch.rand(()))


class Foreign(Toy):
    """Its state is on its class."""

    def draw(self):
        Foreign.count = getattr(Foreign, "count", 0) + 1
        return Foreign.count


class OnlyAtReset(Toy):
    """Its state is global, and shows only in what an episode begins with."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.array([next(COUNTER)], dtype=np.float64), {}


@pytest.mark.parametrize("toy", [Global, GlobalGenerators, Foreign, OnlyAtReset])
def test_state_outside_of_the_environment_is_found_by_the_proof(toy):
    sentence = prove(lambda: toys(None, None, toy=toy), seed=0)
    assert "observations differ" in sentence


class Breaking(Toy):
    """Raises when it has drawn often enough."""

    def draw(self):
        self.value = (self.value or 0) + 1
        if self.value > 20:
            raise RuntimeError("the wheel came off")
        return 0.0


class Apart(Toy):
    """Keeps an iterator out of snapshots, and makes it anew by how far it was."""

    not_in_snapshots: ClassVar = {"numbers"}

    def __init__(self, value):
        super().__init__(value)
        self.numbers, self.drawn = itertools.count(), 0

    def draw(self):
        self.drawn += 1
        return next(self.numbers)

    def catch_up(self):
        if self.drawn != self.value:
            raise ValueError(f"{self.drawn} is not {self.value}")
        self.numbers = itertools.count(self.drawn)


def test_what_an_object_keeps_out_of_a_snapshot_it_sees_to_itself():
    envs, again = toys(5, toy=Apart), toys(5, toy=Apart)
    envs.reset(seed=0)
    again.reset(seed=0)
    actions = [np.zeros(1, dtype=np.int64)] * 5
    while envs.envs[0].drawn < 5:
        play(envs, actions[:1])
    restore(again, through_a_checkpoint(snapshot(envs)))
    assert next(again.envs[0].numbers) == 5
    play(envs, actions)
    with pytest.raises(CannotRestoreError, match=r"Apart: \d+ is not 5"):
        restore(again, snapshot(envs))


def test_what_is_refused_or_breaks_is_a_sentence_of_the_proof():
    assert "envs[0].value is a generator" in prove(lambda: toys(iter(i for i in [])), seed=0).replace("builtins.", "")
    assert "the wheel came off" in prove(lambda: toys(None, toy=Breaking), seed=0)


@pytest.mark.parametrize("env_id", IDS)
def test_registered_environments_are_proved(env_id):
    assert prove(lambda: gym.make_vec(env_id, 2, "sync"), seed=0) is None


def test_a_proof_leaves_no_trace():
    made = []

    def make():
        made.append(gym.make_vec("CartPole-v1", 2, "sync"))
        return made[-1]

    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    expected = (torch.rand(()).item(), np.random.rand(), random.random())
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prove(make, seed=0) is None
        assert prove(lambda: toys(None, toy=GlobalGenerators), seed=0)
    assert (torch.rand(()).item(), np.random.rand(), random.random()) == expected
    assert len(made) == 2
    assert all(envs.closed for envs in made)


def test_copies_are_closed_when_the_proof_fails_or_the_second_can_not_be_made():
    made = []

    def make():
        if len(made) == 1:
            raise OSError("no room")
        made.append(toys(None))
        return made[0]

    with pytest.raises(OSError, match="no room"):
        prove(make, seed=0)
    assert made[0].closed
