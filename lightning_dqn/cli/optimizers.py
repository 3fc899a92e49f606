"""Defaults of a class that replaces the optimizer, the learning rate schedule or the network on the command line."""

import inspect
from contextlib import AbstractContextManager
from pydoc import locate
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lightning_dqn._compat.jsonargparse import before_class_change
from lightning_dqn.callbacks import EpsilonSchedule
from lightning_dqn.cli.errors import exit_with_error

OPTIMIZER = "--model.optimizer"
KINDS = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, EpsilonSchedule)


def reset_init_args_on_class_change() -> AbstractContextManager[None]:
    """Context manager in which a new optimizer, schedule (of lr or epsilon) or network gets its own defaults.

    jsonargparse keeps each argument that both classes have: Adam would get AdamW's weight decay, which is an L2
    penalty there, and NatureCNN the hidden layers of MLP. Arguments of a network that differ from the defaults of its
    class are kept: PQN sets layer norm for every network.
    """
    return before_class_change(_discard)


def _discard(before: Any) -> None:
    """Remove arguments of a class that is replaced: all or, for a network, those that equal their defaults."""
    kind, given = locate(before["class_path"]), before["init_args"].__dict__
    if not inspect.isclass(kind):
        return
    if issubclass(kind, KINDS):
        given.clear()
    elif issubclass(kind, torch.nn.Module) and not issubclass(kind, LightningModule):
        for name, parameter in inspect.signature(kind).parameters.items():
            # a tuple is a list in a YAML file
            if name in given and _without_lists(given[name]) == _without_lists(parameter.default):
                del given[name]


def _without_lists(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def check_class_before_arguments(words: list[str]) -> None:
    """Check that no argument of the optimizer comes before its class, which would discard it.

    Args:
        words: arguments of the command line, subcommand first.
    """
    flags = [word.partition("=")[0] for word in words]
    given = [flag for flag in flags if flag.startswith(f"{OPTIMIZER}.") and not flag.endswith(".help")]
    behind = flags[flags.index(given[0]) :] if given else []
    # another model may have another default optimizer
    for owner in (OPTIMIZER, "--model"):
        if owner in behind:
            exit_with_error(ValueError(f"{given[0]} comes before {owner}, whose defaults differ; give the class first"))
