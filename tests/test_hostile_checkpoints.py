"""Attacks by a checkpoint, or by what is beside it: nothing that a file brings is imported, called, opened or removed.

What is in the description of the agent and in its manifest is forged in both.
"""

import copy
import multiprocessing
import os
import sys
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from forging import MARKER, PAYLOAD, item, opened, write
from test_forged_checkpoints import lay_traps, train

from lightning_dqn.resume.manifest import check_description, flatten

pytestmark = pytest.mark.faults

CLASS = {"class_path": f"{PAYLOAD}.Net", "init_args": {}}
TRANSFORM = "gymnasium.wrappers.TransformObservation"
MOCK = {"class_path": "unittest.mock.Mock", "init_args": {"return_value": f"touch {MARKER}"}}
LAMBDA_LR = {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": "os._exit"}}


def wrappers(class_path, **arguments):
    """The entry of one Gymnasium wrapper."""
    return [{"class_path": class_path, "init_args": arguments}]


def options(**values):
    """Options of the command line; a double underscore stands for a dot."""
    return {("options", name.replace("__", ".")): value for name, value in values.items()}


DATA, MODEL = ("agent", "data", "init_args"), ("agent", "model", "init_args")
NETWORK = (*MODEL, "network")
# key paths in a checkpoint and what is put there
EXECUTES = {
    "a callback named like a picture": options(trainer__callbacks=f"{PAYLOAD}.png"),
    "plugins in a file": options(trainer__plugins="evil"),
    "a logger in a file": options(trainer__logger="evil"),
    "a profiler": options(trainer__profiler=f"{PAYLOAD}.png"),
    "a strategy": options(trainer__strategy=f"{PAYLOAD}.png"),
    "YAML in an argument of the environment": {(*DATA, "env_kwargs"): {"a": f"{{class_path: {PAYLOAD}.Net}}"}},
    "YAML in place of arguments": {(*DATA, "env_kwargs"): f"a: {{class_path: {PAYLOAD}.Net}}"},
    "arguments in a file": {(*DATA, "env_kwargs"): "evil"},
    "a key with a dot": {(*DATA, "sampler.class_path"): f"{PAYLOAD}.Net"},
    "arguments beside the arguments": {(*NETWORK, "dict_kwargs"): {"x": CLASS}},
    "a class as a plain argument": {(*MODEL, "loss"): CLASS},
    "a string where a number is": {(*MODEL, "optimizer", "init_args", "lr"): f"{PAYLOAD}.Net"},
    "a list in a file": {(*NETWORK, "init_args", "hidden_sizes"): "evil"},
    "a mock as a function": {(*DATA, "wrappers"): wrappers(TRANSFORM, func=MOCK, observation_space=None)},
    "os.system as a function": {(*DATA, "wrappers"): wrappers(TRANSFORM, func="os.system", observation_space=None)},
    "a wrapper of one's own": {(*DATA, "wrappers"): wrappers(f"{PAYLOAD}.Net")},
    "os._exit as a schedule": {(*MODEL, "lr_scheduler"): LAMBDA_LR},
    "the module of an environment": {(*DATA, "env_id"): f"{PAYLOAD}:CartPole-v1"},
    "an environment that makes another": {(*DATA, "env_id"): "GymV26Environment-v0"},
    "an id in a file": {(*DATA, "env_id"): "evil"},
    "a network of one's own": {(*NETWORK, "class_path"): f"{PAYLOAD}.Net"},
    "torch.hub": {(*NETWORK, "class_path"): "torch.hub.load"},
    "a module of the package that runs": {("agent", "model", "class_path"): "lightning_dqn.__main__.DQN"},
    "hyper_parameters": {("hyper_parameters",): {"_instantiator": "lightning.pytorch.cli.instantiate_module", **CLASS}},
    "an older Lightning": {("pytorch-lightning_version",): "1.5.0"},
}
TAKES_TOO_MUCH = {
    "a network of 1.6 GB": {(*NETWORK, "init_args", "hidden_sizes"): [20_000, 20_000]},
    "a network of 100,000 layers": {(*NETWORK, "init_args", "hidden_sizes"): [1] * 100_000},
    "a million environments": {(*DATA, "num_envs"): 10**6},
    "a thousand processes": {(*DATA, "num_envs"): 1000, (*DATA, "vectorization"): "async"},
    "a billion episodes of evaluation": {(*DATA, "eval_episodes"): 10**9},
    "a billion films": options(video__episodes=10**9),
    "a hundred processes of training": options(trainer__devices=100),
    "machines that never come": options(trainer__num_nodes=2),
    "a stack of a billion frames": {
        (*DATA, "wrappers"): wrappers("gymnasium.wrappers.FrameStackObservation", stack_size=10**9)
    },
    "screens of a million lines": {(*DATA, "env_id"): "ALE/Pong-v5", (*DATA, "env_kwargs"): {"screen_size": 10**6}},
    "a large space": {
        ("agent", "observation_space"): {"kind": "Box", "low": 0.0, "high": 1.0, "shape": [2**27], "dtype": "float64"}
    },
    "a tensor of a few bytes and any size": {("state_dict", "epsilon"): torch.zeros(1).expand(10**12)},
    "a bomb of lists": options(trainer__bomb="MARKERDEEP"),
}
WRITES = {
    "films of a wrapper": {(*DATA, "wrappers"): wrappers("gymnasium.wrappers.RecordVideo", video_folder="outside")},
    "a plot elsewhere": options(plot__filename="../outside.png"),
    "checkpoints elsewhere": options(checkpoint__filename="../outside"),
    "a folder of checkpoints": options(checkpoint__dirpath="outside"),
    "a root elsewhere": options(trainer__default_root_dir="outside"),
    "another account": {
        ("options", "loggers"): [
            {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"entity": "stranger"}}
        ]
    },
    "a tracking server": {
        ("options", "loggers"): [
            {"class_path": "lightning.pytorch.loggers.MLFlowLogger", "init_args": {"tracking_uri": "outside"}}
        ]
    },
}


def forged(checkpoint, changes):
    """A copy of a checkpoint with these changes, its manifest adapted to them."""
    new = copy.deepcopy(checkpoint)
    for path, value in changes.items():
        item(new, path[:-1])[path[-1]] = value
    flat = dict(flatten(new["agent"]))
    kept = {k: v for k, v in new["manifest"].items() if k.startswith(("versions.", "model.")) or k in flat}
    new["manifest"] = {**kept, **flat}
    check_description(new["agent"], new["manifest"])
    return new


@pytest.fixture(scope="module")
def pool():
    """A process that may be killed by a signal, or import a module."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        yield processes


@pytest.fixture(scope="module")
def good(tmp_path_factory, pool):
    """The last checkpoint of a small run."""
    return train("dqn", tmp_path_factory.mktemp("run"), pool)


@pytest.fixture
def folder(tmp_path):
    """A folder with a module and with files that nothing may open; its parent is that of the test."""
    folder = tmp_path / "inside"
    folder.mkdir()
    lay_traps(folder)
    return folder


def enter(folder, words):
    """Open a file from a folder, whose modules can be imported."""
    os.chdir(folder)
    sys.path[:0] = [str(folder)]
    try:
        return opened(words)
    finally:
        sys.path.remove(str(folder))


def error_line(pool, folder, *words):
    """The line that a command ends with."""
    code, text = pool.submit(enter, folder, words).result()
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert not (folder / MARKER).exists()
    assert (code, len(lines)) == (2, 1), text
    assert len(lines[0]) < 2100
    return lines[0]


@pytest.mark.parametrize("attack", [*EXECUTES, *TAKES_TOO_MUCH, *WRITES])
def test_what_a_file_names_is_neither_executed_nor_opened_nor_allocated(attack, good, folder, pool):
    changes = {**EXECUTES, **TAKES_TOO_MUCH, **WRITES}[attack]
    write(forged(torch.load(good, weights_only=True), changes), folder / "f.ckpt")
    before = {path.name for path in folder.parent.iterdir()}
    for command in ("test", "fit"):
        epochs = ["--trainer.max_epochs", "2"] if command == "fit" else []
        error_line(pool, folder, command, "--ckpt_path", "f.ckpt", *epochs)
    assert {path.name for path in folder.parent.iterdir()} == before


@pytest.mark.parametrize("command", ["load", "module"])
@pytest.mark.parametrize(
    "attack", ["hyper_parameters", "os._exit as a schedule", "a network of one's own", "a network of 1.6 GB"]
)
def test_a_file_that_is_loaded_in_python_has_nothing_executed(attack, command, good, folder, pool):
    changes = {**EXECUTES, **TAKES_TOO_MUCH}[attack]
    write(forged(torch.load(good, weights_only=True), changes), folder / "f.ckpt")
    error_line(pool, folder, command, "f.ckpt")


def test_a_configuration_beside_a_checkpoint_is_not_read(good, folder, pool):
    downloaded = folder / "downloaded" / "checkpoints"
    downloaded.mkdir(parents=True)
    (downloaded / "best.ckpt").write_bytes(good.read_bytes())
    (downloaded.parent / "config.yaml").write_text(f"data:\n  env_id: {PAYLOAD}:CartPole-v1\nmodel: {CLASS}\n")
    words = ["test", "--ckpt_path", "downloaded/checkpoints/best.ckpt", "--video.episodes", "0"]
    assert pool.submit(enter, folder, words).result()[0] == 0
    assert not (folder / MARKER).exists()


def test_an_optimizer_state_of_another_shape_is_named(good, folder, pool):
    checkpoint = torch.load(good, weights_only=True)
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state["exp_avg"] = torch.zeros(2)
    torch.save(checkpoint, folder / "f.ckpt")
    line = error_line(pool, folder, "fit", "--ckpt_path", "f.ckpt", "--trainer.max_epochs", "2")
    assert "optimizer_states[0].state.0.exp_avg" in line


def test_a_file_outside_of_the_folder_of_checkpoints_is_never_removed(good, folder, pool):
    downloaded = folder / "downloaded" / "checkpoints"
    downloaded.mkdir(parents=True)
    (folder / "downloaded" / "config.yaml").touch()
    victims = [folder / "victim.ckpt", downloaded / "below" / "victim.ckpt"]
    for victim in victims:
        victim.parent.mkdir(exist_ok=True)
        victim.write_text("precious")
        checkpoint = torch.load(good, weights_only=True)
        path = os.path.join("downloaded", "checkpoints", os.path.relpath(victim, downloaded))
        for state in checkpoint["callbacks"].values():
            if "dirpath" in state:
                folder_name = str(Path(path).parent)
                state |= {"dirpath": folder_name, "best_model_path": path, "kth_best_model_path": path}
                state |= {"best_k_models": {path: torch.tensor(1.0)}, "last_model_path": path}
        torch.save(checkpoint, downloaded / "last.ckpt")
        words = ["fit", "--ckpt_path", "downloaded/checkpoints/last.ckpt", "--trainer.max_epochs", "2"]
        pool.submit(enter, folder, [*words, "--video.episodes", "0"]).result()
        assert victim.read_text() == "precious"


def test_a_zip_file_that_grows_when_it_is_read_is_not_read(good, folder, pool):
    with zipfile.ZipFile(good) as parts, zipfile.ZipFile(folder / "f.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
        for part in parts.infolist():
            new = zipfile.ZipInfo(part.filename)
            new.compress_type = zipfile.ZIP_DEFLATED
            packed.writestr(new, parts.read(part))
        for info in packed.filelist:
            info.external_attr = 0
    assert "compressed" in error_line(pool, folder, "load", "f.ckpt")
