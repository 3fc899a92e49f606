"""What a command line means that names another optimizer, or another schedule of its learning rate."""

import contextlib
import inspect
from collections.abc import Iterator
from pydoc import locate
from typing import Any
from unittest import mock

import torch
from jsonargparse import _typehints

from lightning_dqn.cli.errors import refuse

OPTIMIZER = "--model.optimizer"
KINDS = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)


@contextlib.contextmanager
def own_defaults() -> Iterator[None]:
    """Within, another optimizer or schedule starts from its own defaults.

    jsonargparse hands each argument on that both classes have. So Adam would get AdamW's weight decay, which is an L2
    penalty there, and nobody has asked for it.
    """
    hand_on = _typehints.discard_init_args_on_class_path_change

    def discard(parser_or_action: Any, before: Any, now: Any) -> None:
        if before and "init_args" in before and before["class_path"] != now["class_path"]:
            kind = locate(before["class_path"])
            if inspect.isclass(kind) and issubclass(kind, KINDS):
                before["init_args"].__dict__.clear()
        hand_on(parser_or_action, before, now)  # type: ignore[no-untyped-call]

    with mock.patch.object(_typehints, hand_on.__name__, discard):
        yield


def refuse_knobs_before_class(words: list[str]) -> None:
    """A knob that stands before the class would be the last optimizer's, and be lost with it.

    Args:
        words: of the command line.
    """
    flags = [word.partition("=")[0] for word in words]
    knobs = [flag for flag in flags if flag.startswith(f"{OPTIMIZER}.") and not flag.endswith(".help")]
    if knobs and OPTIMIZER in flags[flags.index(knobs[0]) :]:
        refuse(ValueError(f"{knobs[0]} stands before {OPTIMIZER}, which starts anew; name the class first"))
