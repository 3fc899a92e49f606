"""The manifest of a run: everything that identifies it, as a flat dict of plain values, written into every checkpoint.

A resumed run must have the same manifest except for the names in `MAY_CHANGE`, and so must all ranks of a run.
"""

import contextlib
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_dqn.resume.arguments import (
    describe,
    describe_class,
    describe_instance,
    describe_network,
    describe_optimizer,
    public_path,
)
from lightning_dqn.resume.content import CheckpointError, check_plain, invalid
from lightning_dqn.resume.spaces import decode_space, encode_space

# names and sections that a resumed run may change, with the reason
MAY_CHANGE = {
    "versions": "informative only",
    "data.eval_episodes": "evaluation does not change training",
    "data.eval_max_steps": "evaluation does not change training",
    "data.save_memory": "decides what later checkpoints contain",
    "data.iterations_per_chunk": "decides which iterations Lightning groups, not their result",
    "data.memory_device": "decides where observations are stored, not which",
    "data.memory_folder": "decides where observations are stored, not which",
    "model.compile": "decides how the gradient is computed, not its value",
    "model.optimizer.foreach": "decides how a step is computed, not its result",
    "model.optimizer.fused": "decides how a step is computed, not its result",
    "model.optimizer.capturable": "decides how a step is computed, not its result",
    "model.optimizer.differentiable": "decides how a step is computed, not its result",
}
# options of the trainer that must be equal on all ranks, since they decide when collective calls are made
TRAINER_OPTIONS = (
    *("max_epochs", "max_steps", "limit_train_batches", "limit_val_batches", "val_check_interval"),
    *("check_val_every_n_epoch", "log_every_n_steps", "world_size", "precision"),
)
# described by its arguments alone
DEFAULT_SCHEDULE = "lightning_dqn.EpsilonDecay"
SPACES = ("observation_space", "action_space")


def describe_run(module: Any, data: Any = None, callbacks: Iterable[Callback] = ()) -> dict[str, Any]:
    """Describe the parts of a run as plain values: the classes and arguments to create them from.

    Args:
        module: a `DQN`.
        data: its `DQNDataModule`, if it has one.
        callbacks: callbacks of the trainer; only schedules are described.

    Returns:
        `model`, `observation_space`, `action_space` and, with a data module, `data`, `env`, `seed` and a section for
        each schedule.
    """
    run = _describe_all(module, data, callbacks)
    run["model"]["init_args"] = {k: v for k, v in run["model"]["init_args"].items() if k in module.init_args}
    return run


def _describe_all(module: Any, data: Any, callbacks: Iterable[Callback]) -> dict[str, Any]:
    """Like `describe_run`, with the arguments of all constructors of the module."""
    run: dict[str, Any] = {"model": _describe_model(module), **describe_spaces(module)}
    if not hasattr(data, "describe"):
        return run
    seed = os.environ.get("PL_GLOBAL_SEED")
    run |= {"seed": None if seed is None else int(seed), **data.describe()}
    for callback in callbacks:
        section = getattr(callback, "manifest_section", None)
        if section is None or (section == "priorities" and not data.is_prioritized):
            continue
        arguments: dict[str, Any] = callback.all_args  # type: ignore[attr-defined]
        if section == "epsilon" and public_path(type(callback)) != DEFAULT_SCHEDULE:
            run[section] = describe_class(type(callback), arguments, skip=0)
        else:
            run[section] = {name: describe(value) for name, value in arguments.items()}
    return run


def describe_spaces(module: Any) -> dict[str, Any]:
    """The spaces of a `DQN` by name, as plain values."""
    return {name: encode_space(getattr(module, name)) for name in SPACES}


def _describe_model(module: Any) -> dict[str, Any]:
    """Class path and arguments of a `DQN`, without its spaces."""
    arguments: dict[str, Any] = module.all_args
    described = {name: describe(value) for name, value in arguments.items() if name not in SPACES}
    described["network"] = describe_network(arguments["network"], module.policy_net, skip=2)
    optimizer, scheduler = module.probe_optimizer()
    described["optimizer"] = describe_optimizer(optimizer)
    if scheduler is not None:
        described["lr_scheduler"] = describe_instance(arguments["lr_scheduler"], scheduler, skip=1)
    return {"class_path": public_path(type(module)), "init_args": described}


def build_manifest(module: Any, data: Any = None, callbacks: Iterable[Callback] = ()) -> dict[str, Any]:
    """The flat manifest of a run, see `describe_run`: names as in a configuration, `model.optimizer.lr`."""
    packages = ("lightning_dqn", "lightning", "torch", "gymnasium", "numpy")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return dict(flatten({**_describe_all(module, data, callbacks), "versions": versions}))


def check_description(agent: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """Check that a checkpoint describes the same run in its two entries: by class and argument, and as a flat manifest.

    Raises:
        CheckpointError: naming the first value of the description that the manifest does not have.
    """
    check_plain(agent, "agent", classes=True)
    check_plain(manifest, "manifest", classes=True)
    if not all(type(name) is str for name in (*agent, *manifest)):
        invalid("manifest", "has a key that is not a str")
    described = dict(flatten(agent))
    for name, value in described.items():
        # the seed of the process may be set again during a run
        if name != "seed" and (name not in manifest or _normal(manifest[name]) != _normal(value)):
            invalid(f"agent.{name}", f"is {_show(value)}, and in the manifest {_show(manifest.get(name, 'nothing'))}")
    for name in manifest.keys() - described.keys():
        if not name.startswith(("versions.", "model.")):
            invalid(f"agent.{name}", "is missing, but is in the manifest")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield leaves by dotted names; a class is the value of its own name, its arguments are below that name."""
    for name, value in tree.items():
        if name == "class_path" and prefix:
            yield prefix.removesuffix("."), value
        elif isinstance(value, dict) and value.keys() == {"opaque"}:
            yield f"{prefix}{name}", value["opaque"]
        elif isinstance(value, dict) and name not in (*SPACES, "env_kwargs", "env_observation_space"):
            yield from flatten(value, prefix if name == "init_args" else f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def changed(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield names whose values must not differ but do, with both values; "nothing" stands for a missing value."""
    # causes before consequences: the environment and its wrappers decide what the model observes
    names = sorted({**ours, **theirs}, key=lambda name: (name != "data.env_id", name.partition(".")[0] != "data"))
    for name in names:
        one, other = theirs.get(name, "nothing"), ours.get(name, "nothing")
        # without a seed the run continues with the generators of the checkpoint
        free = name == "seed" and None in (one, other)
        free |= any(name == each or name.startswith(f"{each}.") for each in MAY_CHANGE)
        if not free and _normal(one) != _normal(other):
            yield name, one, other


def _normal(value: Any) -> Any:
    """Normalize a value for a comparison: a tuple is a list in a configuration file, and NaN equals NaN."""
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, (list, tuple)):
        return [_normal(item) for item in value]
    return {key: _normal(item) for key, item in value.items()} if isinstance(value, dict) else value


def check_same_run(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Compare the manifest of a checkpoint with that of the run that resumes from it.

    Raises:
        MisconfigurationException: naming the first argument that differs, with both values.
    """
    for name, one, other in changed(theirs, ours):
        remedy = "use the same value"
        if name.startswith(("model", "data", "epsilon", "target_update", "priorities")) and name != "data.env_id":
            remedy += ", or start a new run from its weights: `fit --init_from`, in Python `DQN.load_from_checkpoint`"
        raise MisconfigurationException(f"{name}={_show(other)}: the checkpoint was made with {_show(one)}; {remedy}")


def check_same_spaces(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Compare the spaces of a checkpoint with those of the module that loads its weights.

    Raises:
        MisconfigurationException: if they differ; the message gives both spaces.
    """
    for name in SPACES:
        if theirs.get(name) != ours[name]:
            env_id = theirs.get("data.env_id")
            raise MisconfigurationException(
                f"{name}={_show(ours[name])}: the checkpoint was made with {_show(theirs.get(name))}; use its "
                + ("environment" if env_id is None else f"env_id={_show(env_id)}")
            )


def network_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first difference in the arguments that determine a model's weights, with both values; may be empty."""
    names = [name for name in ours if name.startswith("model")]
    # the class of the network and of the model before their arguments
    for name in sorted(names, key=lambda name: (name.count("."), not name.startswith("model.network"))):
        decides = name == "model" or name.startswith(("model.network", "model.num_", "model.normalize_"))
        if decides and _normal(theirs.get(name, "nothing")) != _normal(ours[name]):
            other = _show(theirs.get(name, "nothing"))
            return f"{name}={_show(ours[name])} here, {other} in the checkpoint; use the same value"
    return ""


def check_same_on_ranks(manifest: Mapping[str, Any], trainer: Trainer, sync: Any) -> None:
    """Compare the manifests of all ranks, and the `TRAINER_OPTIONS` of their trainers.

    Raises:
        MisconfigurationException: on every rank, naming the first difference with both values.
    """
    options = {f"trainer.{name}": str(getattr(trainer, name, None)) for name in TRAINER_OPTIONS}
    first, *others = sync.gather({**manifest, **options})
    for rank, other in enumerate(others, start=1):
        for name in [*first, *(name for name in other if name not in first)]:
            one, two = first.get(name, "nothing"), other.get(name, "nothing")
            if _normal(one) != _normal(two):
                raise MisconfigurationException(
                    f"{name}={_show(two)} on rank {rank}, but {_show(one)} on rank 0: start all ranks with the same"
                )


def _show(value: Any) -> str:
    with contextlib.suppress(CheckpointError):
        value = decode_space(value, "")
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:197]}..."
