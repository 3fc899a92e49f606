"""Completes and checks the checkpoints of a `DQN`, and creates modules from them."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer

from lightning_dqn._compat.lightning import count_chunks, repair_loop_progress
from lightning_dqn.resume.allocation import AllocationLimit
from lightning_dqn.resume.arguments import public_path
from lightning_dqn.resume.content import ENTRY, HYPER_PARAMETERS, SCHEMA, CheckpointError, check_dict, check_header
from lightning_dqn.resume.manifest import (
    build_manifest,
    check_description,
    check_same_run,
    check_same_spaces,
    describe_run,
    describe_spaces,
    network_difference,
)
from lightning_dqn.resume.rebuild import make_arguments, resolve_class
from lightning_dqn.resume.rng import get_rng_state
from lightning_dqn.resume.shards import load_shard, save_shard
from lightning_dqn.resume.spaces import decode_space
from lightning_dqn.resume.training_state import check_training_state, check_weights

Module = TypeVar("Module", bound=LightningModule)
# exceptions that constructors raise for invalid arguments
UNBUILDABLE = (
    *(TypeError, ValueError, RuntimeError, MemoryError, ArithmeticError, AssertionError, AttributeError, LookupError),
)


def complete_checkpoint(checkpoint: dict[str, Any], module: Any, trainer: Trainer | None) -> None:
    """Add the manifest, the description of the agent, the RNG state and the shards to a checkpoint.

    Args:
        checkpoint: checkpoint from Lightning; changed in place.
        module: a `DQN`.
        trainer: trainer of the run; None without one.
    """
    parts = () if trainer is None else (trainer.datamodule, trainer.callbacks)  # type: ignore[attr-defined]
    # Lightning's copies of values in the agent's description
    for name in HYPER_PARAMETERS:
        checkpoint.pop(name, None)
    checkpoint[ENTRY] = {"schema": SCHEMA}
    checkpoint["manifest"] = module.manifest or build_manifest(module, *parts)
    checkpoint["agent"] = describe_run(module, *parts)
    checkpoint["generators"] = module.rng_state or get_rng_state(module.device)
    for state in checkpoint.get("lr_schedulers", []):
        # MultiStepLR has a Counter, which torch.load(weights_only=True) rejects
        state |= {name: dict(value) for name, value in state.items() if isinstance(value, Counter)}
    if trainer is not None:
        save_shard(checkpoint, trainer)


def check_checkpoint(
    checkpoint: Mapping[str, Any], module: Any, trainer: Trainer | None = None, data: Any = None
) -> None:
    """Check a checkpoint before a module loads it.

    Args:
        checkpoint: checkpoint from Lightning.
        module: a `DQN`.
        trainer: trainer of the fit that resumes from it; None to load only the weights.
        data: the data module of that fit.

    Raises:
        MisconfigurationException: if the checkpoint is of another environment, network or run.
        CheckpointError: naming the first value that is missing or invalid.
    """
    check_header(checkpoint)
    for name in ("state_dict", "manifest", "agent"):
        if name not in checkpoint:
            raise CheckpointError(f"{name} is missing: this is no checkpoint of this package; use another one")
    manifest = check_dict(checkpoint["manifest"], "manifest")
    check_description(check_dict(checkpoint["agent"], "agent"), manifest)
    if trainer is not None:
        check_same_run(manifest, build_manifest(module, data, trainer.callbacks))  # type: ignore[attr-defined]
    check_same_spaces(manifest, describe_spaces(module))
    try:
        check_weights(checkpoint["state_dict"], module.state_dict())
    except CheckpointError as error:
        cause = network_difference(manifest, build_manifest(module))
        remedy = cause or "use the model and the model.network that it was made with, or another checkpoint"
        raise CheckpointError(f"{str(error).partition(': ')[0]}: {remedy}") from error
    if trainer is not None:
        if hasattr(data, "check_checkpoint"):
            data.check_checkpoint(checkpoint, has_memory=not module.on_policy)
        check_training_state(checkpoint, module, trainer)


def prepare_resume(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Load the shard of this rank into a checked checkpoint, and correct Lightning's progress.

    Args:
        checkpoint: changed in place.
        trainer: trainer of the fit.
    """
    data, fit_loop = trainer.datamodule, checkpoint["loops"]["fit_loop"]  # type: ignore[attr-defined]
    if hasattr(data, "reshard_state"):
        load_shard(checkpoint, trainer)
        count_chunks(fit_loop, *data.chunks_of_epoch(checkpoint[type(data).__qualname__]))
    repair_loop_progress(fit_loop)


def make_module(
    base: type[Module], checkpoint: Mapping[str, Any], trusted_modules: Collection[str], given: Mapping[str, Any]
) -> Module:
    """Create a module from the class, arguments and weights in a checkpoint.

    Args:
        base: required class or base class.
        checkpoint: the loaded checkpoint.
        trusted_modules: modules and packages from which the checkpoint may name classes; they are imported.
        given: constructor arguments that override those of the checkpoint.

    Raises:
        CheckpointError: if a value is missing or wrong, or needs a module that is not trusted.
    """
    agent = check_dict(checkpoint.get("agent"), "agent", ("model", "observation_space", "action_space"))
    model = check_dict(agent["model"], "agent.model", ("class_path", "init_args"))
    # the class that `load_from_checkpoint` is called on needs no import
    own = model["class_path"] == public_path(base)
    cls = base if own else resolve_class(model["class_path"], base, "agent.model.class_path", trusted_modules)
    arguments = make_arguments(cls, model["init_args"], "agent.model.init_args", trusted_modules, given)
    spaces = {
        name: decode_space(agent[name], f"agent.{name}")
        for name in ("observation_space", "action_space")
        if name not in given
    }
    try:
        with AllocationLimit(checkpoint):
            module: Module = cls(**{**spaces, **arguments})
    except CheckpointError:
        raise
    except UNBUILDABLE as error:
        raise CheckpointError(f"agent.model in the checkpoint makes no {cls.__name__}: {error}") from error
    load_weights(module, checkpoint)
    return module


def load_weights(module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Check the weights of a checkpoint, and load them.

    Raises:
        MisconfigurationException: if the spaces differ.
        CheckpointError: naming the first value that does not fit.
    """
    check_checkpoint(checkpoint, module)
    module.load_state_dict(checkpoint["state_dict"])
