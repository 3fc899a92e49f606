"""What a command line means that names another optimizer, another schedule of its learning rate, or another network."""

import contextlib
import inspect
from collections.abc import Iterator
from pydoc import locate
from typing import Any
from unittest import mock

import torch
from jsonargparse import _typehints
from lightning.pytorch import LightningModule

from lightning_dqn.cli.errors import exit_with_error

OPTIMIZER = "--model.optimizer"
KINDS = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)


@contextlib.contextmanager
def reset_init_args_on_class_change() -> Iterator[None]:
    """Within, another optimizer, schedule or network starts from its own defaults.

    jsonargparse hands each argument on that both classes have. So Adam would get AdamW's weight decay, which is an L2
    penalty there, and NatureCNN the hidden layers of MLP, and nobody has asked for it. Of a network's arguments those
    go on that are not its class's own defaults: PQN asks for layer norm, whatever the network.
    """
    hand_on = _typehints.discard_init_args_on_class_path_change

    def discard(parser_or_action: Any, before: Any, now: Any) -> None:
        if before and "init_args" in before and before["class_path"] != now["class_path"]:
            kind = locate(before["class_path"])
            if inspect.isclass(kind) and issubclass(kind, KINDS):
                before["init_args"].__dict__.clear()
            elif inspect.isclass(kind) and issubclass(kind, torch.nn.Module) and not issubclass(kind, LightningModule):
                _forget_defaults(kind, before["init_args"].__dict__)
        hand_on(parser_or_action, before, now)  # type: ignore[no-untyped-call]

    with mock.patch.object(_typehints, hand_on.__name__, discard):
        yield


def _forget_defaults(kind: type, given: dict[str, Any]) -> None:
    """Of the arguments given to a class, leave those that are not its defaults anyway."""
    for name, parameter in inspect.signature(kind).parameters.items():
        # what is a tuple in Python is a list in a file
        values = [tuple(v) if isinstance(v, list) else v for v in (given.get(name), parameter.default)]
        if name in given and values[0] == values[1]:
            del given[name]


def check_class_before_arguments(words: list[str]) -> None:
    """A knob that stands before the class would be the last optimizer's, and be lost with it.

    Args:
        words: of the command line.
    """
    flags = [word.partition("=")[0] for word in words]
    knobs = [flag for flag in flags if flag.startswith(f"{OPTIMIZER}.") and not flag.endswith(".help")]
    behind = flags[flags.index(knobs[0]) :] if knobs else []
    # another model may come with another optimizer
    for owner in (OPTIMIZER, "--model"):
        if owner in behind:
            exit_with_error(
                ValueError(f"{knobs[0]} stands before {owner}, whose defaults are others; name the class first")
            )
