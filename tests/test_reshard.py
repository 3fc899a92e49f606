"""Memories resharded for another world size, against plain references of all that the old ranks played."""

import functools
from collections import Counter

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from test_frames import PLACES, assert_equals_reference, make_stream, number_of
from test_replay import (
    BOTH,
    BOX,
    GAMMA,
    RUNNING,
    TERMINATED,
    TRUNCATED,
    Step,
    append_one,
    assert_same_to_the_bit,
    by_observation,
    draw_all,
    one_env_memory,
    play,
    seen,
)

from lightning_dqn.distributed.reshard import reshard
from lightning_dqn.replay import ReplayMemory
from lightning_dqn.resume.content import CheckpointError
from lightning_dqn.sampling.prioritized import PrioritizedSampler

# numbers of observations, which tell the old ranks' from those of play after resharding
OF_A_RANK, LATER = 9_000, 40_000


def wander(stream, steps, seed):
    """Play episodes of 1 to some 60 steps, and interrupt them now and then."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        p_running = rng.choice([0.6, 0.95])
        ends = [(1 - p_running) * part for part in (0.4, 0.4, 0.2)]
        kinds = [RUNNING, TERMINATED, TRUNCATED, BOTH]
        stream.step(rng.choice(kinds, p=[p_running, *ends], size=len(stream.now)).tolist())
        if rng.random() < 0.02:
            stream.begin()


def old_ranks(lengths, capacity, num_envs, n_step, k, **arguments):
    """A stream of each old rank, played for so many steps."""
    streams = []
    for rank, steps in enumerate(lengths):
        stream = make_stream(-(-capacity // len(lengths)), num_envs, n_step, k, seed=rank, **arguments)
        stream.count = OF_A_RANK * rank
        stream.begin()
        wander(stream, steps, seed=steps + rank)
        streams.append(stream)
    return streams


def states_of(streams):
    return [stream.memory.state_dict() for stream in streams]


def known_steps(streams):
    """By first observation, all that can be drawn or waits for its rewards: its episode, and its place in it.

    Episodes under way are cut off in the references, which is how they stand in a resharded memory.
    """
    known = {}
    for stream in streams:
        reference = stream.reference
        for slots in reference.slots:
            for entry in slots[-(reference.kept_slots + reference.n_step - 1) :]:
                if entry is not None:
                    known[entry[0][entry[1]].observation] = entry
        reference.interrupt()
    return known


def frames_of(streams):
    return {number: stack for stream in streams for number, stack in stream.whole.items()}


def numbers_in(rows):
    """Numbers of the observations that (T, N) rows keep, (T, N)."""
    frames = np.asarray(rows["observation"]).reshape(*rows["playable"].shape, 2).astype(int)
    return 200 * frames[..., 0] + frames[..., 1] - 1


def assert_drawn_as_known(memory, known, whole):
    """Compare all that can be drawn with what was played; the last observations of those that are cut short, one each.

    What was first seen after resharding is passed over.
    """
    short = []
    if not len(memory):
        return short
    batch = draw_all(memory)
    for i in range(batch.action.shape[1]):
        number, following = (number_of(each[0, i, -1].numpy()) for each in (batch.observation, batch.next_observation))
        if number > LATER:
            continue
        episode, start = known[number]
        steps = episode[start : start + memory.n_step]
        taken = [step.next_observation for step in steps].index(following) + 1
        if taken < len(steps):
            short.append(following)
        steps = steps[:taken]
        assert np.array_equal(batch.observation[0, i], whole[number])
        assert np.array_equal(batch.next_observation[0, i], whole[following])
        assert batch.action[0, i] == steps[0].action
        assert batch.reward[0, i].item() == pytest.approx(sum(GAMMA**j * step.reward for j, step in enumerate(steps)))
        assert batch.discount[0, i].item() == pytest.approx(0 if steps[-1].terminated else GAMMA**taken)
    return short


def most_cuts(streams, world_size):
    """As `reshard` does: tenths, or fewer parts of whole pieces of 32 k time steps, each in W pieces."""
    cuts = 0
    for stream in streams:
        length = len(stream.memory.state_dict()["rows"]["playable"])
        parts = min(10, max(1, length // (32 * stream.memory.frame_stack * world_size)))
        cuts += parts * world_size - 1
    return cuts


def refilled(streams, rank, world_size, capacity, **arguments):
    """The stream of a new rank that has loaded its shard, with a reference of that shard."""
    memory = streams[0].memory
    options = memory.num_envs, memory.n_step, memory.frame_stack
    stream = make_stream(-(-capacity // world_size), *options, seed=7, **arguments)
    stream.count = LATER + 2_000 * rank
    stream.whole = frames_of(streams)
    stream.memory.refill(states_of(streams), rank=rank, world_size=world_size)
    room = stream.reference.kept_slots + memory.n_step
    remember(stream.reference, list(reshard(states_of(streams), rank=rank, world_size=world_size, slots=room)))
    return stream


def remember(reference, pieces):
    """Enter pieces into a reference, but for the last row, which is what was seen last."""
    if not pieces:
        return
    rows = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    numbers = numbers_in(rows)
    for i in range(len(numbers) - 1):
        for env in range(numbers.shape[1]):
            written = [rows[name][i, env].item() for name in ("action", "reward", "terminated", "truncated")]
            step = Step(int(numbers[i, env]), *written, int(numbers[i + 1, env]))
            reference.add(env, step if rows["playable"][i, env] else None)


@st.composite
def reshardings(draw):
    """How long each old rank played, the number of new ranks, the capacity of all, and the memory's arguments."""
    lengths = draw(st.lists(st.integers(0, 60) | st.integers(100, 400), min_size=1, max_size=4))
    options = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 4]))
    capacity = draw(st.sampled_from([40, 300, 9_000]))
    return lengths, draw(st.integers(1, 4)), capacity, options, draw(st.sampled_from(sorted(PLACES)))


@settings(max_examples=60, deadline=None)
@given(reshardings())
def test_what_can_be_drawn_was_played_or_is_its_beginning_up_to_a_cut(drawn):
    lengths, world_size, capacity, (num_envs, n_step, k), place = drawn
    streams = old_ranks(lengths, capacity, num_envs, n_step, k)
    known, short = known_steps(streams), []
    for rank in range(world_size):
        stream = refilled(streams, rank, world_size, capacity, **PLACES[place])
        assert_drawn_as_known(stream.memory, known, stream.whole)
        stream.begin()
        # those that waited for their rewards come in
        play(stream, n_step - 1)
        short += assert_drawn_as_known(stream.memory, known, stream.whole)
    assert len(set(short)) <= num_envs * most_cuts(streams, world_size)
    assert all(count < n_step for count in Counter(short).values())


@settings(max_examples=60, deadline=None)
@given(reshardings())
def test_nothing_is_lost_but_k_transitions_a_cut_and_nothing_comes_twice(drawn):
    lengths, world_size, capacity, (num_envs, n_step, k), _ = drawn
    streams = old_ranks(lengths, capacity, num_envs, n_step, k)
    known, drawn, stored = known_steps(streams), Counter(), Counter()
    for rank in range(world_size):
        # room for all
        stream = refilled(streams, rank, world_size, 40_000)
        stream.begin()
        play(stream, n_step - 1)
        if len(stream.memory):
            stacks = draw_all(stream.memory).observation[0].numpy()
            drawn.update(number for number in (number_of(stack[-1]) for stack in stacks) if number <= LATER)
        for piece in reshard(states_of(streams), rank=rank, world_size=world_size, slots=40_000):
            stored.update(numbers_in(piece).ravel().tolist())
    assert stored == Counter(n for state in states_of(streams) for n in numbers_in(state["rows"]).ravel().tolist())
    assert drawn.keys() <= known.keys()
    assert set(drawn.values()) <= {1}
    assert len(known) - len(drawn) <= k * num_envs * most_cuts(streams, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("old", [1, 2, 3, 4])
def test_each_shard_has_as_much_of_every_tenth_of_every_old_rank(old, world_size):
    # the rings have wrapped: each keeps the last 1,400 time steps
    streams = old_ranks([1_900] * old, 1_400 * old, 1, 1, 1)
    stored = [np.sort(numbers_in(state["rows"]).ravel()) for state in states_of(streams)]
    for rank in range(world_size):
        pieces = reshard(states_of(streams), rank=rank, world_size=world_size, slots=9_000)
        resharded = {number for piece in pieces for number in numbers_in(piece).ravel().tolist()}
        batch = draw_all(refilled(streams, rank, world_size, 40_000).memory)
        drawn = {number_of(stack[-1]) for stack in batch.observation[0].numpy()}
        for numbers in stored:
            for tenth in np.array_split(numbers, 10):
                assert abs(len(resharded & set(tenth.tolist())) - len(tenth) / world_size) <= 2
                # rows after an episode's end can't be drawn
                assert len(drawn & set(tenth.tolist())) > 0.5 * len(tenth) / world_size


@pytest.mark.parametrize("k", [1, 4])
def test_of_more_than_there_is_room_for_the_oldest_are_left_out(k):
    streams = old_ranks([2_500] * 2, 4_000, 1, 1, k)
    known = known_steps(streams)
    # one rank with a capacity of half
    stream = refilled(streams, 0, 1, 2_000)
    assert_drawn_as_known(stream.memory, known, stream.whole)
    drawn = {number_of(stack[-1]) for stack in draw_all(stream.memory).observation[0].numpy()}
    assert max(Counter(number // OF_A_RANK for number in drawn).values()) < 1_000
    for state in states_of(streams):
        numbers = np.sort(numbers_in(state["rows"]).ravel())
        assert not drawn & set(numbers[:800].tolist())
        newest = known.keys() & set(numbers[-1_000 + k :].tolist())
        # what a cut costs, at five cuts
        assert len(newest - drawn) <= 5 * k
    # and in order of time: the first to go is the oldest
    stream.begin()
    play(stream, 100)
    left = {number_of(stack[-1]) for stack in draw_all(stream.memory).observation[0].numpy()}
    ages = {number: (number - 1) % OF_A_RANK for number in drawn}
    assert max(ages[number] for number in drawn - left) < min(ages[number] for number in drawn & left) + 400


@settings(max_examples=40, deadline=None)
@given(reshardings(), st.integers(0, 3))
def test_play_resumes_from_a_shard_over_several_wraps(drawn, rank):
    lengths, world_size, capacity, options, place = drawn
    streams = old_ranks(lengths, capacity, *options)
    stream = refilled(streams, rank % world_size, world_size, min(capacity, 300), **PLACES[place])
    assert_equals_reference(stream)
    stream.begin()
    kept = stream.reference.kept_slots
    for _ in range(8):
        assert_equals_reference(stream)
        wander(stream, kept * 3 // 8 + 1, seed=rank)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("sampler", [{}, {"sampler": PrioritizedSampler}])
@pytest.mark.parametrize(("n_step", "k"), [(1, 1), (3, 4)])
def test_a_shard_from_a_checkpoint_resumes_bitwise(tmp_path, n_step, k, sampler, begun):
    streams = old_ranks([200] * 3, 450, 2, n_step, k, **sampler)
    stream = refilled(streams, 1, 2, 450, **sampler)
    if begun:
        stream.begin()
        wander(stream, 50, seed=0)
    torch.save(stream.memory.state_dict(), tmp_path / "memory.pt")
    twin = refilled(streams, 0, 2, 450, **sampler)
    twin.memory = make_stream(225, 2, n_step, k, seed=9, **sampler).memory
    twin.memory.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    twin.now, twin.resetting, twin.count = stream.now, stream.resetting, stream.count
    twin.frames = [frames.copy() for frames in stream.frames]
    for seed in range(4):
        assert len(stream.memory) > 100
        assert_same_to_the_bit(stream.memory.sample(2, 50), twin.memory.sample(2, 50))
        for one in (stream, twin):
            if not (begun or seed):
                one.begin()
            play(one, 30, seed)


def test_a_shard_can_be_resharded_again():
    streams = old_ranks([150, 170, 130], 600, 2, 3, 4)
    known, whole = known_steps(streams), frames_of(streams)
    shards = [refilled(streams, rank, 2, 600) for rank in range(2)]
    for stream in shards:
        stream.begin()
        wander(stream, 20, seed=0)
    first = sum(len(stream.memory) for stream in shards)
    again = [refilled(shards, rank, 4, 600) for rank in range(4)]
    played = known_steps(shards)
    for stream in again:
        assert_drawn_as_known(stream.memory, played, stream.whole)
        assert_drawn_as_known(stream.memory, known, whole)
    assert sum(len(stream.memory) for stream in again) > 0.6 * first


def test_shards_of_empty_memories_are_empty():
    streams = [make_stream(50, 2, 3, 4) for _ in range(3)]
    stream = refilled(streams, 1, 2, 100)
    assert len(stream.memory) == 0
    assert stream.memory.sample(0, 5).action.shape == (0, 5)
    stream.begin()
    wander(stream, 200, seed=0)
    assert_equals_reference(stream)


def remembered(n_step, steps, first=0):
    """The state of one environment's memory of observations one by one, with rewards 1, 2, 4, ... and gamma = 1 / 2."""
    memory = one_env_memory(n_step)
    memory.begin(seen([first]))
    for i in range(steps):
        append_one(memory, 2.0**i, first + i + 1)
    return memory.state_dict()


def test_a_cut_by_hand():
    shards = [one_env_memory(n_step=1) for _ in range(2)]
    for rank, shard in enumerate(shards):
        # the rows 0 1 | 2 3 4: of the last row of each part nobody has what follows
        shard.refill([remembered(n_step=1, steps=4)], rank=rank, world_size=2)
    assert by_observation(shards[0]) == {0: (1, 0.5, 1)}
    assert by_observation(shards[1]) == {2: (4, 0.5, 3), 3: (8, 0.5, 4)}


def test_three_steps_up_to_a_cut_by_hand():
    shard = one_env_memory(n_step=3)
    # the rows 0 1 2 3 | 4 5 6 7 of one old rank, 20 21 | 22 23 of the other, then 30 31 32: an episode after resharding
    streams = [remembered(n_step=3, steps=7), remembered(n_step=3, steps=3, first=20)]
    shard.refill(streams, rank=0, world_size=2)
    to_the_cut = {0: (1 + 0.5 * 2 + 0.25 * 4, 0.125, 3), 1: (2 + 0.5 * 4, 0.25, 3), 2: (4, 0.5, 3)}
    # the newer half of the second old rank, whose 22 still waits
    assert by_observation(shard) == to_the_cut
    shard.begin(seen([30]))
    append_one(shard, 100.0, 31)
    append_one(shard, 100.0, 32)
    assert by_observation(shard) == to_the_cut | {22: (4, 0.5, 23)}


def test_an_episode_that_terminated_at_a_cut_stays_so():
    old, shard = one_env_memory(n_step=1), one_env_memory(n_step=1)
    old.begin(seen([0]))
    append_one(old, 1.0, 1, terminated=True)
    append_one(old, 0.0, 10)
    append_one(old, 2.0, 11)
    # the rows 0 1 | 10 11
    shard.refill([old.state_dict()], rank=0, world_size=2)
    assert by_observation(shard) == {0: (1, 0, 1)}
    assert not shard.state_dict()["rows"]["truncated"].any()


def test_resharding_changes_no_shard():
    streams = old_ranks([200, 90], 300, 2, 3, 4)
    before = [{name: rows.clone() for name, rows in state["rows"].items()} for state in states_of(streams)]
    for rank in range(3):
        refilled(streams, rank, 3, 300)
    for then, state in zip(before, states_of(streams), strict=True):
        assert all(torch.equal(then[name], rows) for name, rows in state["rows"].items())


@pytest.mark.parametrize("world_size", [1, 3])
def test_priorities_go_with_their_rows(world_size):
    make = functools.partial(PrioritizedSampler, alpha=1.0, epsilon=1e-9)
    streams = old_ranks([300] * 2, 400, 2, 3, 4, sampler=make)
    error = {}
    for rank, stream in enumerate(streams):
        rows = np.flatnonzero(stream.memory.sampler._tree.leaves)
        numbers = numbers_in(stream.memory.state_dict()["rows"]).ravel()[rows]
        # the largest is overwritten by a smaller one: it is remembered nevertheless
        stream.memory.sampler.update_priorities(rows[:1], np.array([50.0 + rank]))
        stream.memory.sampler.update_priorities(rows, numbers / 1000)
        error.update(zip(numbers.tolist(), (numbers / 1000).tolist(), strict=True))
    known, waited = known_steps(streams), set()
    for rank in range(world_size):
        # room for all
        stream = refilled(streams, rank, world_size, 9_000, sampler=make)
        stream.begin()
        play(stream, 2)
        sampler = stream.memory.sampler
        rows = np.flatnonzero(sampler._tree.leaves)
        numbers = numbers_in(stream.memory.state_dict()["rows"]).ravel()[rows].tolist()
        assert len(numbers) == len(stream.memory) > 80
        assert known.keys() >= set(numbers)
        # what waited for its rewards there or here, in the last n - 1 time steps, enters with the largest of all
        leaves = sampler._tree.leaves[rows].tolist()
        as_new = {number for number, leaf in zip(numbers, leaves, strict=True) if leaf == pytest.approx(51)}
        waited |= as_new
        assert len(as_new) <= 2 * 2 * 2
        assert leaves == pytest.approx([51 if number in as_new else error[number] for number in numbers])
        assert_drawn_from(sampler, rows)
    assert waited >= known.keys() - error.keys()


def assert_drawn_from(sampler, rows):
    """The chances are in proportion to the numbers, over these rows."""
    drawn, _ = sampler.draw(40 * len(rows))
    expected = sampler._tree.leaves[rows] / sampler._tree.total() * 40 * len(rows)
    counts = np.array([np.count_nonzero(drawn == row) for row in rows])
    assert counts.sum() == len(drawn)
    assert (np.abs(counts - expected) < 2).all()


@pytest.mark.parametrize("k", [1, 4])
def test_masks_go_with_their_rows(k):
    def mask_of(numbers):
        return np.stack([numbers % 2 == 0, numbers % 3 == 0, np.ones_like(numbers, bool)], -1)

    def make(capacity):
        space = spaces.Box(0, 255, (k, 1, 2), np.uint8)
        options = {"num_envs": 2, "observation_space": space, "gamma": GAMMA, "frame_stack": k, "mask_size": 3}
        return ReplayMemory(capacity=capacity, **options)

    streams = [make_stream(200, 2, 1, k) for _ in range(2)]
    for rank, stream in enumerate(streams):
        stream.memory, stream.count = make(200), OF_A_RANK * rank
        numbers = np.array([stream.number(), stream.number()])
        stream.memory.begin(stream.observe(numbers.tolist(), [True, True]), mask_of(numbers))
        for _ in range(250):
            numbers = np.array([stream.number(), stream.number()])
            nothing = np.zeros(2, bool)
            observation = stream.observe(numbers.tolist(), nothing)
            stream.memory.append(numbers, numbers, nothing, nothing, observation, mask_of(numbers))
    shard = make(140)
    shard.refill(states_of(streams), rank=2, world_size=3)
    batch = shard.sample(1, 2_000)
    for observation, mask in ((batch.observation, batch.action_mask), (batch.next_observation, batch.next_action_mask)):
        numbers = np.array([number_of(stack[-1]) for stack in observation[0].numpy()])
        assert np.array_equal(mask[0], mask_of(numbers))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"n_step": 2}, r"memory\.n_step"),
        ({"frame_stack": 2, "observation_space": spaces.Box(0, 1, (2, 2), np.float32)}, r"memory\.frame_stack"),
        ({"num_envs": 3}, r"memory\.rows\.observation"),
        ({"sampler": PrioritizedSampler}, r"memory\.sampler"),
    ],
)
def test_a_shard_of_another_kind_of_memory_is_rejected(other, words):
    options = {"capacity": 30, "num_envs": 1, "observation_space": BOX, "gamma": 0.5} | other
    memory = ReplayMemory(**options)
    with pytest.raises(CheckpointError, match=words):
        memory.refill([remembered(n_step=1, steps=4)], rank=0, world_size=1)
    assert len(memory) == 0
