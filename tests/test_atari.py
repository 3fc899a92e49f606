"""Atari games: both forms of one are the same game, and only learning sees clipped rewards."""

import importlib

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv
from toys import stateless, through_a_checkpoint

from lightning_dqn import DQNDataModule
from lightning_dqn.collector import Collector
from lightning_dqn.data import ReplayDataset
from lightning_dqn.envs import EnvSettings, make_env, make_vector_env
from lightning_dqn.replay import ReplayMemory
from lightning_dqn.resume.content import CheckpointError
from lightning_dqn.resume.env_state import Reached, env_state, restore_env_state, unsupported_reason

pytestmark = pytest.mark.integration

CLASSICAL = {"repeat_action_probability": 0.0, "noop_max": 0}
BREAKOUT = EnvSettings("ALE/Breakout-v5", CLASSICAL, frame_stack=4)


def play(envs, seed, actions):
    """What many games show, one entry a step: observation, reward, terminated, truncated."""
    seen = [envs.reset(seed=seed)[0]]
    for action in actions:
        seen += [np.array(part) for part in envs.step(action)[:4]]
    envs.close()
    return seen


def test_a_game_is_the_same_in_both_forms_to_the_last_pixel():
    # chance-free games: the two forms draw sticky actions and no-ops from generators of their own
    rng = np.random.default_rng(0)
    games, game = make_vector_env(BREAKOUT, 1), make_env(BREAKOUT)
    shown, alone = games.reset(seed=3)[0][0], game.reset(seed=3)[0]
    assert games.single_observation_space == game.observation_space
    assert games.single_action_space == game.action_space
    assert np.array_equal(shown, alone)
    # before the first frame there is nothing
    assert not shown[:3].any()
    rewards, over = [], False
    while not over:
        action = int(rng.integers(4))
        [shown], [reward], [ended], [cut], _ = games.step(np.array([action]))
        alone, true_reward, over, _, _ = game.step(action)
        assert np.array_equal(shown, alone)
        assert (reward, ended, cut) == (np.clip(true_reward, -1, 1), over, False)
        rewards.append(true_reward)
        assert len(rewards) < 2000
    assert sum(rewards) > 0


def test_learning_sees_clipped_rewards_and_evaluation_true_ones():
    # firing at SpaceInvaders from where one stands brings 5 to 30 points a hit
    def rewards(settings, envs):
        hits = [part[0] for part in play(envs(settings), 0, [np.array([1])] * 300)[2::4]]
        return {float(hit) for hit in hits}

    clipped = EnvSettings("ALE/SpaceInvaders-v5", CLASSICAL)
    true = EnvSettings("ALE/SpaceInvaders-v5", {**CLASSICAL, "reward_clipping": False})
    assert rewards(clipped, lambda settings: make_vector_env(settings, 1)) == {0.0, 1.0}
    assert rewards(clipped, lambda settings: make_vector_env(settings, 1, "sync")) == {0.0, 1.0}
    assert max(rewards(true, lambda settings: make_vector_env(settings, 1))) > 1.0
    game = make_env(clipped)
    game.reset(seed=0)
    assert max(game.step(1)[1] for _ in range(300)) > 1.0


def test_a_lost_life_ends_an_episode_to_learn_from_and_the_game_continues():
    settings = EnvSettings("ALE/Breakout-v5", {**CLASSICAL, "episodic_life": True}, frame_stack=4)
    games = make_vector_env(settings, 1)
    shown, _ = games.reset(seed=0)
    lives_at_an_end, frames_of_a_life = [], [shown[0, -1]]
    over = False
    for _ in range(400):
        # fire, and let the ball go
        shown, _, terminated, _, info = games.step(np.array([1]))
        frames_of_a_life = [shown[0, -1]] if over else [*frames_of_a_life, shown[0, -1]]
        nothing = [np.zeros((84, 84), np.uint8)] * 3
        assert np.array_equal(shown[0], np.stack([*nothing, *frames_of_a_life][-4:]))
        over = terminated[0]
        if over:
            lives_at_an_end.append(int(info["lives"][0]))
    assert lives_at_an_end[:7] == [4, 3, 2, 1, 0, 4, 3]
    game = make_env(settings)
    game.reset(seed=0)
    first_end = next(info["lives"] for *_, over, _, info in iter(lambda: game.step(1), None) if over)
    assert first_end == 0
    with pytest.raises(ValueError, match=r"env_kwargs\.episodic_life=True: .*vectorization=auto"):
        make_vector_env(settings, 2, "sync")


@pytest.mark.parametrize(
    ("kwargs", "num_actions"), [({}, 6), ({"full_action_space": False}, 6), ({"full_action_space": True}, 18)]
)
def test_actions_are_those_that_the_game_knows_or_all(kwargs, num_actions):
    settings = EnvSettings("ALE/Pong-v5", kwargs)
    assert make_env(settings).action_space.n == num_actions
    assert make_vector_env(settings, 2).single_action_space.n == num_actions


def test_sticky_actions_are_those_of_v5_unless_told_otherwise():
    def frames_apart(settings):
        games = make_vector_env(settings, 2)
        # the same episode twice but for the generator of what sticks
        first, second = games.reset(seed=5)[0]
        assert np.array_equal(first, second)
        apart = 0
        for action in np.random.default_rng(0).integers(6, size=60):
            first, second = games.step(np.array([action, action]))[0]
            apart += not np.array_equal(first, second)
        return apart

    assert frames_apart(EnvSettings("ALE/Pong-v5", {"noop_max": 0})) > 0
    assert frames_apart(EnvSettings("ALE/Pong-v5", CLASSICAL)) == 0


def test_a_film_shows_each_step_in_colour_for_as_long_as_it_lasts():
    game = make_env(EnvSettings("ALE/Breakout-v5", frame_stack=4), render_mode="rgb_array")
    game.reset(seed=0)
    picture = game.render()
    assert picture.shape == (210, 160, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 5
    # four frames of 60 a second
    assert game.metadata["render_fps"] == 15


@pytest.mark.parametrize("make", [make_env, lambda settings: make_vector_env(settings, 2)])
def test_an_argument_that_no_game_takes_is_rejected_by_name(make):
    with pytest.raises(ValueError, match=r"env_kwargs=\{'lives': 9\}: an Atari game got an unexpected .* 'lives'"):
        make(EnvSettings("ALE/Pong-v5", {"lives": 9}))


def test_games_that_are_not_installed_are_named_with_their_extra(monkeypatch):
    def missing(name, *_):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r'needs ale_py: pip install "lightning_dqn\[atari\]"'):
        make_env(EnvSettings("ALE/Pong-v5"))


def test_minatar_registers_itself():
    envs = make_vector_env(EnvSettings("MinAtar/Breakout-v1"), 2)
    assert envs.single_observation_space.shape == (10, 10, 4)
    assert envs.reset(seed=0)[0].dtype == np.bool_


def constant_policy(observation, rng=None):
    return np.full(len(observation), 1)


def replay(envs, **options):
    space = envs.single_observation_space
    memory = ReplayMemory(capacity=400, num_envs=envs.num_envs, observation_space=space, gamma=0.99)
    defaults = {"steps_per_iteration": 1, "updates_per_iteration": 1, "batch_size": 4, "warmup_env_steps": 0}
    return ReplayDataset(
        envs=envs, memory=memory, policy=stateless(constant_policy), seed=0, epoch_env_steps=60, **(defaults | options)
    )


@pytest.mark.parametrize("vectorization", ["auto", "async"])
def test_steps_that_overlap_with_learning_are_the_same_steps(vectorization):
    # a policy that never learns makes both the same, but for the step that is under way
    settings = EnvSettings("ALE/Breakout-v5") if vectorization == "auto" else EnvSettings("CartPole-v1")
    apart, overlapping = (
        replay(make_vector_env(settings, 2, vectorization), overlap=overlap) for overlap in (False, True)
    )
    for one, other in zip(apart, overlapping, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert apart.env_steps == overlapping.env_steps
    for dataset in (apart, overlapping):
        dataset.envs.close()


def test_the_environments_are_under_way_while_the_batch_is_learnt_from():
    envs = make_vector_env(EnvSettings("CartPole-v1"), 2, "async")
    assert isinstance(envs, AsyncVectorEnv)
    batches = iter(replay(envs, overlap=True))
    next(batches)
    assert envs._state.value == "step"
    next(batches)
    envs.close()


def test_overlap_with_environments_that_cannot_step_by_themselves_is_rejected():
    with pytest.raises(ValueError, match=r"overlap=True: environments of vectorization=auto .* use async"):
        DQNDataModule(overlap=True)
    with pytest.raises(ValueError, match=r"overlap=True: environments of vectorization=sync"):
        DQNDataModule(env_id="ALE/Pong-v5", vectorization="sync", overlap=True)
    envs = make_vector_env(EnvSettings("CartPole-v1"), 2)
    with pytest.raises(ValueError, match=r"overlap=True: CartPoleVectorEnv has no asynchronous step"):
        Collector(envs=envs, policy=stateless(constant_policy), seed=0, overlap=True)


def test_wrappers_and_stacks_are_the_same_in_play_and_in_evaluation():
    def wrap(env):
        return gym.wrappers.TransformReward(env, lambda reward: 10 * reward)

    settings = EnvSettings("CartPole-v1", wrappers=(wrap,), frame_stack=3)
    env, envs = make_env(settings), make_vector_env(settings, 2, "sync")
    assert env.observation_space.shape == envs.single_observation_space.shape == (3, 4)
    first, _ = env.reset(seed=0)
    assert not first[:2].any()
    assert env.step(0)[1] == 10
    envs.reset(seed=0)
    assert envs.step(np.array([0, 0]))[1].tolist() == [10, 10]
    with pytest.raises(ValueError, match="wrappers and frame_stack are for single environments; use sync or async"):
        make_vector_env(settings, 2, "vector_entry_point")


def step_on(games, actions):
    """All that steps show, to the bit."""
    return [[part.tobytes() for part in games.step(np.array(action))[:4]] for action in actions]


class Followed:
    """Games that are stepped one by one, and where they are, as a `Collector` knows it."""

    def __init__(self, settings, num_envs, seed):
        self.games = make_vector_env(settings, num_envs, "sync")
        self.observation, _ = self.games.reset(seed=seed)
        self.returns, self.lengths = np.zeros(num_envs), np.zeros(num_envs, np.int64)
        self.ended = np.zeros(num_envs, np.bool_)

    def step(self, actions):
        for action in actions:
            self.lengths += ~self.ended
            self.observation, reward, terminated, truncated, _ = self.games.step(action)
            self.ended = terminated | truncated
            self.returns = np.where(self.ended, 0, self.returns + reward)
            self.lengths = np.where(self.ended, 0, self.lengths)

    def moved(self, settings):
        """Other games, brought to where these are through a checkpoint."""
        games = make_vector_env(settings, self.games.num_envs, "sync")
        reached = Reached(self.observation, self.returns, self.lengths, self.ended)
        state = through_a_checkpoint(env_state(self.games))
        assert not restore_env_state(games, state, "envs", reached).any()
        return games, state


@pytest.mark.parametrize(("env_id", "before", "after"), [("ALE/Pong-v5", 60, 100), ("ALE/Breakout-v5", 350, 300)])
def test_games_that_are_stepped_one_by_one_resume_bitwise(env_id, before, after):
    # sticky actions, up to 30 no-ops at a start
    settings = EnvSettings(env_id, frame_stack=4)
    followed = Followed(settings, 2, seed=3)
    actions = np.random.default_rng(0).integers(4, size=(before + after, 2))
    followed.step(actions[:before])
    again, state = followed.moved(settings)
    expected = step_on(followed.games, actions[before:])
    assert step_on(again, actions[before:]) == expected
    if env_id == "ALE/Breakout-v5":
        assert [len(resets) > 0 for resets in state["resets"]] == [True, True], "in a game that was not seeded itself"
        ends = [np.frombuffer(ended, np.bool_) for _, _, ended, _ in expected]
        assert np.all(np.sum(ends, axis=0) >= 1), "lives were lost, games restarted"
    # and nothing else would have done
    again.reset(seed=3)
    assert step_on(again, actions[before:]) != expected


def test_a_game_is_seeded_again_after_enough_actions(monkeypatch):
    monkeypatch.setattr("lightning_dqn.envs.factory.ATARI_RESEED_AFTER", 300)
    settings = EnvSettings("ALE/Breakout-v5", frame_stack=4)
    followed = Followed(settings, 1, seed=3)
    actions = np.random.default_rng(0).integers(4, size=(900, 1))
    numbers = []
    for start in range(0, 900, 150):
        followed.step(actions[start : start + 150])
        again, state = followed.moved(settings)
        numbers += state["numbers"]
        # the same generator, which the next games draw from
        for action in actions[:50]:
            followed.step([action])
            assert np.array_equal(followed.observation, again.step(action)[0])
    assert numbers[0] == 0
    assert numbers[-1] >= 2


@pytest.mark.parametrize(
    ("env_id", "stickiness"), [("ALE/Qbert-v5", 0.0), ("ALE/TicTacToe3D-v5", 0.0), ("ALE/Pong-v5", 0.9)]
)
def test_what_an_emulator_leaves_out_of_its_state_resumes_bitwise(env_id, stickiness):
    # what it draws lines by, or the action that sticks
    settings = EnvSettings(env_id, {"frameskip": 1, "noop_max": 0, "repeat_action_probability": stickiness})
    followed = Followed(settings, 1, seed=0)
    actions = np.random.default_rng(0).integers(6, size=(75, 1)) % followed.games.single_action_space.n
    for moment in range(0, 75, 15):
        followed.step(actions[moment : moment + 9])
        again, _ = followed.moved(settings)
        rest = actions[moment + 9 : moment + 15]
        shown = [again.step(action)[0] for action in rest]
        for action, expected in zip(rest, shown, strict=True):
            followed.step([action])
            assert np.array_equal(followed.observation, expected), moment


def test_only_games_that_are_stepped_one_by_one_have_a_state():
    settings = EnvSettings("ALE/Breakout-v5", frame_stack=4)
    assert unsupported_reason(make_vector_env(settings, 2, "sync")) is None
    assert "AtariVectorEnv" in unsupported_reason(make_vector_env(settings, 2))
    # an old id, by which a game comes without our protocol
    assert unsupported_reason(make_vector_env(EnvSettings("PongNoFrameskip-v4"), 1)) is None


def test_the_state_of_another_game_is_not_repeated():
    ids, all_actions = ("ALE/Pong-v5", "ALE/Breakout-v5"), {"full_action_space": True}
    followed = Followed(EnvSettings(ids[0], all_actions), 1, seed=0)
    followed.step([np.array([3])] * 10)
    breakout = make_vector_env(EnvSettings(ids[1], all_actions), 1, "sync")
    reached = Reached(followed.observation, followed.returns, followed.lengths, followed.ended)
    assert restore_env_state(breakout, env_state(followed.games), "envs", reached).all()
    followed.games.step(np.array([17]))
    with pytest.raises(CheckpointError, match=r"envs\.actions\[0\]"):
        restore_env_state(make_vector_env(EnvSettings(ids[0]), 1, "sync"), env_state(followed.games), "envs", reached)
