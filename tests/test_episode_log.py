"""An episode is (seed, actions): logs of environments, their replay, and states that were tampered with."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_action_masks import Walk
from test_replay_dataset import countdown, take, transitions
from toys import stateless, through_a_checkpoint

from lightning_dqn.collector import Collector
from lightning_dqn.data import ReplayDataset
from lightning_dqn.envs import EnvSettings, make_vector_env
from lightning_dqn.envs.episode_log import EpisodeLog
from lightning_dqn.replay import ReplayMemory
from lightning_dqn.resume.content import CheckpointError
from lightning_dqn.resume.dataset import restore_dataset
from lightning_dqn.resume.env_state import Reached, env_state, restore_env_state, unsupported_reason


def at_random(observation, rng=None, *mask):
    """Any of two actions."""
    return rng.integers(2, size=len(observation))


def make_player(env_id="CartPole-v1", num_envs=2, vectorization="sync", seed=0, policy=at_random, **options):
    envs = make_vector_env(EnvSettings(env_id), num_envs, vectorization)
    return Collector(envs=envs, policy=stateless(policy), seed=seed, **options)


def steps_of(collector, count):
    """All that the next steps show, to the bit."""
    if collector.observation is None:
        collector.start()
    return [[part.tobytes() for part in collector.step() if part is not None] for _ in range(count)]


def moved(collector, **options):
    """A player of other environments that continues from a checkpoint of this one."""
    state = through_a_checkpoint(collector.state_dict())
    other = make_player(num_envs=collector.envs.num_envs, seed=99, **options)
    assert not other.load_state_dict(state, "train").any()
    return other


class Dial(gym.Env):
    """Shows the sum of three actions at once, and a random number; ends after 6 steps."""

    observation_space = spaces.Box(-100, 100, (2,), np.float64)
    action_space = spaces.MultiDiscrete([3, 4, 5], start=[0, -1, 0])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.total, self.time = 0, 0
        return self._seen(), {"seed": seed}

    def step(self, action):
        self.total, self.time = self.total + int(action.sum()), self.time + 1
        return self._seen(), self.total / 10, self.time == 6, False, {}

    def _seen(self):
        return np.array([self.total, self.np_random.normal()])


def replayed(log, env):
    """Another log that has played the episodes of this one, and what it reached."""
    other = EpisodeLog(env, reseed_after=log.reseed_after)
    other.episode_log = copy.deepcopy(log.episode_log)
    while other.replay_for(10.0):
        pass
    return other, other.replay_result()


def test_every_episode_has_a_seed_of_its_own_and_its_actions_are_logged():
    env = EpisodeLog(Dial())
    seeds = [env.reset(seed=7)[1]["seed"]]
    for _ in range(2):
        env.step(np.array([1, -1, 4]))
        seeds.append(env.reset()[1]["seed"])
    env.step(np.array([2, 2, 0]))
    log = env.episode_log
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert (log.seed, log.number, log.length) == (7, 2, 1)
    assert log.actions.tolist() == [[2, 2, 0]]
    # the same sequence again, and another one
    assert EpisodeLog(Dial()).reset(seed=7)[1]["seed"] == seeds[0]
    assert EpisodeLog(Dial()).reset(seed=8)[1]["seed"] not in seeds


@pytest.mark.parametrize("reseed_after", [0, 20])
def test_a_replay_reaches_the_last_observation_and_return_bitwise(reseed_after):
    env, rng = EpisodeLog(Dial(), reseed_after=reseed_after), np.random.default_rng(0)
    observation, _ = env.reset(seed=3)
    total, over, unseeded = 0.0, False, 0
    for _ in range(60):
        if over:
            observation, info = env.reset()
            total, over = 0.0, False
            unseeded += info["seed"] is None
        other, (seen, episode_return) = replayed(env, Dial())
        assert seen.tobytes() == observation.tobytes()
        assert episode_return == total
        action = rng.integers([0, -1, 0], [3, 3, 5])
        observation, reward, over, *_ = env.step(action)
        assert other.step(action)[0].tobytes() == observation.tobytes()
        total += reward
    # a log of 20 actions ends with its fourth episode
    assert unseeded == (0 if reseed_after == 0 else 7)


def test_an_environment_that_fails_in_a_replay_has_no_result():
    env = EpisodeLog(Dial())
    env.reset(seed=0)
    env.step(np.array([0, 0, 0]))

    class Broken(Dial):
        def step(self, action):
            raise OSError("the simulator is gone")

    assert replayed(env, Broken())[1] is None


@pytest.mark.parametrize(
    ("env_id", "num_envs", "vectorization"),
    [
        ("CartPole-v1", 1, "auto"),
        ("CartPole-v1", 3, "sync"),
        ("CartPole-v1", 3, "async"),
        ("CartPole-v1", 3, "vector_entry_point"),
        pytest.param("LunarLander-v3", 2, "sync", marks=pytest.mark.integration),
        ("Blackjack-v1", 3, "sync"),
        ("TestCountdown-v0", 3, "sync"),
    ],
)
def test_environments_continue_bitwise_wherever_they_are_cut(env_id, num_envs, vectorization):
    options = {"env_id": env_id, "vectorization": vectorization}
    collector = make_player(num_envs=num_envs, **options)
    collector.start()
    cuts_at_an_end = 0
    for count in (0, 9, 1, 14, 23, 2, 12, -1, 3, -1):
        steps_of(collector, max(count, 0))
        while count < 0 and not collector.resetting.any():
            collector.step()
        cuts_at_an_end += int(collector.resetting.sum())
        other = moved(collector, **options)
        assert other.episodes == collector.episodes
        player_then = steps_of(collector, 25)
        assert steps_of(other, 25) == player_then
        collector.envs.close()
        collector = other
    assert cuts_at_an_end > 0
    collector.envs.close()


def test_a_step_under_way_is_kept_and_is_the_next_one_after_a_resume():
    options = {"vectorization": "async", "overlap": True}
    collector = make_player(**options)
    collector.start()
    ends = 0
    for _ in range(30):
        collector.send()
        state = collector.state_dict()
        # a state can be taken again, and disturbs nothing
        assert torch.equal(
            collector.state_dict()["under_way"]["pending"]["action"], state["under_way"]["pending"]["action"]
        )
        other = moved(collector, **options)
        first, second = collector.step(), other.step()
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first[:5], second[:5], strict=True))
        ends += int(collector.resetting.sum())
        assert other.episodes == collector.episodes
        assert np.array_equal(other.resetting, collector.resetting)
        collector.envs.close()
        collector = other
    assert ends > 0
    collector.envs.close()


class Clock(gym.Env):
    """Shows how many steps its process has made, unless it is told to be honest; ends after 9 steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = spaces.Discrete(2)
    steps, honest = 0, False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1), {}

    def step(self, action):
        self.time += 1
        Clock.steps += 1
        return np.array([self.time if Clock.honest else Clock.steps], float), 1.0, self.time == 9, False, {}


gym.register("TestClock-v0", Clock)
assert gym.spec("Walk-v0").entry_point is Walk


def make_replay(env_id, seed=0):
    envs = make_vector_env(EnvSettings(env_id), 2, "sync")
    memory = ReplayMemory(capacity=100, num_envs=2, observation_space=envs.single_observation_space, gamma=0.9)
    options = {"steps_per_iteration": 1, "updates_per_iteration": 0, "batch_size": 4, "warmup_env_steps": 0}
    return ReplayDataset(
        envs=envs, memory=memory, policy=stateless(at_random), seed=seed, epoch_env_steps=200, **options
    )


def test_an_episode_that_is_not_repeated_is_stored_as_truncated_and_a_new_one_begins(messages):
    played, fresh = make_replay("TestClock-v0"), make_replay("TestClock-v0", seed=5)
    # mid-episode: 4 of 9 steps
    take(played, 4)
    seen = played.collector.observation.copy()
    restore_dataset(fresh, through_a_checkpoint(played.state_dict()), with_envs=True)
    assert "[0, 1]" in messages[-1]
    assert fresh.collector.resetting.tolist() == [True, True]
    take(fresh, 2)
    rows = fresh.memory.state_dict()["rows"]
    assert rows["truncated"][:6].tolist() == [[False] * 2] * 3 + [[True] * 2] + [[False] * 2] * 2
    assert rows["terminated"][:6].sum() == 0
    # the last observation of the cut episode stands before the reset, which is no start
    assert rows["observation"][4].tolist() == seen.tolist()
    assert rows["playable"][:6].tolist() == [[True] * 2] * 4 + [[False] * 2] + [[True] * 2]
    assert rows["observation"][5].tolist() == [[0.0], [0.0]]
    # of which the history knows nothing
    assert len(fresh.episodes) == 0
    take(fresh, 9)
    assert fresh.episodes.lengths == [9, 9]


def test_an_episode_that_has_ended_counts_once_whether_or_not_it_is_repeated():
    played, fresh = make_replay("TestClock-v0"), make_replay("TestClock-v0", seed=5)
    take(played, 9)
    assert played.collector.resetting.all()
    fresh.load_state_dict(through_a_checkpoint(played.state_dict()))
    take(fresh, 9)
    assert fresh.episodes.lengths == [9] * 4
    assert fresh.memory.state_dict()["rows"]["truncated"].sum() == 0


def test_a_step_under_way_of_an_episode_that_is_not_repeated_is_truncated(monkeypatch):
    halves = {}

    def make(seed):
        envs = make_vector_env(EnvSettings("TestClock-v0"), 2, "sync")
        # two halves of a step in one process
        envs.send, envs.recv = (lambda action: halves.update(it=envs.step(action))), (lambda: halves["it"])
        return Collector(envs=envs, policy=stateless(at_random), seed=seed, overlap=True)

    collector, other = make(0), make(5)
    collector.start()
    steps_of(collector, 3)
    collector.send()
    missed = other.load_state_dict(through_a_checkpoint(collector.state_dict()))
    assert missed.tolist() == [True, True]
    assert not other.resetting.any(), "the step under way is stored first"
    assert other.step()[3].tolist() == [True, True]
    assert len(other.episodes) == 0
    assert other._lengths.tolist() == [0, 0]
    assert other.step()[4].tolist() == [[0.0], [0.0]], "a new episode"


def test_a_log_that_is_full_is_not_replayed_and_announced(monkeypatch, messages):
    for module in ("lightning_dqn.envs.episode_log", "lightning_dqn.resume.env_state"):
        monkeypatch.setattr(f"{module}.MAX_LOGGED_ACTIONS", 5)
    monkeypatch.setattr(Clock, "honest", True)
    collector = make_player("TestClock-v0")
    collector.start()
    steps_of(collector, 5)
    state = through_a_checkpoint(collector.state_dict())
    assert [len(actions) for actions in state["under_way"]["envs"]["actions"]] == [5, 5]
    other = make_player("TestClock-v0", seed=1)
    assert other.load_state_dict(state).tolist() == [True, True]
    # at its end there is nothing to replay
    steps_of(collector, 4)
    other = moved(collector, env_id="TestClock-v0")
    assert steps_of(other, 12) == steps_of(collector, 12)


def test_forms_that_have_no_state_to_give_are_named():
    cartpole = gym.make_vec("CartPole-v1", 2, "vector_entry_point")
    assert unsupported_reason(cartpole) is None
    own = type("OwnVectorEnv", (type(cartpole),), {"__module__": "somewhere"})
    assert "OwnVectorEnv" in unsupported_reason(own(2))
    cartpole.model = object()
    assert "CartPoleVectorEnv.model is a object" in unsupported_reason(cartpole)
    assert unsupported_reason(gym.vector.SyncVectorEnv([Clock])) is not None


def forge(path, value):
    """A change of a state at a path of keys."""

    def change(state):
        for key in path[:-1]:
            state = state[key]
        if callable(value):
            state[path[-1]] = value(state[path[-1]])
        else:
            state[path[-1]] = value
        return state

    return change


ENVS, UNDER_WAY = ("under_way", "envs"), ("under_way",)
HUGE = torch.zeros(1, dtype=torch.int64).expand(2**40)
FORGED = {
    "env_steps-type": ("env_steps", forge(("env_steps",), "5")),
    "env_steps-negative": ("env_steps", forge(("env_steps",), -1)),
    "due-endless": ("due", forge(("due",), 10**9)),
    "due-endless-debt": ("due", forge(("due",), -(10**9))),
    "due-float": ("due", forge(("due",), 0.0)),
    "warm_at": ("warm_at", forge(("warm_at",), 10**9)),
    "all_env_steps": ("all_env_steps", forge(("all_env_steps",), None)),
    "rng": ("rng.bit_generator", forge(("rng", "bit_generator"), "MT19937")),
    "rng-missing": ("rng", forge(("rng",), {})),
    "history-lengths": ("episodes.lengths", forge(("episodes", "lengths"), torch.zeros(3, dtype=torch.int64))),
    "history-dtype": ("episodes.returns", forge(("episodes", "returns"), lambda t: t.float())),
    "history-negative": ("episodes.env_steps", forge(("episodes", "env_steps"), lambda t: t - 10**6)),
    "history-huge": ("episodes.lengths", forge(("episodes", "lengths"), HUGE)),
    "under_way": ("under_way", forge(UNDER_WAY, [])),
    "observation-shape": ("under_way.observation", forge((*UNDER_WAY, "observation"), torch.zeros(2, 5))),
    "observation-dtype": ("under_way.observation", forge((*UNDER_WAY, "observation"), lambda t: t.double())),
    "observation-nan": ("under_way.observation", forge((*UNDER_WAY, "observation"), lambda t: t * torch.nan)),
    "resetting": ("under_way.resetting", forge((*UNDER_WAY, "resetting"), torch.zeros(2))),
    "lengths": ("under_way.lengths", forge((*UNDER_WAY, "lengths"), lambda t: t - 1000)),
    "returns": ("under_way.returns", forge((*UNDER_WAY, "returns"), lambda t: t + torch.inf)),
    "envs-object": ("under_way.envs", forge(ENVS, "envs")),
    "envs-missing": ("under_way.envs.seeds", forge(ENVS, {})),
    "envs-of-another-number": ("under_way.envs.seeds", forge((*ENVS, "seeds"), [1, 2, 3])),
    "seed-negative": ("under_way.envs.seeds[0]", forge((*ENVS, "seeds", 0), -1)),
    "seed-huge": ("under_way.envs.seeds[0]", forge((*ENVS, "seeds", 0), 2**80)),
    "seed-type": ("under_way.envs.seeds[0]", forge((*ENVS, "seeds", 0), "1")),
    "number": ("under_way.envs.numbers[1]", forge((*ENVS, "numbers", 1), 1.5)),
    "actions-outside": ("under_way.envs.actions[0]", forge((*ENVS, "actions", 0), lambda t: t + 5)),
    "actions-shape": ("under_way.envs.actions[0]", forge((*ENVS, "actions", 0), lambda t: t[:, 0])),
    "actions-type": ("under_way.envs.actions[0]", forge((*ENVS, "actions", 0), lambda t: t.float())),
    "actions-too-few": ("under_way.envs.actions[0]", forge((*ENVS, "actions", 0), lambda t: t[:-1])),
    "actions-huge": ("under_way.envs.actions[0]", forge((*ENVS, "actions", 0), HUGE[:, None])),
    "actions-too-many": ("under_way.envs.actions[0]", forge((*ENVS, "actions", 0), torch.zeros(250_001, 1).long())),
    "resets": ("under_way.envs.resets[1]", forge((*ENVS, "resets", 1), torch.tensor([1]))),
    "resets-descending": ("under_way.envs.resets[1]", forge((*ENVS, "resets", 1), torch.tensor([2, 1]))),
}


@pytest.mark.parametrize(("name", "change"), FORGED.values(), ids=FORGED)
def test_a_forged_state_is_rejected_by_the_name_of_its_value(name, change):
    dataset, other = make_replay("CartPole-v1"), make_replay("CartPole-v1")
    while (dataset.collector._lengths < 3).any() or not dataset.episodes.returns:
        take(dataset, 1)
    state = copy.deepcopy(dataset.state_dict())
    change(state)
    with pytest.raises(CheckpointError) as error:
        other.load_state_dict(state, "DQNDataModule.train")
    assert str(error.value).startswith(f"DQNDataModule.train.{name}")


NATIVE = {
    "array-missing": ("arrays.state", lambda s: s["arrays"].pop("state")),
    "array-unknown": ("arrays.step", lambda s: s["arrays"].update(step=torch.zeros(2))),
    "array-shape": ("arrays.state", lambda s: s["arrays"].update(state=torch.zeros(4, 3, dtype=torch.float64))),
    "array-dtype": ("arrays.steps", lambda s: s["arrays"].update(steps=torch.zeros(2, dtype=torch.int64))),
    "array-nan": ("arrays.state", lambda s: s["arrays"]["state"].fill_(torch.nan)),
    "number": ("numbers.gravity", lambda s: s["numbers"].update(gravity=1.0)),
    "number-type": ("numbers.num_envs", lambda s: s["numbers"].update(num_envs=2.0)),
    "number-unknown": ("numbers.close_extras", lambda s: s["numbers"].update(close_extras=1)),
    "rng": ("rng.state", lambda s: s["rng"].update(state="x")),
}


@pytest.mark.parametrize(("name", "change"), NATIVE.values(), ids=NATIVE)
def test_a_forged_state_of_a_vector_form_is_rejected_by_the_name_of_its_value(name, change):
    envs = make_vector_env(EnvSettings("CartPole-v1"), 2, "vector_entry_point")
    observation, _ = envs.reset(seed=0)
    state = through_a_checkpoint(env_state(envs))
    change(state)
    reached = Reached(observation, np.zeros(2), np.zeros(2, np.int64), np.zeros(2, np.bool_))
    with pytest.raises(CheckpointError) as error:
        restore_env_state(make_vector_env(EnvSettings("CartPole-v1"), 2, "vector_entry_point"), state, "envs", reached)
    assert str(error.value).startswith(f"envs.{name}")


PENDING = {
    "action": ("action", lambda s: s["action"].add_(5)),
    "reward": ("reward", lambda s: s["reward"].fill_(torch.nan)),
    "terminated": ("terminated", lambda s: s.update(terminated=torch.zeros(2))),
    "observation": ("observation", lambda s: s.pop("observation")),
}


@pytest.mark.parametrize(("name", "change"), PENDING.values(), ids=PENDING)
def test_a_forged_outcome_of_a_step_under_way_is_rejected(name, change):
    collector = make_player(vectorization="async", overlap=True)
    collector.start()
    collector.send()
    state = through_a_checkpoint(collector.state_dict())
    collector.envs.close()
    change(state["under_way"]["pending"])
    with pytest.raises(CheckpointError) as error:
        make_player().load_state_dict(state, "train")
    assert str(error.value).startswith(f"train.under_way.pending.{name}")


@pytest.mark.parametrize("mask", [torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool), None])
def test_a_forged_action_mask_is_rejected(mask):
    def rightwards(observation, rng, mask):
        return mask.argmax(1)

    collector, other = (make_player("Walk-v0", policy=rightwards, action_masks=True) for _ in range(2))
    collector.start()
    steps_of(collector, 3)
    state = through_a_checkpoint(collector.state_dict())
    good = copy.deepcopy(state)
    state["under_way"]["action_mask"] = mask
    with pytest.raises(CheckpointError, match=r"train\.under_way\.action_mask"):
        other.load_state_dict(state, "train")
    again = make_player("Walk-v0", policy=rightwards, action_masks=True)
    assert not again.load_state_dict(good, "train").any()
    assert steps_of(again, 20) == steps_of(collector, 20)


def test_truncate_ends_the_episodes_of_some_environments_only():
    dataset = countdown(3)
    take(dataset, 40)
    memory = dataset.memory
    last = (memory._cursor - 1) % memory._slots
    memory._written["playable"][last] = [True, True, False]
    memory._written["terminated"][last] = memory._written["truncated"][last] = False
    memory._after_end[:] = False
    before = len(transitions(memory))
    memory.truncate(np.array([True, False, True]))
    assert memory._written["truncated"][last].tolist() == [True, False, False]
    assert memory._after_end.tolist() == [True, False, True]
    assert len(transitions(memory)) == before
    # the next rows of the two are no starts
    nothing, no = np.zeros(3), np.zeros(3, np.bool_)
    slot = memory._cursor
    memory.append(np.zeros(3, np.int64), nothing, no, no, np.zeros((3, 2), np.float32))
    assert memory._written["playable"][slot].tolist() == [False, True, False]
