"""Prioritised replay: chances, weights, what enters and what leaves, and the way of the errors back."""

import functools
import math

import gymnasium as gym
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import quiet_trainer
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from test_replay import BOX, GAMMA, Reference, Stream, assert_equals_reference, assert_same_to_the_bit, play

from lightning_dqn import (
    DQN,
    MLP,
    DQNDataModule,
    EpsilonDecay,
    PrioritizedSampler,
    PriorityUpdate,
    SoftTargetUpdate,
    UniformSampler,
)
from lightning_dqn.callbacks import UpdateCallback
from lightning_dqn.losses import TDLoss
from lightning_dqn.replay import ReplayMemory
from lightning_dqn.resume.content import CheckpointError
from lightning_dqn.sampling.sum_tree import SumTree


def sampler_with(errors, capacity=None, seed=0, **settings):
    """A sampler whose rows 0, 1, ... have these errors."""
    sampler = PrioritizedSampler(capacity or len(errors), seed, **settings)
    sampler.add(np.arange(len(errors)))
    sampler.update_priorities(np.arange(len(errors)), np.array(errors, np.float32))
    return sampler


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_rows_are_drawn_in_proportion_to_their_priorities(alpha):
    errors = np.random.default_rng(1).exponential(size=50) + 0.01
    sampler = sampler_with(errors, alpha=alpha, epsilon=0.01)
    # minibatches of one row are independent draws
    rows, _ = sampler.draw(40_000, 40_000)
    # P(i) = p_i^alpha / sum_k p_k^alpha, p_i = |delta_i| + epsilon
    chances = (errors.astype(np.float32) + 0.01) ** alpha
    expected = 40_000 * chances / chances.sum()
    assert expected.min() > 5
    chi_square = ((np.bincount(rows, minlength=50) - expected) ** 2 / expected).sum()
    # mean 49, standard deviation sqrt(98)
    assert abs(chi_square - 49) < 4 * math.sqrt(98)


def test_each_minibatch_has_strata_of_its_own():
    errors = np.random.default_rng(2).exponential(size=30) + 0.01
    sampler = sampler_with(errors, alpha=1.0)
    rows, _ = sampler.draw(5 * 64, 5)
    expected = 64 * errors / errors.sum()
    minibatches = rows.reshape(5, 64)
    for minibatch in minibatches:
        # the k-th row is from the k-th of 64 equal stretches: a row that fills 3.7 of them is drawn 2 to 5 times
        assert (np.diff(minibatch) >= 0).all()
        counts = np.bincount(minibatch, minlength=30)
        assert (np.floor(expected) - 1 <= counts).all()
        assert (counts <= np.ceil(expected) + 1).all()
    assert len({tuple(minibatch) for minibatch in minibatches}) == 5


def test_the_weights_of_two_rows_by_hand():
    sampler = sampler_with([3.0, 1.0], alpha=1.0, epsilon=1e-9)
    sampler.beta = 0.5
    rows, weights = sampler.draw(4)
    # P = 3/4 and 1/4, N = 2: (2 * 3/4)^-.5 = .8165 and (2 * 1/4)^-.5 = 1.4142; over the larger: .5774 and 1
    assert rows.tolist() == [0, 0, 0, 1]
    assert weights.tolist() == pytest.approx([math.sqrt(1 / 3)] * 3 + [1])
    assert weights.dtype == torch.float32
    sampler.beta = 1.0
    assert sampler.draw(4)[1].tolist() == pytest.approx([1 / 3] * 3 + [1])
    sampler.beta = 0.0
    assert sampler.draw(4)[1].tolist() == [1, 1, 1, 1]


def test_the_largest_weight_is_1_in_each_minibatch():
    sampler = sampler_with(np.arange(1.0, 101.0), alpha=1.0)
    _, weights = sampler.draw(10 * 8, 10)
    assert weights.view(10, 8).amax(1).tolist() == [1] * 10


def test_new_rows_enter_with_the_largest_priority_so_far():
    sampler = PrioritizedSampler(6, 0, alpha=1.0, epsilon=1e-9)
    sampler.add(np.array([0, 1]))
    assert sampler._tree.leaves.tolist() == [1, 1, 0, 0, 0, 0]
    sampler.update_priorities(np.array([0, 1]), np.array([4.0, 2.0]))
    sampler.add(np.array([2]))
    # and it is remembered when the row that had it has none, or is gone
    sampler.update_priorities(np.array([0]), np.array([0.5]))
    sampler.drop_oldest(1)
    sampler.add(np.array([3]))
    assert sampler._tree.leaves.tolist() == pytest.approx([0, 2, 4, 4, 0, 0])


def test_the_last_of_several_priorities_of_a_row_counts():
    sampler = sampler_with([1.0, 1.0], alpha=1.0, epsilon=1e-9)
    sampler.update_priorities(np.array([0, 1, 0]), np.array([7.0, 2.0, 5.0]))
    assert sampler._tree.leaves.tolist() == pytest.approx([5, 2])


def test_a_row_that_left_before_its_priority_was_written_stays_away():
    sampler = sampler_with([1.0, 1.0, 1.0])
    rows, _ = sampler.draw(6)
    sampler.drop_oldest(2)
    sampler.update_priorities(rows, np.full(6, 100.0))
    assert sampler._tree.leaves[:2].tolist() == [0, 0]
    assert set(sampler.draw(100)[0].tolist()) == {2}


def test_errors_of_0_leave_rows_that_can_be_drawn():
    sampler = sampler_with([0.0, 0.0, 0.0])
    assert set(sampler.draw(99)[0].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_an_error_that_is_not_finite_is_rejected(error):
    sampler = sampler_with([1.0, 1.0])
    with pytest.raises(FloatingPointError, match="lower lr"):
        sampler.update_priorities(np.array([0, 1]), np.array([1.0, error]))
    assert set(sampler.draw(10)[0].tolist()) == {0, 1}


def test_nothing_is_drawn_from_nothing():
    sampler = sampler_with([1.0])
    sampler.drop_oldest(1)
    for empty in (PrioritizedSampler(3, 0), sampler):
        with pytest.raises(ValueError, match="no row is eligible"):
            empty.draw(1)


@settings(max_examples=75, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 12)), max_size=40))
def test_the_sampler_holds_what_a_list_would_hold(moves):
    sampler, plain, entered, largest = PrioritizedSampler(12, 0, alpha=1.0, epsilon=0.25), {}, 0, 1.0
    for add, drop, error in moves:
        rows = [(entered + i) % 12 for i in range(min(add, 12 - len(plain)))]
        entered += len(rows)
        sampler.add(np.array(rows, dtype=np.int64))
        plain |= dict.fromkeys(rows, largest)
        for row in list(plain)[:drop]:
            del plain[row]
        sampler.drop_oldest(min(drop, len(sampler)))
        written = np.arange(error, 12)
        sampler.update_priorities(written, np.full(len(written), error))
        plain |= {row: error + 0.25 for row in plain if row >= error}
        largest = max(largest, error + 0.25) if len(written) else largest
        assert len(sampler) == len(plain)
        assert sampler._tree.leaves.tolist() == [plain.get(row, 0.0) for row in range(12)]
        if plain:
            assert set(sampler.draw(4000)[0].tolist()) == set(plain)


def prioritized_stream(num_envs=2, n_step=3, seed=0, sampler=PrioritizedSampler):
    memory = ReplayMemory(
        capacity=23, num_envs=num_envs, observation_space=BOX, gamma=GAMMA, n_step=n_step, sampler=sampler, seed=seed
    )
    stream = Stream(memory, Reference(23, num_envs, n_step))
    stream.begin()
    return stream


def learn(memory, rng):
    """Draw, and write errors back."""
    batch = memory.sample(2, 32)
    memory.sampler.update_priorities(batch.index.numpy().ravel(), rng.exponential(size=64))
    return batch


@pytest.mark.parametrize(("num_envs", "n_step"), [(1, 1), (2, 3), (5, 2)])
def test_every_transition_of_the_memory_can_be_drawn_and_no_other(num_envs, n_step):
    stream = prioritized_stream(num_envs, n_step)
    for seed in range(12):
        play(stream, 9, seed)
        # equal chances, so that a draw finds all
        alive = np.flatnonzero(stream.memory.sampler._tree.leaves)
        stream.memory.sampler.update_priorities(alive, np.ones(len(alive)))
        stream.memory.sampler.beta = 0.0
        assert_equals_reference(stream)
        if seed % 5 == 4:
            stream.begin()


@pytest.mark.parametrize("compiled_then", [False, True])
@pytest.mark.parametrize("compiled_now", [False, True])
def test_a_memory_from_a_checkpoint_continues_bitwise(tmp_path, monkeypatch, compiled_then, compiled_now):
    with monkeypatch.context() as patch:
        if not compiled_then:
            patch.setattr("lightning_dqn.sampling.prioritized.make_tree", SumTree)
        stream = prioritized_stream(seed=1)
        play(stream, 30)
        rng = np.random.default_rng(0)
        for _ in range(20):
            learn(stream.memory, rng)
        stream.memory.sampler.beta = 0.7
    torch.save(stream.memory.state_dict(), tmp_path / "memory.pt")
    with monkeypatch.context() as patch:
        if not compiled_now:
            patch.setattr("lightning_dqn.sampling.prioritized.make_tree", SumTree)
        copy = prioritized_stream(seed=2)
        copy.memory.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    copy.now, copy.count, copy.resetting = stream.now, stream.count, stream.resetting
    assert isinstance(copy.memory.sampler._tree, SumTree) is not compiled_now
    rngs = [np.random.default_rng(3) for _ in range(2)]
    for seed in range(5):
        assert_same_to_the_bit(learn(stream.memory, rngs[0]), learn(copy.memory, rngs[1]))
        play(stream, 5, seed)
        play(copy, 5, seed)
    assert stream.memory.sampler._tree.nodes.tobytes() == copy.memory.sampler._tree.nodes.tobytes()


@pytest.mark.parametrize("samplers", [(UniformSampler, PrioritizedSampler), (PrioritizedSampler, UniformSampler)])
def test_a_memory_with_another_kind_of_sampler_is_rejected(samplers):
    then, now = (prioritized_stream(sampler=sampler) for sampler in samplers)
    play(then, 10)
    with pytest.raises(CheckpointError, match=r"memory\.sampler"):
        now.memory.load_state_dict(then.memory.state_dict())
    assert len(now.memory) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 1.5}, r"alpha=1\.5: must be in \[0, 1\]"),
        ({"alpha": -0.1}, r"alpha=-0\.1"),
        ({"alpha": math.nan}, r"alpha=nan"),
        ({"epsilon": 0.0}, r"epsilon=0\.0: must be positive"),
    ],
)
def test_settings_out_of_range_are_rejected_before_an_environment_is_made(settings, words):
    with pytest.raises(ValueError, match=words):
        DQNDataModule(env_id="NoSuch-v0", sampler=functools.partial(PrioritizedSampler, **settings))


@pytest.mark.parametrize("wrong", [MLP, dict, lambda capacity, seed: "a word", PrioritizedSampler(3, 0)])
def test_what_makes_no_sampler_is_rejected_in_a_line(wrong):
    with pytest.raises(TypeError, match=r"sampler=.*(can't be called|is no Sampler)") as error:
        DQNDataModule(env_id="NoSuch-v0", sampler=wrong)
    assert "\n" not in str(error.value)


def test_the_bytes_are_those_that_the_sampler_takes():
    uniform, prioritized = UniformSampler(1024, 0), sampler_with(np.ones(1024))
    assert uniform.bytes_per_row() * 1024 == uniform._queue.rows.nbytes
    # a seventh more than the leaves are the inner nodes
    taken = prioritized._queue.rows.nbytes + prioritized._tree.nodes.nbytes
    assert prioritized.bytes_per_row() * 1024 == pytest.approx(taken, rel=0.06)


def test_beta_rises_linearly_and_then_stays():
    update = PriorityUpdate(beta_start=0.4, beta_end=1.0, anneal_env_steps=100)
    assert [update.beta_at(t) for t in (0, 50, 100, 1000)] == pytest.approx([0.4, 0.7, 1.0, 1.0])


class Jackpot(gym.Env):
    """Ten steps, all the same to see; the sixth pays 10."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.played = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.played += 1
        return np.zeros(1, np.float32), 10.0 * (self.played == 6), self.played == 10, False, {}


gym.register("TestJackpot-v0", Jackpot)


class Watch(UpdateCallback):
    """Notes the batches, what came of them, and beta; it comes before `PriorityUpdate`."""

    def __init__(self):
        self.seen = []

    def on_iteration_end(self, trainer, pl_module, batch, results):
        if results:
            sampler = trainer.datamodule.train_dataset.memory.sampler
            outputs = {name: torch.stack([getattr(each, name) for each in results]) for name in TDLoss._fields}
            self.seen.append((batch, outputs, sampler.beta, trainer.datamodule.env_steps))


def watched_fit(*callbacks, sampler=PrioritizedSampler, lr=1e-9, **options):
    pl.seed_everything(0, verbose=False)
    options = {"epoch_env_steps": 600, "warmup_env_steps": 100, "eval_episodes": 1, "batch_size": 32, **options}
    data = DQNDataModule(sampler=sampler, **{"env_id": "TestJackpot-v0", "gamma": 0.0, **options})
    model = DQN(data.observation_space, data.action_space, optimizer=lambda p: torch.optim.Adam(p, lr=lr))
    watch = Watch()
    trainer = quiet_trainer(callbacks=[SoftTargetUpdate(), EpsilonDecay(), watch, *callbacks])
    trainer.fit(model, data)
    return watch.seen, data.train_dataset.memory


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.integration
def test_rows_with_large_errors_are_drawn_more_often_in_a_fit(updates):
    seen, _ = watched_fit(PriorityUpdate(), updates_per_iteration=updates)
    uniform, _ = watched_fit(PriorityUpdate(), updates_per_iteration=updates, sampler=UniformSampler)

    def share(iterations):
        # of the jackpots among all rows, when each of those has been drawn and updated once
        return float(torch.cat([batch.reward.flatten() for batch, *_ in iterations[-200:]]).eq(10).float().mean())

    # one row in ten; with errors of 10 against some tenths, (10 / .3)^.6 = 8 times as likely as another
    assert share(uniform) == pytest.approx(0.1, abs=0.03)
    assert share(seen) > 0.3
    # and they count less; of the others, those count as little that have just entered, with the largest priority
    batch = seen[-1][0]
    assert batch.weight[batch.reward == 10].mean() < 0.5 * batch.weight[batch.reward == 0].mean()


def test_the_errors_of_a_batch_become_the_priorities_of_its_rows():
    seen, memory = watched_fit(PriorityUpdate(), num_envs=2, updates_per_iteration=3, n_step=2)
    batch, outputs, *_ = seen[-1]
    assert outputs["priority"].shape == batch.index.shape == (3, 32)
    written = dict(zip(batch.index.flatten().tolist(), outputs["priority"].flatten().tolist(), strict=True))
    rows = np.array(list(written))
    expected = (np.array(list(written.values())) + 1e-6) ** 0.6
    np.testing.assert_allclose(memory.sampler._tree.leaves[rows], expected, rtol=1e-6)


def test_every_batch_is_drawn_with_the_beta_of_its_own_time():
    update = PriorityUpdate(beta_start=0.2, anneal_env_steps=400)
    seen, _ = watched_fit(update)
    # set when the step before was played
    assert [beta for *_, beta, _ in seen] == pytest.approx([update.beta_at(t - 1) for *_, t in seen])


def test_uniform_replay_needs_no_priorities_and_takes_no_harm_from_them():
    with_update, _ = watched_fit(PriorityUpdate(), sampler=UniformSampler)
    without, _ = watched_fit(sampler=UniformSampler)
    assert all(torch.equal(a[1]["loss"], b[1]["loss"]) for a, b in zip(with_update, without, strict=True))
