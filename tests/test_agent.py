"""Agents loaded from their checkpoints alone, in a fresh process: values equal to the saved ones to the bit."""

import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import user_module
from conftest import clean_environment, quiet_trainer
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation, TimeLimit, TransformReward
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dqn import C51, DQN, IQN, MLP, PQN, QRDQN, DQNDataModule, MinAtarCNN, load_agent
from lightning_dqn.cli import main
from lightning_dqn.envs import make_env
from lightning_dqn.resume.content import CheckpointError

pytestmark = [pytest.mark.learning, pytest.mark.filterwarnings("ignore")]
CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = {"epoch_env_steps": 200, "warmup_env_steps": 50, "batch_size": 8, "eval_episodes": 1, "eval_max_steps": 50}
FLAGS = (
    *(word for name, value in SMALL.items() for word in (f"--data.{name}", str(value))),
    *("--trainer.max_epochs", "1", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--video.episodes", "0"),
)
TRUST = {"trusted_modules": ["user_module"]}
# class, its arguments, those of the data side, what `load_agent` is given beside the path
IN_PYTHON = {
    "hidden sizes": (DQN, {"network": functools.partial(MLP, hidden_sizes=[24, 12])}, {}, {}),
    "lambda": (DQN, {"network": lambda space, actions: MLP(space, actions, hidden_sizes=[8])}, {}, {}),
    "dueling": (DQN, {"network": functools.partial(MLP, dueling=True)}, {}, {}),
    "noisy": (DQN, {"network": functools.partial(MLP, noisy=True)}, {}, {}),
    "layer norm": (DQN, {"network": functools.partial(MLP, layer_norm=True)}, {}, {}),
    "C51": (C51, {"num_atoms": 11, "v_min": 0, "v_max": 20, "network": lambda *of: MLP(*of, noisy=True)}, {}, {}),
    "QRDQN": (QRDQN, {"num_quantiles": 7}, {}, {}),
    "IQN": (IQN, {"num_policy_quantiles": 5}, {}, {}),
    "PQN": (PQN, {}, {"num_envs": 4, "steps_per_iteration": 8, "batch_size": 16}, {}),
    "frame stack": (DQN, {}, {"frame_stack": 3}, {}),
    "normalized": (DQN, {"normalize_observations": True}, {}, {}),
    "schedule": (DQN, {"lr_scheduler": lambda o: torch.optim.lr_scheduler.LinearLR(o, total_iters=9)}, {}, {}),
    "subclass": (user_module.Bonus, {"bonus": 0.25}, {}, TRUST),
    "own network": (DQN, {"network": functools.partial(user_module.Net, width=3)}, {}, TRUST),
    "wrapper": (DQN, {}, {"wrappers": [functools.partial(TimeLimit, max_episode_steps=20)]}, {}),
    "own wrapper": (DQN, {}, {"wrappers": [functools.partial(user_module.Shift, by=2)]}, TRUST),
    "env_kwargs": (DQN, {}, {"env_id": "FrozenLake-v1", "env_kwargs": {"map_name": "8x8", "is_slippery": False}}, {}),
    **{name: (DQN, {}, {"env_id": f"user_module:{name}-v0"}, TRUST) for name in (*user_module.ROOMS, "Shifted")},
    "Bytes": (DQN, {"network": MinAtarCNN}, {"env_id": "user_module:Bytes-v0"}, TRUST),
}
RAINBOW = ("--config", str(CONFIGS / "rainbow.yaml"))
MINATAR = ("--config", str(CONFIGS / "minatar.yaml"), "--model", "IQN", "--model.network", "lightning_dqn.MinAtarCNN")
BY_CLI = {
    "CLI Rainbow": (RAINBOW, {}),
    "CLI IQN on MinAtar": (MINATAR, {}),
    "CLI PQN": (("--config", str(CONFIGS / "cartpole_pqn.yaml")), {}),
    "CLI subclass": (("--model", "user_module.Bonus", "--model.bonus", "0.1"), TRUST),
}
NAMES = [*IN_PYTHON, *BY_CLI]
# what a person writes, for all agents in one process: importing torch takes longer than all the rest
FRESH = """
import pickle, sys
import lightning_dqn

def play(agent):
    env = agent.make_env()
    (observation, _), done, total = env.reset(seed=1), False, 0
    while not done:
        observation, reward, terminated, truncated, _ = env.step(agent.act(observation))
        done, total = terminated or truncated, total + reward
    return total

found = {}
for name, (path, arguments, observations, batch) in pickle.load(open(sys.argv[1], "rb")).items():
    agent = lightning_dqn.load_agent(path, **arguments)
    actions = [agent.act(observation) for observation in observations]
    found[name] = {
        "class": type(agent.module).__name__, "training": agent.module.training, "repr": repr(agent),
        "actions": actions, "types": {type(action) for action in actions}, "batch": agent.act(batch),
        "q_values": agent.q_values(batch), "return": play(agent), "repeated": play(agent),
    }
pickle.dump(found, open(sys.argv[2], "wb"))
"""


class Keep(Callback):
    """Keeps the learner and the data side of a run of the command line."""

    def on_fit_end(self, trainer, pl_module):
        self.module, self.data = pl_module, trainer.datamodule


def train(folder, cls=DQN, arguments=None, data=None):
    """A learner after one short epoch, its data side, and its checkpoint."""
    pl.seed_everything(0, verbose=False)
    data = DQNDataModule(**{**SMALL, **(data or {})})
    module = cls(data.observation_space, data.action_space, **(arguments or {}))
    trainer = quiet_trainer()
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "agent.ckpt")
    return module, data, folder / "agent.ckpt"


def train_by_cli(folder, words):
    """The same by the command line."""
    keep = Keep()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", *words, *FLAGS], callbacks=[keep])
    (path,) = folder.glob("runs/*/*/checkpoints/last.ckpt")
    return keep.module, keep.data, path


def observed(data):
    """Observations as a user's environment gives them, and as the learner takes them, (B, ...)."""
    env = make_env(data.env_settings)
    flatten = env if isinstance(env, FlattenObservation) else None
    inner, rng = env.env if flatten else env, np.random.default_rng(0)
    given, done = [], True
    for _ in range(24):
        if done:
            given.append(inner.reset(seed=int(rng.integers(99)))[0])
        observation, _, terminated, truncated, _ = inner.step(env.action_space.start + rng.integers(env.action_space.n))
        given.append(observation)
        done = terminated or truncated
    rows = [flatten.observation(observation) for observation in given] if flatten else given
    return given, np.array(rows, env.observation_space.dtype)


def greedy_return(module, data):
    """Of the episode of seed 1."""
    env = make_env(data.env_settings)
    (observation, _), done, total = env.reset(seed=1), False, 0
    while not done:
        observation, reward, terminated, truncated, _ = env.step(module.act(observation))
        done, total = terminated or truncated, total + reward
    return total


@pytest.fixture(scope="module")
def agents(tmp_path_factory):
    """Of each agent: what the learner that was saved says, and what the one that was loaded does."""
    saved, orders = {}, {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp("agent")
        if name in IN_PYTHON:
            cls, arguments, data, given = IN_PYTHON[name]
            module, data, path = train(folder, cls, arguments, data)
        else:
            words, given = BY_CLI[name]
            module, data, path = train_by_cli(folder, words)
        # where nothing else of the run is
        alone = path.rename(tmp_path_factory.mktemp("alone") / "agent.ckpt")
        observations, batch = observed(data)
        orders[name] = str(alone), given, observations, batch
        # the learner in training mode, as it is between two iterations: a noisy net is silent where nobody explores
        module.train()
        saved[name] = {
            "class": type(module).__name__,
            "actions": [module.act(row) for row in batch],
            "q_values": module.q_values(batch),
            "return": greedy_return(module, data),
            "env_id": data.env_id,
            "path": alone,
        }
    folder = tmp_path_factory.mktemp("fresh")
    (folder / "orders").write_bytes(pickle.dumps(orders))
    run_python(folder, FRESH, "orders", "loaded")
    return saved, pickle.loads((folder / "loaded").read_bytes())


def run_python(folder, code, *words):
    """What a new Python process prints; the user's module can be imported there."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = clean_environment(folder, PYTHONPATH=path)
    command = [sys.executable, "-W", "ignore", "-c", code, *words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_an_agent_loaded_in_a_fresh_process_has_the_values_and_actions_of_the_saved_one_bitwise(agents, name):
    saved, loaded = agents[0][name], agents[1][name]
    assert loaded["class"] == saved["class"]
    assert not loaded["training"]
    assert loaded["q_values"].dtype == np.float32
    assert loaded["q_values"].tobytes() == saved["q_values"].tobytes()
    assert loaded["actions"] == saved["actions"]
    assert loaded["types"] == {int}
    assert loaded["batch"].tolist() == saved["actions"]
    assert loaded["return"] == loaded["repeated"] == saved["return"]
    assert saved["env_id"] in loaded["repr"]
    assert "\n" not in loaded["repr"]


@pytest.mark.parametrize("name", ["own network", "subclass"])
def test_without_trust_nothing_of_a_module_is_imported_and_the_error_gives_the_flag(agents, tmp_path, name):
    path = agents[0][name]["path"]
    code = (
        f"import sys, lightning_dqn\ntry:\n    lightning_dqn.load_agent({str(path)!r})\n"
        "except RuntimeError as error:\n    print(error)\nprint('user_module' in sys.modules)"
    )
    message, imported = run_python(tmp_path, code).splitlines()
    for part in ("module user_module", "--trust user_module", "trusted_modules=['user_module']"):
        assert part in message
    assert imported == "False"


def test_a_class_loads_its_own_checkpoint_without_trust_and_another_class_does_not(agents):
    path = agents[0]["subclass"]["path"]
    module = user_module.Bonus.load_from_checkpoint(path)
    assert module.bonus == 0.25
    assert type(DQN.load_from_checkpoint(path, **TRUST)) is user_module.Bonus
    with pytest.raises(CheckpointError, match="C51"):
        C51.load_from_checkpoint(path, **TRUST)


def test_a_network_that_is_a_function_is_named_and_can_be_passed(tmp_path):
    module, data, path = train(tmp_path, DQN, {"network": user_module.make_net})
    with pytest.raises(CheckpointError, match=r"user_module.make_net.*network="):
        load_agent(path)
    agent = load_agent(path, network=user_module.make_net)
    batch = observed(data)[1]
    assert agent.q_values(batch).tobytes() == module.q_values(batch).tobytes()


def test_a_network_of_another_size_is_named_with_both_values(tmp_path):
    _, _, path = train(tmp_path)
    with pytest.raises(CheckpointError, match=r"model.network.hidden_sizes=\[5\].*\(?\[?128, 128"):
        load_agent(path, network=functools.partial(MLP, hidden_sizes=[5]))


def test_a_wrapper_with_a_function_is_named_by_make_env_and_can_be_passed(tmp_path):
    wrappers = [functools.partial(TransformReward, func=lambda reward: 2 * reward)]
    _, data, path = train(tmp_path, data={"wrappers": wrappers})
    agent = load_agent(path)
    assert agent.act(observed(data)[0][0]) in (0, 1)
    with pytest.raises(CheckpointError, match=r"wrappers\[0\].init_args.func .*<lambda>.*wrappers="):
        agent.make_env()
    env = agent.make_env(wrappers=wrappers)
    env.reset(seed=0)
    assert env.step(0)[1] == 2


def test_an_environment_argument_that_is_an_object_is_named_by_make_env_and_can_be_passed(tmp_path):
    arguments = {"observation_space": spaces.Box(-1, 1, (2,))}
    _, _, path = train(tmp_path, data={"env_id": "user_module:Dict-v0", "env_kwargs": arguments})
    agent = load_agent(path, **TRUST)
    with pytest.raises(CheckpointError, match=r"env_kwargs.observation_space .*gymnasium.*Box.*env_kwargs="):
        agent.make_env()
    assert agent.make_env(env_kwargs=arguments).observation_space == arguments["observation_space"]


def test_a_secret_given_by_reference_is_resolved_where_the_environment_is_made_and_is_in_no_checkpoint(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("ROOM_TOKEN", "rosebud-4711")
    arguments = {"token": {"from_env": "ROOM_TOKEN"}}
    _, _, path = train(tmp_path, data={"env_id": "user_module:Dict-v0", "env_kwargs": arguments})
    assert b"rosebud" not in path.read_bytes()
    agent = load_agent(path, **TRUST)
    assert agent.make_env().unwrapped.token == "rosebud-4711"
    monkeypatch.delenv("ROOM_TOKEN")
    assert agent.act(user_module.ROOMS["Dict"].sample()) in (0, 1)
    with pytest.raises(ValueError, match=r"env_kwargs.token.*ROOM_TOKEN"):
        agent.make_env()


def test_the_environment_can_be_rendered(agents):
    env = load_agent(agents[0]["hidden sizes"]["path"]).make_env("rgb_array")
    env.reset(seed=0)
    assert env.render().shape == (400, 600, 3)
    env.close()


def test_a_checkpoint_of_a_plain_trainer_and_one_of_weights_only_load_as_agents(tmp_path):
    pl.seed_everything(0, verbose=False)
    data = DQNDataModule(**SMALL)
    module = DQN(data.observation_space, data.action_space)
    trainer = quiet_trainer(ModelCheckpoint(tmp_path, "plain"))
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    batch = observed(data)[1]
    for name in ("plain.ckpt", "weights.ckpt"):
        assert load_agent(tmp_path / name).q_values(batch).tobytes() == module.q_values(batch).tobytes()
    other, path = DQN(data.observation_space, data.action_space), tmp_path / "weights.ckpt"
    with pytest.raises(CheckpointError, match=r"save_weights_only.*--init_from"):
        quiet_trainer().fit(other, DQNDataModule(**SMALL), ckpt_path=path, weights_only=True)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        load_agent(tmp_path / "nowhere.ckpt")


@pytest.fixture(scope="module")
def cartpole(agents):
    """An agent of four numbers."""
    return load_agent(agents[0]["hidden sizes"]["path"])


@pytest.fixture(scope="module")
def nested(agents):
    """An agent that observes a dict."""
    return load_agent(agents[0]["Dict"]["path"])


def test_lists_tuples_tensors_and_other_dtypes_of_one_observation_give_one_action(cartpole):
    row = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    expected = cartpole.act(row)
    same = [row.astype(np.float64), row.tolist(), tuple(row.tolist()), torch.tensor(row), np.stack([row] * 2).T[:, 0]]
    assert [cartpole.act(each) for each in same] == [expected] * len(same)
    assert {type(cartpole.act(each)) for each in same} == {int}
    assert cartpole.q_values(row).shape == (2,)


def test_batches_give_an_array_of_actions(cartpole):
    rows = np.random.default_rng(0).normal(size=(40, 4))
    expected = cartpole.act(rows.astype(np.float32)).tolist()
    assert {*expected} <= {0, 1}
    for batch in (rows, rows.tolist(), list(rows), torch.tensor(rows)):
        actions = cartpole.act(batch)
        assert actions.dtype == np.int64
        assert actions.tolist() == expected
    assert cartpole.act(np.zeros((0, 4))).tolist() == []
    assert cartpole.q_values(rows).shape == (40, 2)


@pytest.mark.parametrize("shape", [(3,), (5,), (2, 3), (2, 2, 4), ()])
def test_an_observation_of_another_shape_is_an_error_with_the_expected_shape(cartpole, shape):
    with pytest.raises(ValueError, match=r"observation: has shape .*\(4,\)"):
        cartpole.act(np.zeros(shape))
    with pytest.raises(ValueError, match=r"observation: has shape .*\(4,\)"):
        cartpole.q_values(np.zeros(shape))


@pytest.mark.parametrize("value", [None, "left", {"a": 1}, [[1, 2], [3]]], ids=repr)
def test_what_is_no_array_is_an_error_with_the_expected_shape(cartpole, value):
    with pytest.raises(ValueError, match=r"observation: .*\(4,\)"):
        cartpole.act(value)


def test_masks_rule_actions_out_and_their_shape_is_checked(cartpole):
    assert [cartpole.act(np.zeros(4), mask) for mask in ([True, False], [0, 1])] == [0, 1]
    assert cartpole.act(np.zeros((2, 4)), [[1, 0], [0, 1]]).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"action_mask: has shape \(3,\), expected \(2,\)"):
        cartpole.act(np.zeros(4), [1, 1, 1])


@pytest.mark.parametrize("value", [3, np.int64(3), np.array(3), 3.0, True])
def test_a_number_is_one_observation_of_a_discrete_space(agents, value):
    agent = load_agent(agents[0]["env_kwargs"]["path"])
    assert type(agent.act(value)) is int
    assert agent.act(value) == agent.act(np.array([value], np.int64))[0]


@pytest.mark.parametrize("value", [64, -1, 3.5, [0, 64]])
def test_a_number_outside_of_a_discrete_space_is_an_error_with_its_range(agents, value):
    agent = load_agent(agents[0]["env_kwargs"]["path"])
    with pytest.raises(ValueError, match=r"observation=.*\[0, 63\]"):
        agent.act(value)


def test_nested_observations_come_as_lists_of_them_and_as_arrays_in_them(agents, nested):
    rooms = [user_module.ROOMS["Dict"].sample() for _ in range(9)]
    expected = [nested.act(room) for room in rooms]
    stacked = {name: np.array([room[name] for room in rooms]) for name in ("place", "room")}
    flat = np.array([spaces.flatten(user_module.ROOMS["Dict"], room) for room in rooms])
    assert nested.act(rooms).tolist() == nested.act(stacked).tolist() == nested.act(flat).tolist() == expected
    assert nested.act({**rooms[0], "place": rooms[0]["place"].tolist()}) == expected[0]
    pair = load_agent(agents[0]["Tuple"]["path"])
    pairs = [user_module.ROOMS["Tuple"].sample() for _ in range(9)]
    assert pair.act(pairs).tolist() == [pair.act(each) for each in pairs]


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ({"place": np.zeros(3), "room": 1}, r"observation\['place'\]: has shape \(3,\), expected \(2,\)"),
        ({"place": np.zeros(2), "room": 4}, r"observation\['room'\]=4.*\[0, 3\]"),
        ({"place": np.zeros(2), "room": -1}, r"observation\['room'\]=-1.*\[0, 3\]"),
        ({"place": np.zeros((5, 2)), "room": 1}, "observation: "),
        ({"place": np.zeros(2)}, r"observation: .*Dict\('place'"),
        ((np.zeros(2), 1), r"observation: .*Dict\('place'"),
        (np.zeros(5), r"observation: has shape \(5,\), expected \(6,\)"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_nested_observation_that_does_not_fit_names_its_part(nested, value, part):
    with pytest.raises(ValueError, match=part):
        nested.act(value)


def test_actions_that_do_not_start_at_0_are_given_as_the_environment_takes_them(agents):
    assert {*agents[1]["Shifted"]["actions"]} <= {3, 4}


def test_gymnasium_makes_the_same_environment_as_the_agent(agents):
    agent = load_agent(agents[0]["CLI IQN on MinAtar"]["path"])
    env = agent.make_env()
    assert env.spec.id == "MinAtar/Breakout-v1"
    assert env.observation_space == gym.make("MinAtar/Breakout-v1").observation_space
    assert agent.observation_space == env.observation_space
