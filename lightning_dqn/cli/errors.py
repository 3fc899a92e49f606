"""Parser and errors of the command line: one line with the key, the value and a remedy."""

import difflib
import functools
import inspect
import os
import re
import sys
from argparse import HelpFormatter
from pydoc import locate
from typing import Any, NoReturn

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_dqn._compat.jsonargparse import help_body, one_line, option_names, unknown_option
from lightning_dqn.callbacks import EpsilonDecay, EpsilonSchedule, PriorityUpdate, SoftTargetUpdate
from lightning_dqn.datamodule import DQNDataModule
from lightning_dqn.module import DQN
from lightning_dqn.networks import MLP, NatureCNN
from lightning_dqn.sampling import PrioritizedSampler
from lightning_dqn.variants import C51, IQN, PQN, QRDQN

# arguments that are set by links, not by options
LINKED = {"observation_space", "action_space", "outputs", "params"}


class DQNArgumentParser(LightningArgumentParser):
    """The parser of one subcommand: no abbreviations, the model's arguments in the help, one-line errors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def get_defaults(self, skip_validation: bool = False, **kwargs: Any) -> Namespace:
        """The defaults without the arguments of the model: jsonargparse would pass them to any other model."""
        defaults = super().get_defaults(skip_validation, **kwargs)
        if "model.init_args" in defaults:
            del defaults["model.init_args"]
        return defaults

    def format_usage(self) -> str:
        """Usage without the list of options."""
        return f"usage: {_command(self)} [options]\n"

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """Lightning's help, and the arguments of the default model, which it omits."""
        text = f"{self.format_usage()}\n{help_body(super().format_help(formatter))}"
        if "model" not in option_names(self):
            return text
        arguments = "".join(
            help_body(_class_parser(owner, key).format_help()).partition(":\n")[2]
            for owner, key in ((DQN, "model"), (MLP, "model.network"), (EpsilonDecay, "epsilon"))
        )
        title = "The defaults, DQN and EpsilonDecay (--model.optimizer.help lists the optimizer's arguments)"
        others = "Other models: --model C51, QRDQN, IQN or PQN (--model.help C51 lists its arguments)"
        return f"{text}\n{title}:\n{arguments}\n{others}\n"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print an error in one line, and exit with code 2."""
        if not self.exit_on_error or debugging():
            super().error(message, ex)
        hint, unknown = "", unknown_option(message)
        if unknown:
            owner: Any = (unknown[1] and locate(unknown[1])) or DQN
            name = f"epsilon.{unknown[0]}" if issubclass(owner, EpsilonSchedule) else unknown[0]
            hint = _suggestion(getattr(ex, "subcommand_parser", None) or self, name, owner)
        _exit_with(one_line(message), hint)


def _command(parser: ArgumentParser) -> str:
    return str(parser.prog).replace(" [options]", "")


def _class_parser(owner: type, key: str) -> ArgumentParser:
    parser = ArgumentParser(add_help=False)
    parser.add_class_arguments(owner, key, skip=LINKED & set(inspect.signature(owner).parameters))
    return parser


def _suggestion(parser: ArgumentParser, unknown: str, model: type) -> str:
    """Suggest the most similar option of the chosen model."""
    known = option_names(parser)
    owners: tuple[tuple[str, type], ...] = (("epsilon", model),)
    if not issubclass(model, EpsilonSchedule):
        owners = (("model", model), ("model.network", MLP), ("model.optimizer", torch.optim.AdamW))
    for prefix, owner in owners:
        known |= option_names(_class_parser(owner, prefix))
    # the name of a group is not an option
    names = {name: name.rpartition(".")[2] for name in sorted(known - {name.rpartition(".")[0] for name in known})}
    last = unknown.rpartition(".")[2]
    near = [name for name, ending in names.items() if ending == last and name != last]
    near += difflib.get_close_matches(unknown, names, n=1, cutoff=0.75)
    near += [name for name, ending in names.items() if len(last) > 2 and ending.startswith(last)]
    near += [name for name, ending in names.items() if difflib.get_close_matches(last, [ending], cutoff=0.8)]
    option = "--help" if model in (DQN, EpsilonDecay) else f"--{owners[0][0]}.help {model.__name__}"
    return f"; did you mean --{near[0]}?" if near else f"; {_command(parser)} {option} lists all options"


def debugging() -> bool:
    """Whether errors are printed with tracebacks, see jsonargparse's JSONARGPARSE_DEBUG."""
    return os.environ.get("JSONARGPARSE_DEBUG", "").lower() in ("true", "yes")


def exit_with_error(error: Exception) -> NoReturn:
    """Print an error in one line, and exit with code 2."""
    if debugging():
        raise error
    _exit_with(as_options(one_line(str(error))))


def as_options(text: str) -> str:
    """Replace names of arguments in an error by options of the command line: num_envs=0 by data.num_envs=0."""
    text = text.replace("=True", "=true").replace("=False", "=false").replace(", or None", ", or null")
    # a name without an underscore may be a word, unless it has a value
    names = r"(?<![\w.\-/])(?:[a-z]\w*(?==)|[a-z]+_\w+(?![\w(/]|\.(?!\w+=)))"
    return re.sub(names, lambda found: _options().get(found[0], found[0]), text)


@functools.cache
def _options() -> dict[str, str]:
    """Options by argument name, for the classes of a run; if classes share a name, that of the first."""
    sections = {
        "model": (DQN, C51, QRDQN, IQN, PQN),
        "data": (DQNDataModule,),
        **{owner.manifest_section: (owner,) for owner in (EpsilonDecay, SoftTargetUpdate, PriorityUpdate)},
        "data.sampler": (PrioritizedSampler,),
        "model.network": (MLP, NatureCNN),
    }
    options = {
        name: f"{section}.{name}"
        for section, owners in reversed(sections.items())
        for owner in owners
        for name in inspect.signature(owner).parameters
    }
    return {**options, "lr": "model.optimizer.lr"}


def _exit_with(text: str, hint: str = "") -> NoReturn:
    sys.stderr.write(f"error: {text[:2000]}{hint}\n")
    sys.exit(2)
