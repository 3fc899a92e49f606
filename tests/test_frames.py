"""Stacks that are made at sampling against whole stacks, stored as the environments gave them; and where frames lie."""

import copy
import gc
import shutil
import tempfile
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import FrameStackObservation
from hypothesis import given, settings
from hypothesis import strategies as st
from test_replay import (
    BOTH,
    GAMMA,
    RUNNING,
    TERMINATED,
    TRUNCATED,
    Reference,
    Stream,
    assert_same_to_the_bit,
    draw_all,
    play,
)

from lightning_dqn.replay import ReplayMemory, UniformSampler
from lightning_dqn.resume.content import CheckpointError
from lightning_dqn.sampling.prioritized import PrioritizedSampler
from lightning_dqn.storage.memory_size import MemorySize

FRAME = (1, 2)
HERE = Path(tempfile.gettempdir())
PLACES = {"ram": {}, "device": {"device": torch.device("cpu")}, "folder": {"folder": HERE}}


def stacks_of(k, frame=FRAME):
    return spaces.Box(0, 255, (k, *frame), np.uint8)


def frame_of(number):
    # 0 stands for no frame; 200 * 255 numbers can be told apart
    return np.array([[number // 200, number % 200 + 1]], np.uint8)


def number_of(frame):
    return 200 * int(frame[0, 0]) + int(frame[0, 1]) - 1


class StackStream(Stream):
    """A stream of stacks as `FrameStackObservation` makes them; each is kept whole, by the number of its last frame."""

    def __init__(self, memory, reference, k):
        super().__init__(memory, reference)
        self.frames = [deque(maxlen=k) for _ in range(memory.num_envs)]
        self.whole = {}

    def observe(self, numbers, starts):
        for number, begins, frames in zip(numbers, starts, self.frames, strict=True):
            if begins:
                frames.extend([np.zeros(FRAME, np.uint8)] * frames.maxlen)
            frames.append(frame_of(number))
            self.whole[number] = np.stack(frames)
        return np.stack([self.whole[number] for number in numbers])


def make_stream(capacity, num_envs, n_step, k, seed=0, **arguments):
    memory = ReplayMemory(
        capacity=capacity,
        num_envs=num_envs,
        observation_space=stacks_of(k),
        gamma=GAMMA,
        n_step=n_step,
        frame_stack=k,
        seed=seed,
        **arguments,
    )
    return StackStream(memory, Reference(capacity, num_envs, n_step), k)


def played_stream(capacity, num_envs, n_step, k, *, steps=60, **arguments):
    """A stream with an interruption halfway."""
    stream = make_stream(capacity, num_envs, n_step, k, **arguments)
    for half in range(2):
        stream.begin()
        play(stream, steps // 2, seed=half)
    return stream


def assert_equals_reference(stream):
    expected = stream.reference.drawable()
    assert len(stream.memory) == len(expected)
    if not expected:
        return
    batch = draw_all(stream.memory)
    numbers = [number_of(stack[-1]) for stack in batch.observation[0].numpy()]
    assert sorted(numbers) == sorted(expected)
    ordered = [expected[number] for number in numbers]
    following = [stream.whole[one.next_observation] for one in ordered]
    assert np.array_equal(batch.observation[0], [stream.whole[number] for number in numbers])
    assert np.array_equal(batch.next_observation[0], following)
    assert batch.observation.dtype == batch.next_observation.dtype == torch.uint8
    assert batch.action[0].tolist() == [one.action for one in ordered]
    torch.testing.assert_close(batch.reward[0], torch.tensor([one.reward for one in ordered]))
    torch.testing.assert_close(batch.discount[0], torch.tensor([one.discount for one in ordered]))


@st.composite
def streams(draw):
    num_envs = draw(st.integers(1, 5))
    outcome = st.sampled_from([RUNNING] * 7 + [TERMINATED, TRUNCATED, BOTH])
    outcomes = st.lists(outcome, min_size=num_envs, max_size=num_envs)
    interrupted = st.sampled_from([False] * 9 + [True])
    events = draw(st.lists(st.tuples(interrupted, outcomes), min_size=1, max_size=40))
    options = draw(st.integers(1, 17)), num_envs, draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2, 4]))
    return options, draw(st.sampled_from(sorted(PLACES))), events


@settings(max_examples=200, deadline=None)
@given(streams())
def test_every_drawable_stack_equals_the_one_that_was_seen(drawn):
    options, place, events = drawn
    stream = make_stream(*options, **PLACES[place])
    stream.begin()
    for interrupted, outcomes in events:
        if interrupted:
            stream.begin()
            assert_equals_reference(stream)
        stream.step(outcomes)
        assert_equals_reference(stream)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("num_envs", [1, 2, 5])
def test_a_ring_of_frames_that_wrapped_many_times_equals_what_was_seen(num_envs, n_step, k, place):
    assert_equals_reference(played_stream(13, num_envs, n_step, k, steps=150, **PLACES[place]))


def test_a_first_stack_and_a_last_one_by_hand():
    stream = make_stream(10, 1, 1, 3)
    # frames 1 2 3 of an episode that ends there, 4 5 of the next; the step from 3 to 4 only resets
    stream.begin()
    for outcome in (RUNNING, TERMINATED, RUNNING, RUNNING):
        stream.step([outcome])
    batch = draw_all(stream.memory)

    def numbers(stacks):
        return [[number_of(frame) if frame.any() else 0 for frame in stack] for stack in stacks[0].numpy()]

    assert numbers(batch.observation) == [[0, 0, 1], [0, 1, 2], [0, 0, 4]]
    assert numbers(batch.next_observation) == [[0, 1, 2], [1, 2, 3], [0, 4, 5]]


class Counting(gym.Env):
    """Frames that tell how often this environment stepped; episodes of all lengths from 1 on, of both kinds of end."""

    observation_space = spaces.Box(0, 255, (2, 3), np.uint8)
    action_space = spaces.Discrete(3)

    def __init__(self, first):
        self.frame, self.length = first, 0

    def show(self):
        self.frame += 1
        self.left -= 1
        return np.full((2, 3), self.frame % 255 + 1, np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length = self.length % 7 + 1
        self.left = self.length + 1
        return self.show(), {}

    def step(self, action):
        observation = self.show()
        ends = self.left == 0
        return observation, float(action), ends and self.length % 2 == 0, ends and self.length % 2 == 1, {}


def assert_sampled_as_seen(envs, k, steps, capacity, **arguments):
    """Play at random and compare, by their rows, all that can be drawn with what was seen at the time."""
    space, n = envs.single_observation_space, envs.num_envs
    memory = ReplayMemory(
        capacity=capacity, num_envs=n, observation_space=space, gamma=0.5, frame_stack=k, seed=0, **arguments
    )
    rng = np.random.default_rng(0)
    observation, _ = envs.reset(seed=3)
    memory.begin(observation)
    seen, steps_taken, ended, ends = [observation.copy()], [], np.zeros(n, bool), 0
    for _ in range(steps):
        action = rng.integers(envs.single_action_space.n, size=n)
        observation, reward, terminated, truncated, _ = envs.step(action)
        memory.append(action, reward, terminated, truncated, observation)
        seen.append(observation.copy())
        steps_taken.append((action, reward, terminated, ended))
        ended = terminated | truncated
        ends += ended.sum()
    envs.close()
    batch = draw_all(memory)
    slots, envs_of = np.divmod(batch.index[0].numpy(), n)
    # the last time that a slot was written
    times = slots + (steps - 1 - slots) // memory._slots * memory._slots
    for i, (time, env) in enumerate(zip(times, envs_of, strict=True)):
        action, reward, terminated, resets = (each[env] for each in steps_taken[time])
        assert not resets
        assert np.array_equal(batch.observation[0, i], seen[time][env])
        assert np.array_equal(batch.next_observation[0, i], seen[time + 1][env])
        assert (batch.action[0, i], batch.reward[0, i], batch.discount[0, i]) == (action, reward, 0.5 * ~terminated)
    assert ends > 0
    assert len(times) == sum((~ended).sum() for *_, ended in steps_taken[-capacity // n :])


@pytest.mark.parametrize("k", [2, 4])
def test_stacks_of_gymnasium_are_sampled_as_they_were_seen(k):
    def make(first):
        return lambda: FrameStackObservation(Counting(first), k, padding_type="zero")

    assert_sampled_as_seen(SyncVectorEnv([make(0), make(100), make(200)]), k, 320, 150)


@pytest.mark.integration
@pytest.mark.parametrize("place", PLACES)
def test_stacks_of_the_native_atari_environments_are_sampled_as_they_were_seen(place):
    module = pytest.importorskip("ale_py.vector_env")
    envs = module.AtariVectorEnv("breakout", num_envs=2, num_threads=1, episodic_life=True)
    assert_sampled_as_seen(envs, 4, 180, 60, **PLACES[place])


@pytest.mark.parametrize("saved_from", PLACES)
@pytest.mark.parametrize("loaded_into", PLACES)
@pytest.mark.parametrize(("n_step", "steps"), [(1, 3), (3, 11), (1, 60)])
def test_frames_from_a_checkpoint_resume_bitwise_in_any_place(tmp_path, saved_from, loaded_into, n_step, steps):
    stream = make_stream(23, 2, n_step, 4, seed=1, **PLACES[saved_from])
    stream.begin()
    play(stream, steps)
    torch.save(stream.memory.state_dict(), tmp_path / "memory.pt")
    state = torch.load(tmp_path / "memory.pt", weights_only=True)
    assert all(rows.device.type == "cpu" for rows in state["rows"].values())
    twin = make_stream(23, 2, n_step, 4, seed=2, **PLACES[loaded_into])
    twin.memory.load_state_dict(state)
    # the environments stand where the others stand, only the memory came out of the file
    twin.now, twin.count, twin.resetting = stream.now, stream.count, stream.resetting
    twin.frames, twin.whole, twin.reference = copy.deepcopy((stream.frames, stream.whole, stream.reference))
    for seed in range(4):
        if len(stream.memory):
            assert_same_to_the_bit(stream.memory.sample(2, 50), twin.memory.sample(2, 50))
        for one in (stream, twin):
            assert_equals_reference(one)
            play(one, 5, seed)
            if seed == 2:
                one.begin()


@pytest.mark.parametrize("place", PLACES)
def test_observations_that_are_no_stacks_are_stored_in_any_place_too(place):
    memory = ReplayMemory(
        capacity=5, num_envs=1, observation_space=spaces.Box(-1, 1, (2,), np.float64), gamma=GAMMA, **PLACES[place]
    )
    # what environments hand out may be read-only, and in double precision
    observations = [np.array([[number / 3, number]]) for number in range(9)]
    for observation in observations:
        observation.setflags(write=False)
    memory.begin(observations[0])
    for observation in observations[1:]:
        memory.append(np.zeros(1, int), np.zeros(1), np.zeros(1, bool), np.zeros(1, bool), observation)
    batch = draw_all(memory)
    first = np.concatenate(observations).astype(np.float32)
    assert sorted(batch.observation[0, :, 1].tolist()) == [3, 4, 5, 6, 7]
    numbers = batch.observation[0, :, 1].long().numpy()
    assert np.array_equal(batch.observation[0], first[numbers])
    assert np.array_equal(batch.next_observation[0], first[numbers + 1])


@pytest.mark.parametrize("n_step", [1, 3])
def test_prioritised_rows_have_their_stacks(n_step):
    stream = played_stream(17, 2, n_step, 4, sampler=PrioritizedSampler)
    assert_equals_reference(stream)
    rows = draw_all(stream.memory).index[0].numpy()
    stream.memory.sampler.update_priorities(rows, np.linspace(0, 9, len(rows)))
    batch = stream.memory.sample(1, 64)
    assert set(batch.index[0].tolist()) <= set(rows.tolist())
    for stack in batch.observation[0].numpy():
        assert np.array_equal(stack, stream.whole[number_of(stack[-1])])


@pytest.mark.parametrize(("k", "n_step"), [(1, 1), (4, 1), (4, 3)])
def test_no_updates_give_an_empty_batch_of_stacks(k, n_step):
    batch = played_stream(10, 2, n_step, k).memory.sample(0, 7)
    assert batch.observation.shape == batch.next_observation.shape == (0, 7, k, *FRAME)


def test_a_file_of_frames_has_no_name_and_no_two_memories_share_it(tmp_path):
    one, other = (make_stream(30, 2, 1, 4, folder=tmp_path) for _ in range(2))
    one.begin()
    play(one, 40)
    other.begin()
    play(other, 20, seed=5)
    assert list(tmp_path.iterdir()) == []
    assert_equals_reference(one)
    assert_equals_reference(other)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_a_file_of_frames_is_gone_with_its_memory(tmp_path):
    stream = make_stream(1000, 2, 1, 4, folder=tmp_path)
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    del stream
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"frame_stack": 0}, r"frame_stack=0: must be in \[1, 256\]"),
        ({"frame_stack": 3}, r"observations have shape \(4, 1, 2\), \(3, ...\) is needed"),
        ({"device": torch.device("cpu"), "folder": HERE}, "memory_folder="),
        ({"folder": HERE / "not there"}, "not there: no such folder"),
    ],
)
def test_a_memory_of_frames_that_can_not_be_is_rejected(arguments, words):
    arguments = {"capacity": 9, "num_envs": 1, "observation_space": stacks_of(4), "gamma": 0.9} | arguments
    with pytest.raises(ValueError, match=words):
        ReplayMemory(**arguments)


def test_stacks_that_do_not_begin_with_zeros_are_rejected():
    envs = SyncVectorEnv([lambda: FrameStackObservation(Counting(0), 4)])
    space = envs.single_observation_space
    memory = ReplayMemory(capacity=9, num_envs=1, observation_space=space, gamma=GAMMA, frame_stack=4)
    with pytest.raises(ValueError, match=r'frame_stack=4: .*padding_type="zero"'):
        memory.begin(envs.reset()[0])


def test_frames_of_a_checkpoint_with_another_number_of_frames_are_rejected():
    state = played_stream(10, 1, 1, 2).memory.state_dict()
    with pytest.raises(CheckpointError, match=r"memory\.frame_stack"):
        make_stream(10, 1, 1, 4).memory.load_state_dict(state)


ATARI = stacks_of(4, (84, 84))


@pytest.mark.parametrize("num_envs", [1, 8, 128])
@pytest.mark.parametrize("sampler", [UniformSampler, PrioritizedSampler])
def test_a_million_frames_take_seven_gigabytes(num_envs, sampler):
    memory = ReplayMemory(
        capacity=10**6, num_envs=num_envs, observation_space=ATARI, gamma=0.99, frame_stack=4, n_step=3, sampler=sampler
    )
    # zeros that nobody has written take no memory: this is what will be needed
    rows = [memory._observations._slots, *memory._written.values()]
    sampled = memory._slots * num_envs * memory.sampler.bytes_per_row()
    taken = sum(array.nbytes for array in rows) + memory._drawable.nbytes + sampled
    assert taken < 7.1e9 * 1.02
    size = MemorySize(10**6, ATARI, memory.sampler.bytes_per_row(), frame_stack=4)
    assert size.ram == pytest.approx(taken, rel=0.002)


CUDA = torch.device("cuda:1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "memory: 1,000,000 transitions, 7.08 GB in RAM"),
        ({"device": torch.device("cpu")}, "memory: 1,000,000 transitions, 7.08 GB in RAM"),
        ({"device": CUDA}, "memory: 1,000,000 transitions, 7.06 GB on cuda:1 and 24 MB in RAM"),
        ({"folder": Path("/data")}, "memory: 1,000,000 transitions, 7.06 GB in a file in /data and 24 MB in RAM"),
    ],
)
def test_the_size_of_a_memory_is_described(arguments, words):
    assert MemorySize(10**6, ATARI, 8, frame_stack=4, **arguments).describe() == words


def test_the_size_of_a_small_memory_is_described():
    assert MemorySize(10_000, spaces.Box(-1, 1, (4,), np.float32), 8).describe() == (
        "memory: 10,000 transitions, 390 kB in RAM"
    )


def test_a_memory_that_does_not_fit_into_its_place_is_rejected(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 10**9, 16 * 10**9))
    monkeypatch.setattr("lightning_dqn.storage.memory_size.available_ram", lambda: 6 * 10**9)

    def check(capacity, **place):
        MemorySize(capacity, ATARI, 8, frame_stack=4, **place).check()

    with pytest.raises(ValueError, match=r"needs 7,080,000,000 bytes, more than 80% of the 6,000,000,000 .*lower it"):
        check(10**6)
    with pytest.raises(ValueError, match=r"needs 7,056,000,000 bytes, .* 8,000,000,000 that are available on cuda:1"):
        check(10**6, device=CUDA)
    with pytest.raises(ValueError, match=r"needs 1,411,200,000 bytes, .* 1,000,000,000 that are available in /"):
        check(200_000, folder=tmp_path)
    check(200_000)
    check(900_000, device=CUDA)
    check(100_000, folder=tmp_path)
