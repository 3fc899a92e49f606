"""Defaults of a class that replaces the optimizer, the learning rate schedule or the network on the command line."""

import contextlib
import inspect
from collections.abc import Iterator
from pydoc import locate
from typing import Any
from unittest import mock

import torch
from jsonargparse import _typehints
from lightning.pytorch import LightningModule

from lightning_dqn.callbacks import EpsilonSchedule
from lightning_dqn.cli.errors import exit_with_error

OPTIMIZER = "--model.optimizer"
KINDS = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, EpsilonSchedule)


@contextlib.contextmanager
def reset_init_args_on_class_change() -> Iterator[None]:
    """Context manager: another optimizer, schedule (of lr or epsilon) or network starts with its own defaults.

    jsonargparse keeps each argument that both classes have. So Adam would get AdamW's weight decay, which is an L2
    penalty there, and NatureCNN the hidden layers of MLP. Arguments of a network that differ from the defaults of its
    class are kept: PQN sets layer norm for every network.
    """
    original = _typehints.discard_init_args_on_class_path_change

    def discard(parser_or_action: Any, before: Any, now: Any) -> None:
        if before and "init_args" in before and before["class_path"] != now["class_path"]:
            kind = locate(before["class_path"])
            if inspect.isclass(kind) and issubclass(kind, KINDS):
                before["init_args"].__dict__.clear()
            elif inspect.isclass(kind) and issubclass(kind, torch.nn.Module) and not issubclass(kind, LightningModule):
                _forget_defaults(kind, before["init_args"].__dict__)
        original(parser_or_action, before, now)  # type: ignore[no-untyped-call]

    with mock.patch.object(_typehints, original.__name__, discard):
        yield


def _forget_defaults(kind: type, given: dict[str, Any]) -> None:
    """Remove the arguments that equal the defaults of their class."""
    for name, parameter in inspect.signature(kind).parameters.items():
        # a tuple is a list in a YAML file
        values = [tuple(v) if isinstance(v, list) else v for v in (given.get(name), parameter.default)]
        if name in given and values[0] == values[1]:
            del given[name]


def check_class_before_arguments(words: list[str]) -> None:
    """Check that no argument of the optimizer comes before its class, which would discard it.

    Args:
        words: arguments of the command line, subcommand first.
    """
    flags = [word.partition("=")[0] for word in words]
    given = [flag for flag in flags if flag.startswith(f"{OPTIMIZER}.") and not flag.endswith(".help")]
    behind = flags[flags.index(given[0]) :] if given else []
    # another model may come with another optimizer
    for owner in (OPTIMIZER, "--model"):
        if owner in behind:
            exit_with_error(ValueError(f"{given[0]} comes before {owner}, whose defaults differ; give the class first"))
