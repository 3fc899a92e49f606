"""The memory against a plain reference: per environment, lists of episodes, and episodes are lists of steps."""

import math
import os
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dqn.replay import ReplayMemory, Transition, UniformSampler
from lightning_dqn.resume.content import CheckpointError

GAMMA = 0.9
BOX = spaces.Box(-np.inf, np.inf, (2,), np.float32)
# what a reset row carries: an environment ignores this action and gives no reward, so neither may ever be seen
IGNORED_ACTION, NO_REWARD = 99, 777.0
RUNNING, TERMINATED, TRUNCATED, BOTH = "running", "terminated", "truncated", "both"


class Step(NamedTuple):
    observation: int
    action: int
    reward: float
    terminated: bool
    truncated: bool
    next_observation: int

    @property
    def ends(self) -> bool:
        return self.terminated or self.truncated


class Expected(NamedTuple):
    action: int
    reward: float
    discount: float
    next_observation: int


class Reference:
    """Remembers everything: episodes as lists of steps, and for each time slot which step of which episode it was."""

    def __init__(self, capacity: int, num_envs: int, n_step: int) -> None:
        self.kept_slots = math.ceil(capacity / num_envs)
        self.n_step = n_step
        self.slots: list[list[tuple[list[Step], int] | None]] = [[] for _ in range(num_envs)]

    def interrupt(self) -> None:
        """Cut the running episodes; their last observations take a slot that is no step."""
        for slots in self.slots:
            if slots and slots[-1] is not None:
                episode = slots[-1][0]
                episode[-1] = episode[-1]._replace(truncated=episode[-1].truncated or not episode[-1].ends)
            if slots:
                slots.append(None)

    def add(self, env: int, step: Step | None) -> None:
        """The next slot of an environment: a step, or None where the environment only reset."""
        slots = self.slots[env]
        before = slots[-1] if slots else None
        episode = before[0] if before is not None and not before[0][-1].ends else []
        if step is not None:
            episode.append(step)
        slots.append((episode, len(episode) - 1) if step is not None else None)

    def drawable(self) -> dict[int, Expected]:
        """By first observation: all that may be drawn now."""
        found = {}
        for slots in self.slots:
            # the slots of which all n steps are played, and of them the last ceil(capacity / N)
            complete = slots[: max(len(slots) - (self.n_step - 1), 0)]
            for slot in complete[-self.kept_slots :]:
                if slot is not None:
                    episode, start = slot
                    found[episode[start].observation] = self.transition(episode[start : start + self.n_step])
        return found

    @staticmethod
    def transition(steps: list[Step]) -> Expected:
        reward = sum(GAMMA**j * step.reward for j, step in enumerate(steps))
        discount = 0.0 if steps[-1].terminated else GAMMA ** len(steps)
        return Expected(steps[0].action, reward, discount, steps[-1].next_observation)


class Stream:
    """N environments with NEXT_STEP autoreset whose every observation is a new number; feeds memory and reference."""

    def __init__(self, memory: ReplayMemory, reference: Reference) -> None:
        self.memory, self.reference = memory, reference
        self.now: list[int] = []
        self.resetting = [False] * memory.num_envs
        self.count = 0

    def number(self) -> int:
        self.count += 1
        return self.count

    def observe(self, numbers: list[int], starts: list[bool]) -> np.ndarray:
        """The observations of these numbers, where `starts` says which of them begin an episode."""
        return seen(numbers)

    def begin(self) -> None:
        self.now = [self.number() for _ in self.resetting]
        self.resetting = [False] * len(self.now)
        self.reference.interrupt()
        self.memory.begin(self.observe(self.now, [True] * len(self.now)))

    def step(self, outcomes: list[str]) -> None:
        following = [self.number() for _ in self.now]
        steps = []
        for env, outcome in enumerate(outcomes):
            terminated, truncated = outcome in (TERMINATED, BOTH), outcome in (TRUNCATED, BOTH)
            # reward and action tell the observation they belong to; eighths are exact in float32
            reward, action = self.now[env] / 8, self.now[env] % 7
            step = Step(self.now[env], action, reward, terminated, truncated, following[env])
            self.reference.add(env, None if self.resetting[env] else step)
            steps.append(Step(0, IGNORED_ACTION, NO_REWARD, False, False, 0) if self.resetting[env] else step)
        self.memory.append(
            np.array([step.action for step in steps]),
            np.array([step.reward for step in steps]),
            np.array([step.terminated for step in steps]),
            np.array([step.truncated for step in steps]),
            self.observe(following, self.resetting),
        )
        self.now = following
        self.resetting = [step.ends for step in steps]


def seen(numbers: list[int]) -> np.ndarray:
    return np.array([[number, -number] for number in numbers], np.float32)


def make_stream(capacity: int, num_envs: int, n_step: int, seed: int = 0) -> Stream:
    memory = ReplayMemory(
        capacity=capacity, num_envs=num_envs, observation_space=BOX, gamma=GAMMA, n_step=n_step, seed=seed
    )
    return Stream(memory, Reference(capacity, num_envs, n_step))


def played_stream(capacity: int, num_envs: int, n_step: int, steps: int = 40, seed: int = 0) -> Stream:
    """A stream in which about a step in three ends its episode, with an interruption halfway."""
    stream = make_stream(capacity, num_envs, n_step, seed)
    stream.begin()
    play(stream, steps // 2)
    stream.begin()
    play(stream, steps - steps // 2, seed=1)
    return stream


def play(stream: Stream, steps: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        stream.step(rng.choice([RUNNING, TERMINATED, TRUNCATED], p=[0.7, 0.15, 0.15], size=len(stream.now)).tolist())


def draw_all(memory: ReplayMemory) -> Transition:
    """Each row that can be drawn, once: 40 draws a row miss one of them with a chance of e^-40 only."""
    if not len(memory):
        return memory.sample(0, 1)
    batch = memory.sample(1, 40 * len(memory))
    _, firsts = np.unique(batch.index.numpy(), return_index=True)
    return Transition(*(field[:, firsts] for field in batch))


def assert_equals_reference(stream: Stream) -> None:
    expected = stream.reference.drawable()
    assert len(stream.memory) == len(expected)
    batch = draw_all(stream.memory)
    observations = batch.observation[..., 0].flatten().int().tolist()
    assert sorted(observations) == sorted(expected)
    ordered = [expected[number] for number in observations]
    following = [one.next_observation for one in ordered]
    if not ordered:
        return
    assert torch.equal(batch.observation[0], torch.from_numpy(seen(observations)))
    assert batch.action[0].tolist() == [one.action for one in ordered]
    assert torch.equal(batch.next_observation[0], torch.from_numpy(seen(following)))
    torch.testing.assert_close(batch.reward[0], torch.tensor([one.reward for one in ordered]))
    torch.testing.assert_close(batch.discount[0], torch.tensor([one.discount for one in ordered]))
    assert torch.equal(batch.weight, torch.ones(1, len(ordered)))


def assert_same_to_the_bit(one: Transition, other: Transition) -> None:
    for name, left, right in zip(Transition._fields, one, other, strict=True):
        assert left.dtype == right.dtype, name
        assert torch.equal(left, right), name


@st.composite
def streams(draw: st.DrawFn) -> tuple[int, int, int, list[tuple[bool, list[str]]]]:
    num_envs = draw(st.sampled_from([1, 2, 5]))
    capacity = draw(st.integers(1, 17))
    n_step = draw(st.sampled_from([1, 2, 3]))
    outcome = st.sampled_from([RUNNING] * 5 + [TERMINATED, TRUNCATED, BOTH])
    outcomes = st.lists(outcome, min_size=num_envs, max_size=num_envs)
    interrupted = st.sampled_from([False] * 7 + [True])
    return capacity, num_envs, n_step, draw(st.lists(st.tuples(interrupted, outcomes), min_size=1, max_size=45))


@settings(max_examples=100, deadline=None)
@given(streams())
def test_every_drawable_transition_equals_the_plain_reference(drawn):
    capacity, num_envs, n_step, events = drawn
    stream = make_stream(capacity, num_envs, n_step)
    stream.begin()
    for interrupted, outcomes in events:
        if interrupted:
            stream.begin()
            assert_equals_reference(stream)
        stream.step(outcomes)
        assert_equals_reference(stream)


@pytest.mark.parametrize("n_step", [1, 2, 3])
@pytest.mark.parametrize("num_envs", [1, 2, 5])
def test_a_ring_that_wrapped_many_times_equals_the_plain_reference(num_envs, n_step):
    # 13 is divisible by neither 2 nor 5: ceil(13 / 2) = 7 and ceil(13 / 5) = 3 slots are kept
    stream = played_stream(13, num_envs, n_step, steps=150)
    assert_equals_reference(stream)


def test_two_interruptions_in_a_row_leave_the_stream_intact():
    stream = make_stream(20, 2, 2)
    stream.begin()
    stream.begin()
    play(stream, 5)
    stream.begin()
    stream.begin()
    play(stream, 5, seed=1)
    assert_equals_reference(stream)


def one_env_memory(n_step: int, gamma: float = 0.5, space: spaces.Space[Any] = BOX) -> ReplayMemory:
    return ReplayMemory(capacity=10, num_envs=1, observation_space=space, gamma=gamma, n_step=n_step)


def append_one(
    memory: ReplayMemory, reward: float, next_number: int, terminated: bool = False, truncated: bool = False
):
    memory.append(np.array([0]), np.array([reward]), np.array([terminated]), np.array([truncated]), seen([next_number]))


def by_observation(memory: ReplayMemory) -> dict[float, tuple[float, float, float]]:
    """First observation to (reward, discount, next observation)."""
    batch = draw_all(memory)
    columns = (batch.observation[0, :, 0], batch.reward[0], batch.discount[0], batch.next_observation[0, :, 0])
    return {o: (r, d, following) for o, r, d, following in zip(*(column.tolist() for column in columns), strict=True)}


def test_three_steps_sum_up_by_hand_until_the_termination():
    memory = one_env_memory(n_step=3)
    memory.begin(seen([0]))
    for number, reward in enumerate([1.0, 2.0, 4.0], start=1):
        append_one(memory, reward, number)
    append_one(memory, 8.0, 4, terminated=True)
    # the row after the end, then two rows of the next episode, which complete the rows before
    for number in (5, 6, 7):
        append_one(memory, 100.0, number)
    assert by_observation(memory) == {
        0: (1 + 0.5 * 2 + 0.25 * 4, 0.125, 3),
        1: (2 + 0.5 * 4 + 0.25 * 8, 0, 4),
        2: (4 + 0.5 * 8, 0, 4),
        3: (8, 0, 4),
    }


@pytest.mark.parametrize(("end", "discount"), [("truncated", 0.5), ("terminated", 0)])
def test_truncation_bootstraps_and_termination_does_not(end, discount):
    memory = one_env_memory(n_step=1)
    memory.begin(seen([0]))
    append_one(memory, 1.0, 1, **{end: True})
    assert by_observation(memory) == {0: (1, discount, 1)}


def test_truncated_tails_bootstrap_with_the_power_of_their_length():
    memory = one_env_memory(n_step=3)
    memory.begin(seen([0]))
    append_one(memory, 1.0, 1)
    append_one(memory, 2.0, 2, truncated=True)
    for number in (3, 4):
        append_one(memory, 100.0, number)
    assert by_observation(memory) == {0: (1 + 0.5 * 2, 0.25, 2), 1: (2, 0.5, 2)}


def test_an_interrupted_episode_is_truncated_and_not_terminated():
    memory = one_env_memory(n_step=2)
    memory.begin(seen([0]))
    append_one(memory, 1.0, 1)
    append_one(memory, 2.0, 2)
    memory.begin(seen([10]))
    append_one(memory, 100.0, 11)
    # neither the observation 2, which has no action, nor the 10, whose second step is to come, can be drawn
    assert by_observation(memory) == {0: (1 + 0.5 * 2, 0.25, 2), 1: (2, 0.5, 2)}


def test_an_interruption_does_not_touch_an_episode_that_had_terminated():
    memory = one_env_memory(n_step=1)
    memory.begin(seen([0]))
    append_one(memory, 1.0, 1, terminated=True)
    memory.begin(seen([10]))
    append_one(memory, 2.0, 11)
    assert by_observation(memory) == {0: (1, 0, 1), 10: (2, 0.5, 11)}


def test_all_drawable_rows_are_drawn_equally_often():
    stream = played_stream(capacity=83, num_envs=5, n_step=2, steps=60)
    rows = draw_all(stream.memory).index[0].tolist()
    draws = stream.memory.sample(40, 500).index.flatten().tolist()
    counts = np.array([draws.count(row) for row in rows])
    assert counts.sum() == 40 * 500
    # Pearson: sum (observed - expected)^2 / expected has mean df and variance 2 df
    expected, df = 40 * 500 / len(rows), len(rows) - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - df) < 4 * math.sqrt(2 * df)


def test_two_seeds_draw_differently_and_one_seed_draws_the_same():
    first, same, other = (played_stream(50, 2, 1, seed=seed).memory.sample(2, 16) for seed in (3, 3, 4))
    assert_same_to_the_bit(first, same)
    assert not torch.equal(first.index, other.index)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=40))
def test_the_sampler_holds_what_a_list_would_hold(moves):
    sampler, plain, newest = UniformSampler(12, seed=0), [], 0
    for add, drop in moves:
        rows = list(range(newest, newest + min(add, 12 - len(plain))))
        newest += len(rows)
        sampler.add(np.array(rows, dtype=np.int64))
        plain += rows
        dropped = min(drop, len(plain))
        sampler.drop_oldest(dropped)
        plain = plain[dropped:]
        assert len(sampler) == len(plain)
        if plain:
            assert set(sampler.draw(40 * len(plain))[0].tolist()) == set(plain)


@pytest.mark.parametrize("empty_memory", [True, False])
def test_no_updates_give_an_empty_batch(empty_memory):
    memory = make_stream(10, 2, 1).memory if empty_memory else played_stream(10, 2, 1).memory
    batch = memory.sample(0, 7)
    assert [tuple(field.shape) for field in batch] == [(0, 7, 2), (0, 7), (0, 7), (0, 7), (0, 7, 2), (0, 7), (0, 7)]
    full = played_stream(10, 2, 1).memory.sample(3, 7)
    assert [field.dtype for field in batch] == [field.dtype for field in full]
    assert [tuple(f.shape) for f in full] == [(3, 7, 2), (3, 7), (3, 7), (3, 7), (3, 7, 2), (3, 7), (3, 7)]


def test_an_empty_batch_leaves_the_draws_as_they_were():
    stream, twin = played_stream(30, 2, 1), played_stream(30, 2, 1)
    stream.memory.sample(0, 64)
    assert_same_to_the_bit(stream.memory.sample(1, 64), twin.memory.sample(1, 64))


@pytest.mark.parametrize(("num_envs", "n_step"), [(1, 1), (2, 3), (5, 2)])
@pytest.mark.parametrize("steps", [0, 1, 4, 60])
def test_a_memory_from_a_checkpoint_continues_bitwise(tmp_path, num_envs, n_step, steps):
    stream = make_stream(23, num_envs, n_step, seed=1)
    stream.begin()
    play(stream, steps)
    torch.save(stream.memory.state_dict(), tmp_path / "memory.pt")
    state = torch.load(tmp_path / "memory.pt", weights_only=True)

    copy = make_stream(23, num_envs, n_step, seed=2)
    copy.memory.load_state_dict(state)
    # the environments stand where the others stand, only the memory came out of the file
    copy.now, copy.count, copy.resetting = stream.now, stream.count, stream.resetting
    if len(stream.memory):
        assert_same_to_the_bit(stream.memory.sample(2, 50), copy.memory.sample(2, 50))
    for seed in range(3):
        play(stream, 5, seed)
        play(copy, 5, seed)
        assert len(stream.memory) == len(copy.memory)
        assert_same_to_the_bit(stream.memory.sample(2, 50), copy.memory.sample(2, 50))
        stream.begin()
        copy.begin()
    assert_equals_reference(stream)


def test_the_state_once_written_is_changed_neither_by_later_steps_nor_by_those_who_load_it():
    stream = played_stream(23, 2, 2, seed=1)
    # both environments are about to reset when the state is taken
    stream.step([RUNNING, RUNNING])
    stream.step([TERMINATED, TRUNCATED])
    state = stream.memory.state_dict()
    # the rows are the memory's own until they are written
    state["rows"] = {name: rows.clone() for name, rows in state["rows"].items()}

    def drawn_after_two_more_steps() -> Transition:
        copy = make_stream(23, 2, 2)
        copy.memory.load_state_dict(state)
        copy.now, copy.resetting = [1, 2], [True, True]
        copy.step([RUNNING, RUNNING])
        copy.step([RUNNING, RUNNING])
        drawn = copy.memory.sample(2, 50)
        # the memory that loaded the state starts new episodes and continues
        copy.begin()
        play(copy, 30)
        return drawn

    expected = drawn_after_two_more_steps()
    # another one starts new episodes at once, as after a resume, and the one that was saved continues
    resumed = make_stream(23, 2, 2)
    resumed.memory.load_state_dict(state)
    resumed.begin()
    play(stream, 30)
    assert_same_to_the_bit(drawn_after_two_more_steps(), expected)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"capacity": 24}, r"memory\.slots"),
        ({"num_envs": 1}, r"memory\.slots"),
        ({"n_step": 3}, r"memory\.n_step"),
        ({"observation_space": spaces.Box(-1, 1, (3,), np.float32)}, "observation"),
        ({"observation_space": spaces.Box(0, 255, BOX.shape, np.uint8)}, "uint8"),
    ],
)
def test_a_memory_of_another_shape_or_type_is_rejected(other, words):
    arguments = {"capacity": 20, "num_envs": 2, "observation_space": BOX, "gamma": GAMMA, "n_step": 1}
    state = played_stream(20, 2, 1).memory.state_dict()
    memory = ReplayMemory(**(arguments | other))
    with pytest.raises(CheckpointError, match=words):
        memory.load_state_dict(state)
    assert len(memory) == 0


def test_a_checkpoint_holds_the_rows_that_were_written_and_no_more():
    memory = make_stream(1_000, 2, 1).memory
    memory.begin(np.zeros((2, *BOX.shape), np.float32))
    assert {len(rows) for rows in memory.state_dict()["rows"].values()} == {1}
    stream = played_stream(1_000, 2, 1)
    assert {len(rows) for rows in stream.memory.state_dict()["rows"].values()} == {stream.memory._steps + 1}


def test_double_precision_observations_are_stored_in_single_precision():
    memory = one_env_memory(1, space=spaces.Box(-10, 10, (2,), np.float64))
    memory.begin(np.array([[1 / 3, 2.0]]))
    memory.append(np.array([0]), np.array([1.0]), np.array([False]), np.array([False]), np.array([[2 / 3, 4.0]]))
    batch = memory.sample(1, 1)
    assert torch.equal(batch.observation, torch.tensor([[[1 / 3, 2.0]]], dtype=torch.float32))
    assert torch.equal(batch.next_observation, torch.tensor([[[2 / 3, 4.0]]], dtype=torch.float32))
    assert batch.observation.dtype == batch.next_observation.dtype == torch.float32


@pytest.mark.parametrize(
    ("space", "observations", "dtype"),
    [
        (spaces.Box(0, 255, (2, 3), np.uint8), [[[[0, 1, 2], [3, 4, 255]]], [[[9, 8, 7], [6, 5, 4]]]], torch.uint8),
        (spaces.Discrete(2**40), [[2**40 - 1], [2**33 + 1]], torch.int64),
    ],
)
def test_whole_numbers_are_kept_in_their_type(space, observations, dtype):
    memory = one_env_memory(1, space=space)
    first, second = (np.array(observation, space.dtype) for observation in observations)
    memory.begin(first)
    memory.append(np.array([0]), np.array([1.0]), np.array([False]), np.array([False]), second)
    batch = memory.sample(1, 1)
    assert batch.observation.tolist() == [observations[0]]
    assert batch.next_observation.tolist() == [observations[1]]
    assert batch.observation.dtype == batch.next_observation.dtype == dtype


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_a_million_big_rows_cost_no_memory_before_they_are_written():
    before = resident_bytes()
    # 1e6 rows of 4096 bytes: 4 GB, were they touched
    space = spaces.Box(0, 255, (4096,), np.uint8)
    memory = ReplayMemory(capacity=1_000_000, num_envs=4, observation_space=space, gamma=0.99)
    memory.begin(np.zeros((4, 4096), np.uint8))
    for number in range(100):
        memory.append(
            np.zeros(4, np.int64),
            np.zeros(4),
            np.zeros(4, np.bool_),
            np.zeros(4, np.bool_),
            np.full((4, 4096), number, np.uint8),
        )
    batch = memory.sample(1, 32)
    assert len(memory) == 400
    assert torch.equal(batch.next_observation[0, :, 0], (batch.index[0] // 4).to(torch.uint8))
    assert resident_bytes() - before < 100e6
