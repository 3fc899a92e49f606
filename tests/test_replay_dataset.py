"""Play and replay in real environments, compared with what the environments themselves wrote down."""

import itertools
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from toys import stateless, through_a_checkpoint

from lightning_dqn.collector import Collector
from lightning_dqn.data import ReplayDataset
from lightning_dqn.distributed.sync import Sync
from lightning_dqn.envs import EnvSettings, make_env, make_vector_env
from lightning_dqn.evaluation import EpisodeDataset
from lightning_dqn.replay import ReplayMemory, Transition

GAMMA = 0.9


class Written(NamedTuple):
    """One step as an environment saw it."""

    observation: tuple[float, ...]
    action: int
    reward: float
    terminated: bool
    next_observation: tuple[float, ...]


class Countdown(gym.Env):
    """Terminates after 1 to 8 steps, which TimeLimit cuts at 5; each observation is unique, each step written down."""

    observation_space = spaces.Box(0, 100, (2,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, render_mode: str | None = None) -> None:
        self.written: list[Written] = []
        self.resets: list[tuple[float, ...]] = []

    def reset(self, *, seed: int | None = None, options: Any = None):
        super().reset(seed=seed)
        self.length = int(self.np_random.integers(1, 9))
        self.start, self.time = self.np_random.random(), 0
        self.resets.append(tuple(self.observe().tolist()))
        return self.observe(), {}

    def observe(self) -> np.ndarray:
        return np.array([self.start, self.time], np.float32)

    def step(self, action: int):
        before, self.time = self.observe(), self.time + 1
        # sixteenths are exact in float32, sums of them too
        reward = float(self.np_random.integers(16)) / 16
        over = self.time == self.length
        self.written.append(Written(tuple(before.tolist()), int(action), reward, over, tuple(self.observe().tolist())))
        return self.observe(), reward, over, False, {}


class Plain(Countdown):
    """Takes no `render_mode`, which `gymnasium.make` accepts."""

    def __init__(self) -> None:
        super().__init__()


gym.register("TestCountdown-v0", Countdown, max_episode_steps=5)
gym.register("TestPlain-v0", Plain, max_episode_steps=5)


class Recorder(gym.vector.VectorWrapper):
    """Writes down what a vector environment gives, without the steps that only reset."""

    def __init__(self, env: gym.vector.VectorEnv) -> None:
        super().__init__(env)
        self.written: list[list[Written]] = [[] for _ in range(env.num_envs)]
        self.returns: list[float] = []
        self.lengths: list[int] = []
        self.ends: list[int] = []
        self.outcomes: Counter[str] = Counter()
        self.clock = 0

    def reset(self, *, seed: int | None = None, options: Any = None):
        self.now, info = self.env.reset(seed=seed, options=options)
        self.over = np.zeros(self.num_envs, bool)
        self.rewards: list[list[float]] = [[] for _ in self.over]
        return self.now, info

    def step(self, actions: np.ndarray):
        following, reward, terminated, truncated, info = self.env.step(actions)
        played = np.flatnonzero(~self.over)
        self.clock += len(played)
        for i in played:
            before, after = tuple(self.now[i].tolist()), tuple(following[i].tolist())
            self.written[i].append(Written(before, int(actions[i]), float(reward[i]), bool(terminated[i]), after))
            self.rewards[i].append(float(reward[i]))
            if terminated[i] or truncated[i]:
                self.returns.append(sum(self.rewards[i]))
                self.lengths.append(len(self.rewards[i]))
                self.ends.append(self.clock)
                self.outcomes["terminated" if terminated[i] else "truncated"] += 1
                self.rewards[i] = []
        self.now, self.over = following, terminated | truncated
        return following, reward, terminated, truncated, info


def balance_or_fall(observation: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """CartPole: every second environment pushes towards where the pole falls, the others always to the right."""
    right = observation[:, 2] + observation[:, 3] > 0
    right[1::2] = True
    return right.astype(np.int64)


def balance(observation: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """CartPole: keeps the pole up for long, by the angle and its speed."""
    return (observation[:, 2] + observation[:, 3] > 0).astype(np.int64)


def lean(observation: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """CartPole: follows the angle alone, and falls sooner or later according to the start."""
    return (observation[:, 2] > 0).astype(np.int64)


def at_random(observation: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """Countdown: any of the three actions."""
    assert rng is not None
    return rng.integers(3, size=len(observation))


def make_dataset(envs: gym.vector.VectorEnv, policy: Any = at_random, n_step: int = 1, seed: int = 0, **options: int):
    memory = ReplayMemory(
        capacity=100_000,
        num_envs=envs.num_envs,
        observation_space=envs.single_observation_space,
        gamma=GAMMA,
        n_step=n_step,
        seed=seed,
    )
    defaults = {
        "steps_per_iteration": 1,
        "updates_per_iteration": 1,
        "batch_size": 8,
        "warmup_env_steps": 0,
        "epoch_env_steps": 100,
    }
    return ReplayDataset(envs=envs, memory=memory, policy=stateless(policy), seed=seed, **(defaults | options))


def countdown(num_envs: int = 1, **options: Any) -> ReplayDataset:
    return make_dataset(make_vector_env(EnvSettings("TestCountdown-v0"), num_envs, "sync"), **options)


def written_by(dataset: ReplayDataset) -> list[list[Written]]:
    """What each Countdown wrote down."""
    return [env.unwrapped.written for env in dataset.envs.envs]


def take(dataset: ReplayDataset, iterations: int) -> list[Transition]:
    """So many iterations, over as many epochs as they need."""
    taken: list[Transition] = []
    while len(taken) < iterations:
        taken += islice(dataset, iterations - len(taken))
    return taken


def draw_all(memory: ReplayMemory) -> Transition:
    """Each row that can be drawn, once: 40 draws a row miss one of them with a chance of e^-40 only."""
    batch = memory.sample(1, 40 * len(memory))
    _, firsts = np.unique(batch.index.numpy(), return_index=True)
    return Transition(*(field[0, firsts] for field in batch))


def transitions(memory: ReplayMemory) -> set[tuple[Any, ...]]:
    """All that can be drawn, as (observation, action, reward, discount, next observation)."""
    batch = draw_all(memory)
    columns = (batch.observation, batch.action, batch.reward, batch.discount, batch.next_observation)
    return {
        (tuple(observation), action, reward, round(discount, 5), tuple(following))
        for observation, action, reward, discount, following in zip(*(c.tolist() for c in columns), strict=True)
    }


def one_step(written: list[list[Written]]) -> set[tuple[Any, ...]]:
    """What one-step transitions the written steps make: discount 0 after a termination, gamma elsewhere."""
    return {
        (one.observation, one.action, one.reward, 0.0 if one.terminated else GAMMA, one.next_observation)
        for steps in written
        for one in steps
    }


def assert_same_to_the_bit(ones: list[Transition], others: list[Transition]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("num_envs", "steps", "epoch_env_steps", "length"),
    # 2500 / (4 * 3) = 208.3 and 100 / 16 = 6.25: whole iterations, rounded up
    [(1, 1, 2500, 2500), (1, 3, 100, 34), (4, 3, 2500, 209), (16, 1, 100, 7), (16, 3, 48, 1)],
)
def test_the_length_is_the_number_of_iterations_in_an_epoch(num_envs, steps, epoch_env_steps, length):
    dataset = countdown(num_envs, steps_per_iteration=steps, epoch_env_steps=epoch_env_steps)
    assert len(dataset) == length
    if length < 50:
        assert len(list(dataset)) == length


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("num_envs", [1, 4, 16])
def test_the_clock_stays_within_one_step_of_each_environment(num_envs, steps):
    dataset = countdown(num_envs, steps_per_iteration=steps, epoch_env_steps=60 * num_envs * steps)
    for iteration, _ in enumerate(dataset, start=1):
        played = sum(len(steps) for steps in written_by(dataset))
        assert dataset.env_steps == played
        assert abs(dataset.env_steps - iteration * num_envs * steps) < num_envs


@pytest.mark.parametrize(("num_envs", "warmup"), [(1, 10), (4, 30), (1, 0)])
def test_batches_are_empty_until_the_memory_is_warm(num_envs, warmup):
    dataset = countdown(num_envs, warmup_env_steps=warmup, updates_per_iteration=3, batch_size=5)
    shapes = []
    for batch in dataset:
        expected = 3 if dataset.env_steps >= warmup else 0
        assert tuple(batch.observation.shape) == (expected, 5, 2)
        assert {tuple(field.shape[:2]) for field in batch} == {(expected, 5)}
        shapes.append(expected)
    assert shapes.count(0) == (0 if warmup == 0 else 9 if num_envs == 1 else shapes.index(3))
    assert shapes == sorted(shapes)
    assert shapes[-1] == 3


def test_no_minibatch_is_drawn_before_its_n_steps_are_played():
    dataset = countdown(n_step=3, warmup_env_steps=0)
    # with 2 rewards no row has its 3, with the third slot the first has
    assert [len(batch.observation) for batch in take(dataset, 2)] == [0, 0]
    take(dataset, 2)
    assert len(dataset.memory) >= 1


def test_the_batches_of_an_iteration_hold_what_was_just_played():
    dataset = countdown()
    for batch in take(dataset, 40):
        possible = one_step(written_by(dataset))
        first = Transition(*(field[0, :1] for field in batch))
        drawn = (tuple(first.observation[0].tolist()), int(first.action), float(first.reward))
        assert drawn in {one[:3] for one in possible}
        # the step played last can be drawn at once
        assert len(dataset.memory) == dataset.env_steps


def test_a_second_iterator_resumes_where_the_first_stopped():
    whole, halves, broken_off = (countdown(3, epoch_env_steps=steps) for steps in (120, 60, 120))
    expected = list(whole)
    assert len(expected) == 40
    assert_same_to_the_bit(list(halves) + list(halves), expected)
    # as when Lightning stops within an epoch
    assert_same_to_the_bit(take(broken_off, 7) + take(broken_off, 33), expected)
    assert whole.env_steps == halves.env_steps == broken_off.env_steps
    assert whole.episodes.returns == halves.episodes.returns == broken_off.episodes.returns
    assert written_by(whole) == written_by(halves) == written_by(broken_off)


def test_the_seed_decides_what_is_played():
    first, same, other = (countdown(2, seed=seed) for seed in (1, 1, 2))
    assert_same_to_the_bit(take(first, 30), take(same, 30))
    take(other, 30)
    assert written_by(first) == written_by(same)
    assert written_by(first) != written_by(other)


@pytest.mark.parametrize(
    ("env_id", "num_envs", "vectorization", "policy"),
    [
        ("TestCountdown-v0", 1, "sync", at_random),
        ("TestCountdown-v0", 4, "sync", at_random),
        ("CartPole-v1", 4, "sync", balance_or_fall),
        ("CartPole-v1", 4, "vector_entry_point", balance_or_fall),
    ],
)
def test_the_history_equals_the_sums_of_recorded_rewards(env_id, num_envs, vectorization, policy):
    envs = Recorder(make_vector_env(EnvSettings(env_id), num_envs, vectorization))
    dataset = make_dataset(envs, policy, epoch_env_steps=1200)
    take(dataset, len(dataset))
    assert len(dataset.episodes) > 10
    assert dataset.episodes.returns == envs.returns
    assert dataset.episodes.lengths == envs.lengths
    assert dataset.episodes.env_steps == envs.ends


@pytest.mark.parametrize("vectorization", ["sync", "vector_entry_point"])
def test_cartpole_bootstraps_from_the_true_last_observation_of_cut_episodes(vectorization):
    envs = Recorder(make_vector_env(EnvSettings("CartPole-v1", {"max_episode_steps": 30}), 4, vectorization))
    dataset = make_dataset(envs, balance_or_fall, epoch_env_steps=600)
    take(dataset, len(dataset))
    # each end was seen often, so the comparison below is of both
    assert min(envs.outcomes["terminated"], envs.outcomes["truncated"]) >= 5
    assert transitions(dataset.memory) == one_step(envs.written)


def test_three_step_returns_stay_within_the_episodes_that_the_environments_wrote_down():
    dataset = countdown(3, n_step=3)
    take(dataset, 100)
    expected = {}
    for steps in written_by(dataset):
        for i, one in enumerate(steps):
            # same start, so same episode
            run = [other for other in steps[i : i + 3] if other.observation[0] == one.observation[0]]
            reward = sum(GAMMA**k * step.reward for k, step in enumerate(run))
            discount = 0 if run[-1].terminated else GAMMA ** len(run)
            expected[one.observation] = (one.action, pytest.approx(reward), pytest.approx(discount), run[-1][-1])
    drawn = {observation: tuple(rest) for observation, *rest in transitions(dataset.memory)}
    # the last two slots of each environment lack rewards; a reset may be one of them
    assert dataset.env_steps - 2 * 3 <= len(drawn) <= dataset.env_steps
    assert drawn == {observation: expected[observation] for observation in drawn}


@pytest.mark.parametrize("num_envs", [1, 4])
def test_a_loaded_dataset_has_the_clock_the_history_and_the_memory(num_envs):
    played, fresh = countdown(num_envs), countdown(num_envs, seed=5)
    take(played, 33)
    held = fresh.episodes
    fresh.load_state_dict(through_a_checkpoint(played.state_dict(with_envs=False)))
    assert fresh.env_steps == played.env_steps
    assert len(fresh.episodes) > 3
    assert fresh.episodes.returns == played.episodes.returns
    assert fresh.episodes.lengths == played.episodes.lengths
    assert fresh.episodes.env_steps == played.episodes.env_steps
    assert held is fresh.episodes, "loaded in place: callbacks hold it"
    assert_same_to_the_bit([fresh.memory.sample(2, 50)], [played.memory.sample(2, 50)])


def test_the_clock_keeps_its_pace_over_many_checkpoints():
    dataset, behind = countdown(4, steps_per_iteration=3), 0
    for iteration in range(1, 40):
        take(dataset, 1)
        state, dataset = dataset.state_dict(with_envs=False), countdown(4, steps_per_iteration=3, seed=iteration)
        dataset.load_state_dict(state)
        assert abs(dataset.env_steps - iteration * 12) < 4
        behind += dataset.env_steps != iteration * 12
    # steps were owed at many of the checkpoints, so that forgetting them would have shown
    assert behind > 10


def test_loading_into_a_dataset_that_has_played_starts_new_episodes():
    played = countdown(3)
    take(played, 21)
    state = played.state_dict(with_envs=False)
    used, fresh = countdown(3, seed=5), countdown(3, seed=6)
    take(used, 10)
    # some are resetting and others under way, with rewards in their sums
    assert 0 < sum(steps[-1].next_observation[1] < 5 and not steps[-1].terminated for steps in written_by(used)) < 3
    used.load_state_dict(state)
    fresh.load_state_dict(state)
    assert_same_to_the_bit(take(used, 30), take(fresh, 30))
    assert used.episodes.returns == fresh.episodes.returns
    assert used.episodes.lengths == fresh.episodes.lengths
    assert used.env_steps == fresh.env_steps


@pytest.mark.parametrize("n_step", [1, 3])
def test_interrupted_episodes_are_kept_as_truncated(n_step):
    played, fresh = countdown(4, n_step=n_step), countdown(4, n_step=n_step)
    take(played, 21)
    fresh.load_state_dict(played.state_dict(with_envs=False))
    take(fresh, 10)
    under_way = [
        steps[-1]
        for steps, observation in zip(written_by(played), played.envs.envs, strict=True)
        if not steps[-1].terminated and steps[-1].next_observation[1] < 5
        # the environment's newest start belongs to the step, so it is not a reset that waits for its first step
        if observation.unwrapped.resets[-1][0] == steps[-1].observation[0]
    ]
    assert under_way
    drawn = {observation: rest for observation, *rest in transitions(fresh.memory)}
    for step in under_way:
        assert drawn[step.observation] == [step.action, step.reward, GAMMA, step.next_observation]
        # nobody acted on what was seen last
        assert step.next_observation not in drawn
    # a next observation has the start of its episode, wherever the cut was
    assert all(observation[0] == rest[-1][0] for observation, rest in drawn.items())
    assert len(drawn) >= fresh.env_steps - 4 * (n_step - 1)


def test_the_history_after_an_interruption_counts_new_episodes_from_zero():
    played = countdown(3)
    take(played, 21)
    fresh = make_dataset(Recorder(make_vector_env(EnvSettings("TestCountdown-v0"), 3, "sync")))
    fresh.load_state_dict(played.state_dict(with_envs=False))
    before = len(fresh.episodes)
    take(fresh, 40)
    assert len(fresh.envs.returns) > 5
    assert fresh.episodes.returns[before:] == fresh.envs.returns
    assert fresh.episodes.lengths[before:] == fresh.envs.lengths
    assert [end - played.env_steps for end in fresh.episodes.env_steps[before:]] == fresh.envs.ends


@pytest.fixture
def make_episodes() -> Iterator[Any]:
    made = []

    def make(env_id: str, policy: Any, **options: Any) -> EpisodeDataset:
        defaults = {"num_episodes": 20, "seed": 0, "max_episode_steps": 1000}
        made.append(EpisodeDataset(EnvSettings(env_id), stateless(policy), **(defaults | options)))
        return made[-1]

    yield make
    for dataset in made:
        dataset.close()


def first_action(observation: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    assert rng is None
    return np.zeros(len(observation), np.int64)


def results(dataset: EpisodeDataset) -> list[tuple[float, float]]:
    return sorted((float(episode.episode_return), float(episode.episode_length)) for episode in dataset)


@pytest.mark.parametrize("num_episodes", [1, 5, 16, 23])
def test_exactly_the_episodes_asked_for_are_played(make_episodes, num_episodes):
    dataset = make_episodes("TestCountdown-v0", first_action, num_episodes=num_episodes)
    episodes = list(dataset)
    assert len(episodes) == len(dataset) == num_episodes
    # each played once and to its end, as the environment with its seed tells: 1 to 8 steps, cut at 5
    expected = []
    for seed in range(num_episodes):
        env = Countdown()
        env.reset(seed=seed)
        expected.append(min(env.length, 5))
    assert sorted(int(episode.episode_length) for episode in episodes) == sorted(expected)


@pytest.mark.parametrize(("num_episodes", "world_size"), [(7, 3), (20, 2), (4, 4)])
def test_ranks_share_the_episodes_of_an_evaluation_out(make_episodes, num_episodes, world_size):
    whole = make_episodes("TestCountdown-v0", first_action, num_episodes=num_episodes)
    shares = [
        make_episodes("TestCountdown-v0", first_action, num_episodes=num_episodes, sync=Sync(rank, world_size))
        for rank in range(world_size)
    ]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    # an evaluation without an episode would be left out by Lightning, and waited for by the other ranks
    assert min(map(len, shares)) >= 1
    assert sorted(itertools.chain(*map(results, shares))) == results(whole)


def test_more_ranks_than_episodes_are_rejected_on_all_of_them(make_episodes):
    for rank in range(3):
        with pytest.raises(MisconfigurationException, match=r"eval_episodes=2: each of 3 ranks plays at least one"):
            make_episodes("TestCountdown-v0", first_action, num_episodes=2, sync=Sync(rank, 3))


@pytest.mark.parametrize(("env_id", "policy"), [("CartPole-v1", lean), ("TestCountdown-v0", first_action)])
def test_the_result_does_not_depend_on_how_many_are_played_side_by_side(make_episodes, monkeypatch, env_id, policy):
    found = []
    for parallel in (1, 3, 16):
        monkeypatch.setattr("lightning_dqn.evaluation.PARALLEL_ENVS", parallel)
        seen = []

        def watched(observation, rng=None, seen=seen):
            seen.append(len(observation))
            return policy(observation)

        found.append(results(make_episodes(env_id, watched)))
        assert max(seen) == parallel
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) > 3


def test_the_same_seed_plays_the_same_episodes_in_each_pass(make_episodes):
    first, same, other = (make_episodes("CartPole-v1", lean, seed=seed) for seed in (7, 7, 1007))
    # a pass that is abandoned does not change the next
    next(iter(first))
    expected = results(first)
    assert results(first) == expected
    assert results(same) == expected
    assert results(other) != expected


class Remembering(gym.Env):
    """Its rewards come from a generator that no seed reaches and every episode moves on."""

    observation_space = spaces.Box(-50, 50, (1,), np.float32)
    action_space = spaces.Discrete(2)
    opened = 0

    def __init__(self) -> None:
        self.rng = np.random.default_rng(7)
        Remembering.opened += 1

    def reset(self, *, seed: int | None = None, options: Any = None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: int):
        self.time += 1
        return np.zeros(1, np.float32), float(self.rng.normal()), self.time == 5, False, {}

    def close(self) -> None:
        Remembering.opened -= 1


gym.register("TestRemembering-v0", Remembering)


def test_what_an_environment_keeps_between_episodes_does_not_reach_the_next_pass(make_episodes):
    dataset = make_episodes("TestRemembering-v0", first_action)
    assert Remembering.opened == 0
    first = results(dataset)
    assert results(dataset) == first == results(make_episodes("TestRemembering-v0", first_action))
    # 16 first episodes, and 4 second ones
    assert len(set(first)) == 2


def test_environments_are_closed_with_their_pass_also_if_it_is_abandoned_or_raises(make_episodes):
    def failing(observation, rng=None):
        raise OSError("no policy")

    dataset, broken = (make_episodes("TestRemembering-v0", policy) for policy in (first_action, failing))
    results(dataset)
    assert Remembering.opened == 0
    with pytest.raises(OSError, match="no policy"):
        results(broken)
    assert Remembering.opened == 0
    abandoned = iter(dataset)
    next(abandoned)
    assert Remembering.opened == 16
    dataset.close()
    assert Remembering.opened == 0


def test_episodes_are_cut_at_the_limit(make_episodes):
    assert results(make_episodes("CartPole-v1", balance, max_episode_steps=25)) == [(25.0, 25.0)] * 20
    # and those that end before are not
    uncut = results(make_episodes("TestCountdown-v0", first_action))
    cut = results(make_episodes("TestCountdown-v0", first_action, max_episode_steps=3))
    assert [length for _, length in cut] != [3.0] * 20
    assert sorted(length for _, length in cut) == sorted(min(length, 3.0) for _, length in uncut)


def test_kept_steps_are_those_that_were_played(make_episodes):
    dataset = make_episodes("TestCountdown-v0", first_action, keep_steps=True, num_episodes=23)
    starts = {}
    for seed in range(23):
        env = make_env(EnvSettings("TestCountdown-v0"))
        observation, _ = env.reset(seed=seed)
        starts[tuple(observation.tolist())] = env
    for episode in dataset:
        length = int(episode.episode_length)
        assert episode.observation.shape == (length, 2)
        assert episode.action.shape == episode.reward.shape == (length,)
        assert float(episode.reward.sum()) == float(episode.episode_return)
        # the same actions in an environment with the same seed
        env = starts.pop(tuple(episode.observation[0].tolist()))
        for t in range(length):
            assert tuple(episode.observation[t].tolist()) == tuple(env.unwrapped.observe().tolist())
            _, reward, terminated, truncated, _ = env.step(int(episode.action[t]))
            assert float(episode.reward[t]) == reward
            assert (terminated or truncated) == (t == length - 1)
    assert not starts


def test_episodes_carry_no_steps_where_nobody_asked(make_episodes):
    for episode in make_episodes("CartPole-v1", lean, num_episodes=3):
        assert len(episode.observation) == len(episode.action) == len(episode.reward) == 0
        assert float(episode.episode_return) == float(episode.episode_length) > 5


def test_an_environment_that_takes_no_render_mode_can_be_played(make_episodes):
    plain, same = (make_episodes(f"Test{name}-v0", first_action) for name in ("Plain", "Countdown"))
    assert results(plain) == results(same)


class StepsSinceReset:
    """A policy whose state (N, 1) counts the observations of each episode, and which records what it is given."""

    def __init__(self):
        self.seen = []

    def __call__(self, observation, state, first, rng=None, action_mask=None):
        state = torch.zeros(len(observation), 1) if state is None else state
        state = torch.where(torch.from_numpy(first)[:, None], 0.0, state) + 1
        self.seen.append((observation.copy(), state.flatten().tolist()))
        return np.ones(len(observation), np.int64), state


@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_state_of_a_policy_restarts_with_each_episode_and_is_in_the_checkpoint(num_envs):
    policy, other_policy = StepsSinceReset(), StepsSinceReset()

    def make(policy):
        envs = make_vector_env(EnvSettings("CartPole-v1"), num_envs, "sync")
        return Collector(envs=envs, policy=policy, seed=0)

    collector = make(policy)
    collector.start()
    expected = np.ones(num_envs)
    for _ in range(40):
        resetting = collector.resetting.copy()
        collector.step()
        assert policy.seen[-1][1] == expected.tolist()
        expected = np.where(resetting, 1, expected + 1)
    other = make(other_policy)
    other.load_state_dict(collector.state_dict())
    for _ in range(15):
        collector.step()
        other.step()
    for (_, state), (_, same) in zip(policy.seen[-15:], other_policy.seen, strict=True):
        assert state == same
    assert {1.0, 5.0} < set(np.concatenate([state for _, state in policy.seen]))
    collector.envs.close()
    other.envs.close()


def test_the_state_of_a_policy_follows_its_episode_in_an_evaluation():
    policy = StepsSinceReset()
    dataset = EpisodeDataset(EnvSettings("CartPole-v1"), policy, num_episodes=20, seed=0, max_episode_steps=9)
    lengths = sorted(int(episode.episode_length) for episode in dataset)
    counts = [count for _, state in policy.seen for count in state]
    # each episode of length L counts 1 to L
    assert sorted(counts) == sorted(count for length in lengths for count in range(1, length + 1))
    assert len(set(lengths)) > 1
