"""Arguments of environments: secrets by reference, and values of any type."""

import os
import traceback
from collections import namedtuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_checkpoint_io import make_trainer

from lightning_dqn import DQN, DQNDataModule
from lightning_dqn.envs import EnvSettings, make_env, make_vector_env
from lightning_dqn.envs.arguments import is_secret_name, resolve
from lightning_dqn.resume.checkpoint_io import AtomicCheckpointIO

Pair = namedtuple("Pair", "first second")
REFERENCE = {"from_env": "GAME_TOKEN"}


class Prices(gym.Env):
    """Pays 1 for each action 1, five steps an episode; keeps its arguments."""

    def __init__(self, **given):
        self.observation_space, self.action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)
        self.given = given

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1, np.float32), float(action), self.steps >= 5, False, {}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Prices-v0, and a token in an environment variable."""
    monkeypatch.setenv("GAME_TOKEN", "hunter2")
    gym.register("Prices-v0", Prices)
    yield
    gym.registry.pop("Prices-v0")


def test_a_secret_is_known_by_a_word_of_its_name():
    for name in ("token", "api_token", "apiToken", "API_KEY", "secret", "db-password", "authToken", "credentials"):
        assert is_secret_name(name), name
    for name in ("monkey", "keyboard", "max_tokens", "is_slippery", "author", "map_name", "key_color", "n_keys", 3, ""):
        assert not is_secret_name(name), name


@pytest.mark.parametrize(
    ("env_kwargs", "path"),
    [
        ({"api_token": "abc"}, r"env_kwargs\.api_token"),
        ({"token": b"abc"}, r"env_kwargs\.token"),
        ({"auth": {"user": "x"}}, r"env_kwargs\.auth\.user"),
        ({"a": [1, {"auth": {"password": "x"}}]}, r"env_kwargs\.a\[1\]\.auth\.password"),
        ({"passwords": {"password": ("x",)}}, r"env_kwargs\.passwords\.password\[0\]"),
        ({"a": {(0, 1): {"api-key": "x"}}}, r"env_kwargs\.a\[\(0, 1\)\]\['api-key'\]"),
        ({"a": {"from_env": 3}}, r"env_kwargs\.a="),
    ],
)
def test_a_secret_given_by_value_is_rejected_with_its_path_and_the_remedy(env_kwargs, path):
    for make in (lambda: EnvSettings("Nowhere-v0", env_kwargs), lambda: DQNDataModule(env_kwargs=env_kwargs)):
        with pytest.raises(ValueError, match=rf"^{path}.*from_env"):
            make()


@pytest.mark.parametrize(
    "env_kwargs",
    [
        {"key_size": 3, "n_keys": 2, "token": None, "secret": True, "password": "", "keys": ["a"]},
        {"auth": {"retries": 3, "ratio": 0.5, "on": [True]}, "token": REFERENCE, "credentials": [REFERENCE]},
        {"a": "hunter2", "key": np.zeros(3)},
    ],
)
def test_what_is_no_string_under_the_name_of_a_secret_is_accepted(env_kwargs):
    assert EnvSettings("Prices-v0", env_kwargs).env_kwargs is env_kwargs


def test_references_are_resolved_at_any_depth_and_nothing_else_is_copied():
    prices, plain = np.arange(3), {"b": [1]}
    given = {"a": [1, (2, REFERENCE)], "token": REFERENCE, "plain": plain, "pair": Pair(prices, {"x": REFERENCE})}
    resolved, values = resolve(given)
    assert resolved["a"] == [1, (2, "hunter2")]
    assert resolved["token"] == "hunter2"
    assert resolved["plain"] is plain
    assert type(resolved["pair"]) is Pair
    assert resolved["pair"].first is prices
    assert resolved["pair"].second == {"x": "hunter2"}
    assert values == ["hunter2"] * 3
    assert given["a"] == [1, (2, REFERENCE)]


def test_containers_that_contain_themselves_are_arguments_too():
    cycle = [1, {"key": 2}]
    cycle.append(cycle)
    env_kwargs = {"a": cycle, "token": REFERENCE}
    resolved, _ = resolve(EnvSettings("Prices-v0", env_kwargs).env_kwargs)
    assert resolved["a"] is cycle
    assert resolved["token"] == "hunter2"


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_every_environment_is_made_with_the_value(vectorization):
    settings = EnvSettings("Prices-v0", {"server": {"token": REFERENCE}})
    assert make_env(settings).unwrapped.given == {"server": {"token": "hunter2"}}
    envs = make_vector_env(settings, 2, vectorization)
    assert envs.get_attr("given") == ({"server": {"token": "hunter2"}},) * 2
    assert envs.spec.kwargs == {"server": {"token": REFERENCE}}
    envs.close()


def test_an_own_vector_form_is_made_with_the_value():
    class Native(gym.vector.VectorEnv):
        def __init__(self, num_envs, token):
            self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
            self.num_envs, self.token = num_envs, token

    gym.register("Native-v0", Prices, vector_entry_point=Native)
    envs = make_vector_env(EnvSettings("Native-v0", {"token": REFERENCE}), 3, "vector_entry_point")
    gym.registry.pop("Native-v0")
    assert envs.unwrapped.token == "hunter2"


def test_a_missing_variable_is_named_with_the_path_of_its_argument(monkeypatch):
    monkeypatch.delenv("GAME_TOKEN")
    with pytest.raises(ValueError, match=r"^env_kwargs\.a\[0\]\.token=.*variable GAME_TOKEN is not set"):
        make_env(EnvSettings("Prices-v0", {"a": [{"token": REFERENCE}]}))


@pytest.mark.parametrize("kind", [TypeError, KeyError, OSError])
def test_an_error_of_an_environment_shows_no_value_of_a_reference(monkeypatch, kind):
    def fail(self, **given):
        try:
            raise kind(given["token"])
        except kind as error:
            raise kind(f"rejected: {given}") from error

    monkeypatch.setattr(Prices, "__init__", fail)
    with pytest.raises((ValueError, RuntimeError)) as raised:
        make_env(EnvSettings("Prices-v0", {"token": REFERENCE, "server": "here"}))
    shown = "".join(traceback.format_exception(raised.value))
    assert "hidden" in shown
    assert "here" in shown
    assert "hunter" not in shown


def test_an_error_where_there_is_no_reference_stays_what_it_is(monkeypatch):
    def fail(self, **given):
        raise OSError("no such server")

    monkeypatch.setattr(Prices, "__init__", fail)
    with pytest.raises(OSError, match=r"^no such server$"):
        make_env(EnvSettings("Prices-v0", {"server": "here"}))


class Broker:
    """An object that can't be compared."""

    def __eq__(self, other):
        raise ValueError("ambiguous")

    __hash__ = None


ANY = {
    "list": {"frame_bound": [10, 100]},
    "tuple": {"frame_bound": (10, 100)},
    "array": {"prices": np.arange(10.0)},
    "array of bools": {"prices": np.ones(3, bool), "more": {"prices": np.ones((2, 2), bool)}},
    "list of arrays": {"prices": [np.arange(10.0)]},
    "tensor": {"prices": torch.arange(10.0)},
    "tuple keys": {"walls": {(0, 1): "N"}},
    "mixed keys": {"levels": {1: "a", "b": 2, None: 3}},
    "object": {"broker": Broker(), "brokers": [Broker()]},
    "function": {"reward": len, "other": lambda price: price},
    "set": {"closed": {"sat", "sun"}},
    "numpy numbers": {"price": np.float32(3), "count": np.int64(3)},
}


@pytest.mark.parametrize("name", ANY)
def test_an_environment_trains_and_resumes_with_arguments_of_any_type(tmp_path, name):
    def pair():
        data = DQNDataModule(env_id="Prices-v0", env_kwargs=ANY[name], epoch_env_steps=200, eval_episodes=2, num_envs=2)
        return DQN(data.observation_space, data.action_space), data

    make_trainer(tmp_path, AtomicCheckpointIO(), 1).fit(*pair())
    model, data = pair()
    make_trainer(tmp_path, AtomicCheckpointIO(), 2).fit(model, data, ckpt_path=tmp_path / "last.ckpt")
    assert data.env_steps == 400


@pytest.mark.integration
def test_a_data_frame_is_an_argument(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"Close": [1.0, 2.0]})
    data = DQNDataModule(env_id="Prices-v0", env_kwargs={"df": frame}, epoch_env_steps=200, eval_episodes=2)
    make_trainer(tmp_path, AtomicCheckpointIO(), 1).fit(DQN(data.observation_space, data.action_space), data)
    assert data.env_steps == 200


def test_no_variable_of_the_environment_is_changed():
    before = dict(os.environ)
    make_env(EnvSettings("Prices-v0", {"token": REFERENCE}))
    assert dict(os.environ) == before
