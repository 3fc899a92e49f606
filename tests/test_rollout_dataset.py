"""Rollouts of real environments, compared with what the environments themselves wrote down."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from test_replay_dataset import GAMMA, Recorder, at_random, balance_or_fall, lean, one_step
from toys import stateless

from lightning_dqn.envs import EnvSettings, make_vector_env
from lightning_dqn.variants.rollouts import RolloutDataset


def make_rollouts(envs, policy=at_random, seed=0, **options):
    defaults = {"steps_per_iteration": 10, "updates_per_iteration": 3, "batch_size": 8, "epoch_env_steps": 100}
    options = defaults | options
    return RolloutDataset(
        envs=envs, policy=stateless(policy), gamma=GAMMA, seed=seed, sample_seed=seed + 100, **options
    )


def countdown(num_envs, **options):
    return make_rollouts(Recorder(make_vector_env(EnvSettings("TestCountdown-v0"), num_envs, "sync")), **options)


def take(dataset, iterations):
    """So many iterations, over as many epochs as they need."""
    taken = []
    while len(taken) < iterations:
        taken += islice(dataset, iterations - len(taken))
    return taken


def same(ones, others):
    pairs = [pair for both in zip(ones, others, strict=True) for pair in zip(*both, strict=True)]
    return all(torch.equal(one, other) for one, other in pairs)


def rows(rollout, index):
    """These steps as (observation, action, reward, discount, next observation)."""
    steps, envs = np.divmod(index, rollout.reward.shape[1])
    for t, n in zip(steps.tolist(), envs.tolist(), strict=True):
        before, after = (tuple(rollout.observation[t + i, n].tolist()) for i in (0, 1))
        yield before, int(rollout.action[t, n]), float(rollout.reward[t, n]), float(rollout.discount[t, n]), after


@pytest.mark.parametrize(
    ("env_id", "env_kwargs", "vectorization", "policy"),
    [
        ("TestCountdown-v0", {}, "sync", at_random),
        ("CartPole-v1", {"max_episode_steps": 12}, "vector_entry_point", balance_or_fall),
    ],
)
def test_the_steps_learnt_from_are_what_the_environments_did(env_id, env_kwargs, vectorization, policy):
    envs = Recorder(make_vector_env(EnvSettings(env_id, env_kwargs), 3, vectorization))
    # 8 minibatches of 15 are all steps of a rollout four times or so
    dataset = make_rollouts(envs, policy, updates_per_iteration=8, batch_size=15, epoch_env_steps=600)
    drawn = set()
    for rollout in dataset:
        counts = Counter(rollout.index.flatten().tolist())
        # without replacement, pass by pass
        assert max(counts.values()) - min(counts.values()) <= 1
        for *step, discount, after in rows(rollout, np.array(list(counts))):
            drawn.add((*step, round(discount, 5), after))
    written = one_step(dataset.envs.written)
    assert drawn == written
    assert dataset.env_steps == len(written) > 550
    assert {discount for *_, discount, _ in drawn} == {GAMMA, 0.0}


def test_the_end_of_an_episode_is_marked_and_the_reset_step_is_never_learnt_from():
    dataset = countdown(3, updates_per_iteration=10)
    ends = 0
    for rollout in take(dataset, 20):
        resets = torch.zeros_like(rollout.ended)
        resets[1:] = rollout.ended[:-1]
        resets = resets.flatten()
        assert not resets[rollout.index].any()
        ends += int(rollout.ended.sum())
    assert ends == len(dataset.episodes) > 50
    assert dataset.envs.outcomes["truncated"] > 5
    assert dataset.envs.outcomes["terminated"] > 5


@pytest.mark.parametrize("num_envs", [1, 4])
def test_the_clock_keeps_its_pace_and_resets_come_on_top(num_envs):
    dataset = countdown(num_envs, epoch_env_steps=60 * num_envs * 10)
    assert len(dataset) == 60
    for iteration, rollout in enumerate(dataset, start=1):
        assert abs(dataset.env_steps - iteration * num_envs * 10) < num_envs
        steps, envs = rollout.reward.shape
        assert steps >= 10
        assert envs == num_envs
        shapes = {tuple(part.shape) for part in (rollout.action, rollout.reward, rollout.discount, rollout.ended)}
        assert shapes == {(steps, num_envs)}
        assert tuple(rollout.observation.shape) == (steps + 1, num_envs, 2)
        assert tuple(rollout.index.shape) == (3, 8)


def test_a_rollout_begins_where_the_last_one_ended():
    dataset = countdown(3)
    for one, other in zip((rollouts := take(dataset, 10)), rollouts[1:], strict=False):
        assert torch.equal(one.observation[-1], other.observation[0])


def test_a_second_iterator_resumes_where_the_first_stopped():
    whole, halves = countdown(3, epoch_env_steps=600), countdown(3, epoch_env_steps=300)
    assert same(list(whole), list(halves) + list(halves))


def test_a_restored_dataset_yields_the_same_rollouts_bitwise(tmp_path):
    def carts(seed=0):
        return make_rollouts(make_vector_env(EnvSettings("CartPole-v1"), 3), lean, seed)

    played, fresh = carts(), carts(5)
    take(played, 7)
    torch.save(played.state_dict(), tmp_path / "state")
    fresh.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert same(take(played, 20), take(fresh, 20))
    assert played.episodes == fresh.episodes
    assert len(fresh.episodes) > 5


def test_without_its_environments_it_starts_new_episodes():
    played, one, other = countdown(3), countdown(3, seed=5), countdown(3, seed=6)
    take(played, 7)
    for fresh in (one, other):
        fresh.load_state_dict(played.state_dict(with_envs=False))
    ones, others = take(one, 5), take(other, 5)
    assert same(ones, others)
    # the time of a Countdown is 0 at its start
    assert ones[0].observation[0, :, 1].tolist() == [0, 0, 0]
    assert abs(one.env_steps - 12 * 30) < 3


def test_workers_are_rejected():
    loader = torch.utils.data.DataLoader(countdown(1), batch_size=None, num_workers=1)
    with pytest.raises(ValueError, match="use num_workers=0"):
        next(iter(loader))
