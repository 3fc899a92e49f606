"""The manifest of a run: every argument is in it and compared at a resume, in Python as by the command line."""

import functools
import inspect

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import user_module
from conftest import quiet_trainer
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_cli import QUIET, runs_in

from lightning_dqn import (
    C51,
    DQN,
    IQN,
    MLP,
    PQN,
    QRDQN,
    DQNDataModule,
    EpsilonDecay,
    PrioritizedSampler,
    PriorityUpdate,
    SoftTargetUpdate,
    UniformSampler,
)
from lightning_dqn.cli import main
from lightning_dqn.resume.checkpoint_io import AtomicCheckpointIO
from lightning_dqn.resume.content import CheckpointError
from lightning_dqn.resume.manifest import MAY_CHANGE, changed
from lightning_dqn.resume.spaces import decode_space, encode_space

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"epoch_env_steps": 100, "warmup_env_steps": 50, "batch_size": 8, "eval_episodes": 1, "eval_max_steps": 20}
MODELS = (DQN, C51, QRDQN, IQN, PQN)
SCHEDULES = {"epsilon": EpsilonDecay, "target_update": SoftTargetUpdate, "priorities": PriorityUpdate}
CLASSES = {**{cls.__name__: cls for cls in (*MODELS, DQNDataModule)}, **SCHEDULES}
# other values of arguments for which `another` knows none
OTHERS = {
    "network": functools.partial(MLP, hidden_sizes=[8]),
    "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.5, amsgrad=True),
    "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=9),
    "clip_grad_norm": 5.0,
    "boltzmann_temperature": 0.5,
    "loss": "mse",
    "compile": False,
    "env_id": "Acrobot-v1",
    "env_kwargs": {"sutton_barto_reward": True},
    "wrappers": [functools.partial(TimeLimit, max_episode_steps=9)],
    "vectorization": "sync",
    "memory_device": "cpu",
    "memory_folder": ".",
    "sampler": UniformSampler,
    "schedule": "linear",
    "every_n_env_steps": 7,
    "iterations_per_chunk": 7,
}
# what both runs need so that an argument can have its other value
WITH = {"overlap": {"vectorization": "async"}, "action_masks": {"env_id": "Taxi-v4"}}


def arguments_of(name):
    """The parameters of a constructor that a user gives."""
    parameters = inspect.signature(CLASSES[name]).parameters.values()
    return [
        p for p in parameters
        if p.kind is not p.VAR_KEYWORD and p.name not in ("observation_space", "action_space")
    ]  # fmt: skip


def another(parameter):
    """A value that a parameter does not have by default; the test of a new argument fails here until it has one."""
    if parameter.name in OTHERS:
        return OTHERS[parameter.name]
    value = SMALL.get(parameter.name, parameter.default)
    assert type(value) in (bool, int, float), f"OTHERS needs a value of {parameter.name}"
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 0.5


def make_run(name="DQN", given=None, data=None):
    """The parts of a run in Python whose class `name` gets some arguments."""
    pl.seed_everything(3, verbose=False)
    own = {each: given or {} if each == name else {} for each in CLASSES}
    learner = {"num_envs": 2, "steps_per_iteration": 4} if name == "PQN" else {"sampler": PrioritizedSampler}
    data = DQNDataModule(**{**SMALL, **learner, **(data or {}), **own["DQNDataModule"]})
    cls = CLASSES[name] if CLASSES[name] in MODELS else DQN
    model = cls(data.observation_space, data.action_space, **own[cls.__name__])
    callbacks = [schedule(**own[section]) for section, schedule in SCHEDULES.items()]
    return model, data, callbacks


def fit(parts, path=None, max_epochs=1):
    """Train, resumed from a checkpoint if there is one."""
    model, data, callbacks = parts
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=max_epochs)
    trainer.fit(model, data, ckpt_path=path, weights_only=True)
    return trainer


def manifest_of(path):
    """Of a checkpoint."""
    return AtomicCheckpointIO().load_checkpoint(path)["manifest"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Gives the checkpoint of a run of a class with what an argument needs."""
    folder = tmp_path_factory.mktemp("saved")

    @functools.cache
    def save(name, argument=None):
        trainer = fit(make_run(name, data=WITH.get(argument)))
        trainer.save_checkpoint(folder / f"{name}-{argument}.ckpt")
        trainer.datamodule.close()
        return folder / f"{name}-{argument}.ckpt"

    return lambda name, argument: save(
        name if CLASSES[name] in MODELS else "DQN", argument if argument in WITH else None
    )


@pytest.mark.parametrize(
    ("name", "parameter"),
    [(name, parameter) for name in CLASSES for parameter in arguments_of(name)],
    ids=lambda value: getattr(value, "name", value),
)
def test_an_argument_with_another_value_is_named_at_a_resume_with_both_unless_it_may_change(saved, name, parameter):
    path = saved(name, parameter.name)
    value = another(parameter)
    section = "model" if CLASSES[name] in MODELS else "data" if name == "DQNDataModule" else name
    full = f"{section}.{parameter.name}"
    data = WITH.get(parameter.name)
    if full in MAY_CHANGE:
        fit(make_run(name, {parameter.name: value}, data), path)
        return
    with pytest.raises(MisconfigurationException) as caught:
        fit(make_run(name, {parameter.name: value}, data), path)
    key, _, rest = str(caught.value).partition("=")
    ours, _, theirs = rest.partition(": the checkpoint was made with ")
    # of arguments that are classes, what differs of theirs
    assert key == full or key.startswith(f"{full}.")
    assert theirs.startswith(str(manifest_of(path).get(key, "nothing"))[:100])
    if type(value) in (bool, int, float, str):
        assert ours == str(value)


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_what_may_change_exists_and_has_a_reason(saved, name):
    manifest = manifest_of(saved("DQN", None))
    assert any(key == name or key.startswith(f"{name}.") for key in manifest)
    assert len(MAY_CHANGE[name]) > 10


@pytest.mark.parametrize("name", MODELS, ids=lambda cls: cls.__name__)
def test_a_manifest_holds_all_arguments_of_all_constructors_as_plain_values(saved, name):
    manifest = manifest_of(saved(name.__name__, None))
    for cls in (DQN, name):
        for parameter in arguments_of(cls.__name__):
            full = f"model.{parameter.name}"
            assert any(key == full or key.startswith(f"{full}.") for key in manifest), full
    assert manifest["data.sampler.alpha" if name is not PQN else "data.num_envs"] == (0.6 if name is not PQN else 2)
    assert manifest["seed"] == 3


def test_ints_for_floats_and_lists_for_tuples_are_the_same():
    one = {"a": 1, "b": (1, 2.0), "c": {"x": [1, (2,)]}, "d": float("nan"), "e": 5}
    other = {"a": 1.0, "b": [1, 2], "c": {"x": (1, [2])}, "d": float("nan"), "e": 6}
    assert list(changed(one, other)) == [("e", 5, 6)]


def test_causes_are_named_before_their_consequences():
    theirs = {"model": "DQN", "observation_space": 1, "data.gamma": 0.9, "data.env_id": "A"}
    ours = {"model": "C51", "observation_space": 2, "data.gamma": 0.8, "data.env_id": "B", "env.layers": []}
    assert [name for name, *_ in changed(theirs, ours)] == [
        "data.env_id", "data.gamma", "model", "observation_space", "env.layers"
    ]  # fmt: skip


class Taxed(DQNDataModule):
    """A data side with an argument of its own."""

    def __init__(self, *, tax=0.1, **kwargs):
        super().__init__(**kwargs)
        self.tax = tax


class Slower(EpsilonDecay):
    """A schedule with an argument of its own."""

    def __init__(self, *, patience=3, **kwargs):
        super().__init__(**kwargs)
        self.patience = patience


class Wide(MLP):
    """A network with an argument of its own."""

    def __init__(self, observation_space, outputs, *, factor=2, **kwargs):
        super().__init__(observation_space, outputs, hidden_sizes=[4 * factor], **kwargs)


def make_own(bonus=0.5, tax=0.1, patience=3, factor=2):
    """A run of subclasses of a user."""
    pl.seed_everything(3, verbose=False)
    data = Taxed(tax=tax, sampler=PrioritizedSampler, **SMALL)
    network = lambda *shape: Wide(*shape, factor=factor)  # noqa: E731
    model = user_module.Bonus(data.observation_space, data.action_space, network=network, bonus=bonus)
    return model, data, [Slower(patience=patience), SoftTargetUpdate(), PriorityUpdate()]


def test_arguments_of_subclasses_are_compared_without_registering(tmp_path):
    fit(make_own()).save_checkpoint(tmp_path / "own.ckpt")
    for argument, value, key in (
        ("bonus", 0.25, "model.bonus=0.25: .*0.5"),
        ("tax", 0.2, "data.tax=0.2: .*0.1"),
        ("patience", 4, "epsilon.patience=4: .*3"),
        ("factor", 3, "model.network.factor=3: .*2"),
    ):
        with pytest.raises(MisconfigurationException, match=key):
            fit(make_own(**{argument: value}), tmp_path / "own.ckpt", 2)
    assert fit(make_own(), tmp_path / "own.ckpt", 2).current_epoch == 2
    with pytest.raises((MisconfigurationException, CheckpointError), match="Taxed"):
        fit(make_run(), tmp_path / "own.ckpt", 2)


CLI = (
    *("--data.epoch_env_steps", "100", "--data.warmup_env_steps", "50", "--data.batch_size", "8"),
    *("--data.eval_episodes", "1", "--data.eval_max_steps", "20", "--data.sampler", "lightning_dqn.PrioritizedSampler"),
    *("--seed_everything", "3", "--trainer.logger", "false", *QUIET),
)


@pytest.mark.integration
def test_python_and_the_command_line_describe_the_same_run_and_resume_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["fit", *CLI, "--trainer.max_epochs", "1"])
    by_cli = runs_in(tmp_path)[0] / "checkpoints" / "last.ckpt"
    fit(make_run()).save_checkpoint("python.ckpt")
    one, other = manifest_of(by_cli), manifest_of("python.ckpt")
    assert one.keys() == other.keys()
    assert list(changed(one, other)) == []
    assert fit(make_run(), by_cli, 2).current_epoch == 2
    main(["fit", "--ckpt_path", "python.ckpt", "--trainer.max_epochs", "2", "--trainer.logger", "false", *QUIET])
    newest = max(runs_in(tmp_path), key=lambda run: run.stat().st_mtime_ns)
    content = AtomicCheckpointIO().load_checkpoint(newest / "checkpoints" / "last.ckpt")
    assert (content["epoch"], content["DQNDataModule"]["train"]["env_steps"]) == (1, 200)


SPACES = [
    spaces.Discrete(5),
    spaces.Discrete(3, start=-1),
    spaces.MultiDiscrete([3, 4]),
    spaces.MultiDiscrete([[3, 4], [2, 9]], start=[[0, 1], [-1, 0]]),
    spaces.MultiBinary(5),
    spaces.MultiBinary([2, 3]),
    spaces.Box(-1, 1, (3,)),
    spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
    spaces.Box(np.array([-1, 0], np.float32), np.array([np.inf, 2], np.float32)),
    spaces.Box(0, 255, (84, 84, 4), np.uint8),
    spaces.Box(0, 1, (), np.float16),
    spaces.Box(0, 1, (3,), bool),
    spaces.Text(4, charset="abc"),
    spaces.Tuple([spaces.Discrete(2), spaces.Tuple([spaces.MultiBinary(1)])]),
    spaces.Dict(z=spaces.Discrete(2), a=spaces.Dict(b=spaces.Box(0, 1, (1,)))),
]


@pytest.mark.parametrize("space", SPACES, ids=lambda space: " ".join(str(space).split()))
def test_a_space_is_the_same_after_the_way_through_a_checkpoint(space, tmp_path):
    torch.save(encode_space(space), tmp_path / "space")
    found = decode_space(torch.load(tmp_path / "space", weights_only=True), "space")
    assert found == space
    assert type(found) is type(space)
    assert found.dtype == space.dtype
    assert str(found) == str(space)
    assert sum(encode_space(each) == encode_space(space) for each in SPACES) == 1
    sample = space.sample()
    if space.is_np_flattenable:
        assert spaces.flatten(found, sample).tobytes() == spaces.flatten(space, sample).tobytes()


def test_a_space_that_has_no_plain_form_is_named():
    with pytest.raises(TypeError, match="space Graph"):
        encode_space(spaces.Graph(spaces.Box(0, 1, (1,)), None))
