"""Checks of the training state before a resume: weights, optimizer, schedules, loops, callbacks, RNG.

The data module checks its own state when it loads it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_dqn._compat.lightning import optimizer_steps
from lightning_dqn.resume.content import (
    CheckpointError,
    check_bool,
    check_dict,
    check_float,
    check_int,
    check_like,
    check_tensor,
    invalid,
)
from lightning_dqn.resume.rng import check_rng_state

# sums of squares and counters in an optimizer's state
NOT_NEGATIVE = {"step", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "acc_delta"}
# options of optimizers that schedules change, or that do not affect the result of a step
SCHEDULED = "lr|betas|momentum|foreach|fused|(initial|max|min|base)_.*"
TRAINING_KEYS = ("loops", "callbacks", "optimizer_states", "lr_schedulers", "generators", "compiled", "global_step")


def check_weights(state: Any, own: Mapping[str, Tensor]) -> None:
    """Check that weights fit a module and are finite: names, shapes and types.

    Args:
        state: state of the checkpoint.
        own: `state_dict()` of the module.

    Raises:
        CheckpointError: naming the first weight that does not fit.
    """
    check_dict(state, "state_dict")
    for name in [*own, *state]:
        if name not in state or name not in own:
            invalid(f"state_dict.{name}", "is missing" if name not in state else "is not in this network")
        tensor, expected = check_tensor(state[name], f"state_dict.{name}", shape=own[name].shape), own[name]
        if tensor.is_floating_point() != expected.is_floating_point() or tensor.is_complex():
            invalid(f"state_dict.{name}", f"has dtype {tensor.dtype}, not {expected.dtype}")
    # versions of the layers' state formats
    versions = getattr(own, "_metadata", {})
    check_like(getattr(state, "_metadata", versions), versions, "state_dict._metadata")
    if "epsilon" in own:
        check_float(float(state["epsilon"]), "state_dict.epsilon", 0, 1)


def check_training_state(checkpoint: Mapping[str, Any], module: Any, trainer: Trainer) -> None:
    """Check that a checkpoint contains the training state of a fit with the structure that this run would save.

    Raises:
        CheckpointError: naming the first value that does not fit.
    """
    for name in TRAINING_KEYS:
        if name not in checkpoint:
            raise CheckpointError(
                f"{name} is missing: the checkpoint holds weights only (save_weights_only=True), from which no run can "
                "be resumed; start a new one from them: `fit --init_from`, in Python `DQN.load_from_checkpoint`"
            )
    check_bool(checkpoint["compiled"], "compiled")
    updates = check_int(checkpoint["global_step"], "global_step")
    optimizer, scheduler = module.probe_optimizer()
    states = checkpoint["optimizer_states"]
    if type(states) is not list or len(states) != 1:
        invalid("optimizer_states", "does not hold the state of one optimizer")
    _check_optimizer_state(states[0], optimizer, "optimizer_states[0]")
    schedules = [] if scheduler is None else [scheduler.state_dict()]
    check_like(checkpoint["lr_schedulers"], schedules, "lr_schedulers", loose=True)
    check_dict(checkpoint["loops"], "loops", ("fit_loop",))
    check_like(checkpoint["loops"]["fit_loop"], trainer.fit_loop.state_dict(), "loops.fit_loop")
    if (steps := optimizer_steps(checkpoint["loops"]["fit_loop"])) != updates:
        invalid("loops.fit_loop", f"counts {steps} updates, and global_step {updates}")
    _check_callbacks(checkpoint["callbacks"], trainer.callbacks)  # type: ignore[attr-defined]
    check_rng_state(checkpoint["generators"], "generators")


def _check_optimizer_state(state: Any, optimizer: torch.optim.Optimizer, name: str) -> None:
    """Check that the tensors of an optimizer's state have the shapes of the parameters: kernels do not check them.

    Args:
        state: state of the checkpoint.
        optimizer: new optimizer of the same class, for parameters of the same shapes.
        name: name of the state in the checkpoint.
    """
    check_dict(state, name, ("state", "param_groups"))
    _check_groups(state["param_groups"], optimizer.param_groups, f"{name}.param_groups")
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    examples: dict[torch.Size, dict[str, Any] | None] = {}
    for index, values in check_dict(state["state"], f"{name}.state").items():
        where = f"{name}.state.{index}"
        if not isinstance(index, int) or not 0 <= index < len(shapes):
            invalid(where, "is of no parameter")
        shape = shapes[index]
        if shape not in examples:
            examples[shape] = _state_example(optimizer, shape)
        example = examples[shape]
        if example is not None and check_dict(values, where).keys() != example.keys():
            invalid(where, f"holds {sorted(map(str, values))}, not {sorted(example)}")
        for key, value in check_dict(values, where).items():
            like = value if example is None else example[key]
            fitting = () if not isinstance(like, Tensor) else ((), shape) if example is None else (like.shape,)
            _check_moment(value, fitting, f"{where}.{key}")


def _check_groups(groups: Any, own_groups: Sequence[Mapping[str, Any]], name: str) -> None:
    """Check that an optimizer can load parameter groups, and that its flags are unchanged."""
    if type(groups) is not list or len(groups) != len(own_groups):
        invalid(name, f"is not a list of {len(own_groups)}")
    first = 0
    for i, (group, own) in enumerate(zip(groups, own_groups, strict=True)):
        where = f"{name}[{i}]"
        check_dict(group, where, tuple(own))
        indices = list(range(first, first + len(own["params"])))
        check_like(group["params"], indices, f"{where}.params")
        if group["params"] != indices:
            invalid(f"{where}.params", f"does not name the {len(indices)} parameters of this network")
        first += len(indices)
        for key in sorted(group.keys() - {"params"}, key=str):
            if key not in own and key != "initial_lr":
                invalid(f"{where}.{key}", "is unknown")
            check_like(group[key], own.get(key, 0.0), f"{where}.{key}", loose=True)
            if key in own and not re.fullmatch(SCHEDULED, key) and group[key] != own[key]:
                invalid(f"{where}.{key}", f"is {group[key]}, not {own[key]}")
        if group.get("fused") and group.get("foreach"):
            invalid(f"{where}.fused", "and foreach are both true")
        check_float(group["lr"], f"{where}.lr", 0)
        for beta in group.get("betas", ()):
            check_float(beta, f"{where}.betas", 0, 1)


def _check_moment(value: Any, shapes: Sequence[Sequence[int]], name: str) -> None:
    """Check that a value of an optimizer's state is a tensor of one of these shapes; without shapes, a number."""
    if not shapes:
        if value is not None:
            check_float(value, name)
        return
    check_tensor(value, name)
    if value.shape not in shapes:
        invalid(name, f"has shape {tuple(value.shape)}, not {tuple(shapes[-1])}")
    if not value.is_floating_point():
        invalid(name, f"has dtype {value.dtype}, which is not floating")
    if name.rpartition(".")[2] in NOT_NEGATIVE and bool((value < 0).any()):
        invalid(name, "is negative")


def _state_example(optimizer: torch.optim.Optimizer, shape: torch.Size) -> dict[str, Any] | None:
    """The state that an optimizer keeps for a parameter after one step; None for optimizers that are not torch's."""
    if not type(optimizer).__module__.startswith("torch.optim") or isinstance(optimizer, torch.optim.LBFGS):
        return None
    parameter = torch.nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.ones(shape)
    options = {name: value for name, value in optimizer.param_groups[0].items() if name not in ("params", "initial_lr")}
    make: Any = type(optimizer)
    probe = make([{"params": [parameter], **options}])
    probe.step()
    example: dict[str, Any] = probe.state[parameter]
    return example


def _check_callbacks(states: Any, callbacks: Iterable[Callback]) -> None:
    """Check that the callbacks of a run can load their states."""
    check_dict(states, "callbacks")
    for callback in callbacks:
        state, name = states.get(callback.state_key), f"callbacks.{callback.state_key}"
        if state is None:
            continue
        example = callback.state_dict()
        check_dict(state, name, tuple(example))
        for key, value in example.items():
            other, where = state[key], f"{name}.{key}"
            if type(value) is int:
                check_int(other, where)
            elif value is not None and type(other) is not type(value) and (other is not None or type(value) is dict):
                invalid(where, f"is a {type(other).__name__}, not a {type(value).__name__}")
        if isinstance(callback, ModelCheckpoint):
            _check_checkpoint_paths(state, name)


def _check_checkpoint_paths(state: Mapping[str, Any], name: str) -> None:
    """Check that a ModelCheckpoint removes files of its own folder only: Lightning compares paths as strings."""
    folder = state["dirpath"]
    if folder is not None and type(folder) is not str:
        invalid(f"{name}.dirpath", "is not a path")
    keys = ("best_model_path", "kth_best_model_path", "last_model_path")
    for path in [*(state[key] for key in keys), *state["best_k_models"]]:
        if type(path) is not str or "://" in path or ".." in Path(path).parts:
            invalid(name, f"names the file {path!r}, which may be anywhere")
    # empty with save_top_k=-1
    if state["kth_best_model_path"] not in ("", *state["best_k_models"]):
        invalid(f"{name}.kth_best_model_path", "is none of best_k_models")
    if any(score is None for score in state["best_k_models"].values()):
        invalid(f"{name}.best_k_models", "has a model without a score")
    for score in (state["best_model_score"], state["kth_value"], *state["best_k_models"].values()):
        if score is not None:
            check_tensor(score, f"{name}.best_k_models", shape=(), finite=False)
