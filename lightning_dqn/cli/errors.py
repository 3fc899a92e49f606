"""Parser and errors of the command line: one line with the key, the value and a remedy."""

import difflib
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

from lightning_dqn.callbacks import EpsilonDecay, EpsilonSchedule
from lightning_dqn.module import DQN
from lightning_dqn.networks import MLP

# arguments that are set by links, not by options
LINKED = {"observation_space", "action_space", "outputs", "params"}


class DQNArgumentParser(LightningArgumentParser):
    """The parser of one subcommand: no abbreviations, the model's arguments in the help, errors of one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def get_defaults(self, skip_validation: bool = False, **kwargs: Any) -> Namespace:
        """The defaults, but of the model its class only: jsonargparse would pass its arguments to any other model."""
        defaults = super().get_defaults(skip_validation, **kwargs)
        if "model.init_args" in defaults:
            del defaults["model.init_args"]
        return defaults

    def format_usage(self) -> str:
        """Usage without the list of options."""
        return f"usage: {_command(self)} [options]\n"

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """Lightning's help, and the arguments of the default model, which it omits."""
        text = f"{self.format_usage()}\n{_body(super().format_help(formatter))}"
        if "model" not in {action.dest for action in self._actions}:
            return text
        arguments = "".join(
            _body(_class_parser(_command(self), owner, key).format_help()).partition(":\n")[2]
            for owner, key in ((DQN, "model"), (MLP, "model.network"), (EpsilonDecay, "epsilon"))
        )
        title = "The defaults, DQN and EpsilonDecay (--model.optimizer.help lists the optimizer's arguments)"
        others = "Other models: --model C51, QRDQN, IQN or PQN (--model.help C51 lists its arguments)"
        return f"{text}\n{title}:\n{arguments}\n{others}\n"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print an error in one line, and exit with code 2."""
        if not self.exit_on_error or debugging():
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        text = one_line(message)[:2000]
        unknown = re.search(r"(?:unrecognized arguments: -*|option '|Option ')([\w.]+)", message)
        if unknown:
            named = re.search(r"class_path '([\w.]+)'", message)
            name = f"epsilon.{unknown[1]}" if text.startswith("epsilon=") else unknown[1]
            text += _suggestion(parser, name, (named and locate(named[1])) or DQN)
        sys.stderr.write(f"error: {text}\n")
        sys.exit(2)


def _command(parser: ArgumentParser) -> str:
    return str(parser.prog).replace(" [options]", "")


def _body(text: str) -> str:
    """A help text without its usage and without the lists of all classes that might be given."""
    text = re.sub(r"\Ausage:.*?\n\n", "", text, flags=re.DOTALL)
    return re.sub(r",\s+known\s+subclasses:[^)]*\)", ")", text)


def _class_parser(prog: str, owner: type, key: str) -> ArgumentParser:
    parser = ArgumentParser(prog=prog, add_help=False)
    parser.add_class_arguments(owner, key, skip=LINKED & set(inspect.signature(owner).parameters))
    return parser


def _suggestion(parser: ArgumentParser, unknown: str, model: Any) -> str:
    """A suggestion of the most similar option of the chosen model."""
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    if issubclass(model, EpsilonSchedule):
        owners: tuple[tuple[str, type], ...] = (("epsilon", model),)
    else:
        owners = (("model", model), ("model.network", MLP), ("model.optimizer", torch.optim.AdamW))
    for prefix, owner in owners:
        dests = {action.dest for action in _class_parser(_command(parser), owner, prefix)._actions}
        known |= {dest for dest in dests if not dest.endswith(".help")}
    last = unknown.rpartition(".")[2]
    # the name of a group is not an option
    known -= {name.rpartition(".")[0] for name in known}
    near = [name for name in sorted(known) if name.endswith(f".{last}")]
    near += difflib.get_close_matches(unknown, known, n=1, cutoff=0.75)
    near += [name for name in sorted(known) if len(last) > 2 and name.rpartition(".")[2].startswith(last)]
    near += [name for name in sorted(known) if difflib.get_close_matches(last, [name.rpartition(".")[2]], cutoff=0.8)]
    option = "--help" if model in (DQN, EpsilonDecay) else f"--{owners[0][0]}.help {model.__name__}"
    return f"; did you mean --{near[0]}?" if near else f"; {_command(parser)} {option} lists all options"


def debugging() -> bool:
    """Whether errors are printed with tracebacks, see jsonargparse's JSONARGPARSE_DEBUG."""
    return os.environ.get("JSONARGPARSE_DEBUG", "").lower() in ("true", "yes")


def one_line(message: str) -> str:
    """An error message of jsonargparse in one line, without its tree of types."""
    # an argument of the model: its union may be nested in that of model and null, which has the whole key
    inner = re.search(
        r"Parser key \"model\":.*Problem with given class_path '[\w.]+':\s+Parser key \"([\w.]+)\":(.*)"
        r"\s+- Expected a <class 'NoneType'>\s+Given value type: <class 'jsonargparse\.\S+\s+Given value: (.*)",
        message,
        re.DOTALL,
    )
    if inner:
        whole = re.match(r"NestedArg\(key='([\w.]+)'", inner[3])
        message = f'Parser key "model.{whole[1] if whole else inner[1]}":{inner[2]}'
    # errors of a union's members except None
    union = re.search(r"Errors:(.*?)Given value type:.*?Given value: (.*)", message, re.DOTALL)
    if union:
        key = re.match(r"Parser key \"[^\"]*\":", message)
        complaints = [c.strip() for c in re.split(r"\n\s*- ", union[1]) if c.strip() and "NoneType" not in c]
        value = f". Got value: {union[2]}" if "Namespace(" not in union[2] and "Got value" not in complaints[0] else ""
        message = f"{key[0] if key else ''} {' or '.join(complaints)}{value}"
    message = re.sub(r"Type \S*Callable\[.*? expects a function or a callable class: ", "", message)
    message = re.sub(r"\. Got value: (?:Namespace|NestedArg)\(.*", "", message, flags=re.DOTALL)
    message = re.sub(r"Parser key \"(model|epsilon)\":\s+Problem with given class_path '([\w.]+)':", r"\1=\2:", message)
    message = re.sub(r"<class '([\w.]+)'>|typing\.(Literal\[[^\]]*\])", lambda match: match[1] or match[2], message)
    message = " ".join(message.split())
    # a value is never meant as a file
    message = re.sub(r": or Expected a path but \S+ either not accessible or invalid or ", ": ", message)
    # a class whose whole path was not given
    short = re.match(r'Parser key "([\w.]+)":.* Expected a dot import path string: (\w+)(?:\. Got|$)', message)
    if short:
        ours = hasattr(sys.modules["lightning_dqn"], short[2])
        hint = f"did you mean lightning_dqn.{short[2]}?" if ours else "give its whole path, module.Class"
        return f"{short[1]}={short[2]}: no such class; {hint}"
    # Parser key "data.num_envs": Expected a int. Got value: x
    wrong = re.fullmatch(r'Parser key "([\w.]+)": Expected an? (.*?)\.? Got value: (.*)', message)
    return f"{wrong[1]}={wrong[3]}: must be of type {wrong[2]}" if wrong else message


def exit_with_error(error: Exception) -> NoReturn:
    """Print an error in one line, and exit with code 2."""
    if debugging():
        raise error
    sys.stderr.write(f"error: {one_line(str(error))[:2000]}\n")
    sys.exit(2)
