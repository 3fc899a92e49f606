"""Says what is wrong with a command line in one line: the key, the value, and what to do."""

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

from lightning_dqn.module import DQN
from lightning_dqn.networks import MLP

# arguments that nobody gives on the command line
LINKED = {"observation_space", "action_space", "outputs", "params"}


class DQNArgumentParser(LightningArgumentParser):
    """The parser of one subcommand: no abbreviations, the model's knobs in the help, errors of one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def get_defaults(self, skip_validation: bool = False, **kwargs: Any) -> Namespace:
        """Of the default model its class alone: jsonargparse would hand its knobs on to whatever model is asked for."""
        defaults = super().get_defaults(skip_validation, **kwargs)
        if "model.init_args" in defaults:
            del defaults["model.init_args"]
        return defaults

    def format_usage(self) -> str:
        """Not every option there is."""
        return f"usage: {_command(self)} [options]\n"

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """Lightning's help, and the knobs of the default model, which it would leave out."""
        text = f"{self.format_usage()}\n{_body(super().format_help(formatter))}"
        if "model" not in {action.dest for action in self._actions}:
            return text
        knobs = "".join(
            _body(_class_parser(_command(self), owner, key).format_help()).partition(":\n")[2]
            for owner, key in ((DQN, "model"), (MLP, "model.network"))
        )
        title = "The default model, lightning_dqn.DQN (--model.optimizer.help names the optimizer's knobs)"
        others = "Other models: --model C51, QRDQN, IQN or PQN (--model.help C51 names its knobs)"
        return f"{text}\n{title}:\n{knobs}\n{others}\n"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with one line and exit code 2."""
        if not self.exit_on_error or debugging():
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        text = one_line(message)[:2000]
        unknown = re.search(r"(?:unrecognized arguments: -*|option '|Option ')([\w.]+)", message)
        if unknown:
            named = re.search(r"class_path '([\w.]+)'", message)
            text += _suggestion(parser, unknown[1], (named and locate(named[1])) or DQN)
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
    """The knob that was probably meant, of those that the chosen model has."""
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    for prefix, owner in (("model", model), ("model.network", MLP), ("model.optimizer", torch.optim.AdamW)):
        dests = {action.dest for action in _class_parser(_command(parser), owner, prefix)._actions}
        known |= {dest for dest in dests if not dest.endswith(".help")}
    last = unknown.rpartition(".")[2]
    # a whole group is no knob
    known -= {name.rpartition(".")[0] for name in known}
    near = [name for name in sorted(known) if name.endswith(f".{last}")]
    near += difflib.get_close_matches(unknown, known, n=1, cutoff=0.75)
    near += [name for name in sorted(known) if len(last) > 2 and name.rpartition(".")[2].startswith(last)]
    near += [name for name in sorted(known) if difflib.get_close_matches(last, [name.rpartition(".")[2]], cutoff=0.8)]
    option = "--help" if model is DQN else f"--model.help {model.__name__}"
    return f"; did you mean --{near[0]}?" if near else f"; {_command(parser)} {option} lists all there are"


def debugging() -> bool:
    """Whether errors shall come with their tracebacks, by jsonargparse's own switch."""
    return os.environ.get("JSONARGPARSE_DEBUG", "").lower() in ("true", "yes")


def one_line(message: str) -> str:
    """What jsonargparse says of a value, without its tree of types."""
    # a knob of the model: its union may stand within that of model and null, which knows the whole key
    inner = re.search(
        r"Parser key \"model\":.*Problem with given class_path '[\w.]+':\s+Parser key \"([\w.]+)\":(.*)"
        r"\s+- Expected a <class 'NoneType'>\s+Given value type: <class 'jsonargparse\.\S+\s+Given value: (.*)",
        message,
        re.DOTALL,
    )
    if inner:
        whole = re.match(r"NestedArg\(key='([\w.]+)'", inner[3])
        message = f'Parser key "model.{whole[1] if whole else inner[1]}":{inner[2]}'
    # of a union's complaints, those that are not about null
    union = re.search(r"Errors:(.*?)Given value type:.*?Given value: (.*)", message, re.DOTALL)
    if union:
        key = re.match(r"Parser key \"[^\"]*\":", message)
        complaints = [c.strip() for c in re.split(r"\n\s*- ", union[1]) if c.strip() and "NoneType" not in c]
        value = f". Got value: {union[2]}" if "Namespace(" not in union[2] and "Got value" not in complaints[0] else ""
        message = f"{key[0] if key else ''} {' or '.join(complaints)}{value}"
    message = re.sub(r"Type \S*Callable\[.*? expects a function or a callable class: ", "", message)
    message = re.sub(r"\. Got value: (?:Namespace|NestedArg)\(.*", "", message, flags=re.DOTALL)
    message = re.sub(r"Parser key \"model\":\s+Problem with given class_path '([\w.]+)':", r"model=\1:", message)
    message = re.sub(r"<class '([\w.]+)'>|typing\.(Literal\[[^\]]*\])", lambda match: match[1] or match[2], message)
    message = " ".join(message.split())
    # files that nobody meant
    message = re.sub(r": or Expected a path but \S+ either not accessible or invalid or ", ": ", message)
    # a class whose whole path was not given
    short = re.match(r'Parser key "([\w.]+)":.* Expected a dot import path string: (\w+)(?:\. Got|$)', message)
    if short:
        ours = hasattr(sys.modules["lightning_dqn"], short[2])
        hint = f"did you mean lightning_dqn.{short[2]}?" if ours else "give its whole path, module.Class"
        return f"{short[1]}={short[2]}: no such class; {hint}"
    # Parser key "data.num_envs": Expected a int. Got value: x
    refused = re.fullmatch(r'Parser key "([\w.]+)": Expected an? (.*?)\.? Got value: (.*)', message)
    return f"{refused[1]}={refused[3]}: must be of type {refused[2]}" if refused else message


def exit_with_error(error: Exception) -> NoReturn:
    """Say what is wrong in one line, and end with exit code 2."""
    if debugging():
        raise error
    sys.stderr.write(f"error: {one_line(str(error))[:2000]}\n")
    sys.exit(2)
