"""One test for each function of `lightning_dqn/_compat/jsonargparse.py`, named after it, as in `test_compat.py`."""

from collections.abc import Callable
from typing import Literal

import pytest
from jsonargparse import ArgumentError, ArgumentParser

import lightning_dqn._compat.jsonargparse as jsonargparse_compat


class Adam:
    """An optimizer with an argument that the other has too, and one of its own."""

    def __init__(self, parameters: list[int], decay: float = 0.1, eps: float = 1.0):
        pass


class Nadam(Adam):
    """As its base, with other defaults."""

    def __init__(self, parameters: list[int], decay: float = 0.2, kind: Literal["linear", "cosine"] = "linear"):
        if decay < 0:
            raise ValueError(f"decay={decay}: must be positive")


class Agent:
    """As `DQN`, with an optimizer as a function of parameters."""

    def __init__(self, optimizer: Callable[[list[int]], Adam], size: int | None = None):
        self.optimizer = optimizer([])


def agent_parser():
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_subclass_arguments(Agent, "model", required=False)
    parser.add_argument("--steps", type=int, default=1)
    return parser


def agent_error(*words):
    """The message of the error of a command line, or of the construction of the model."""
    parser = agent_parser()
    with pytest.raises((ArgumentError, ValueError)) as raised:
        parser.instantiate(parser.parse_args(["--model", f"{__name__}.Agent", *words]))
    return str(raised.value)


OPTIMIZER = "--model.optimizer"


def test_before_class_change():
    replaced = []

    def prepare(before):
        replaced.append(before["class_path"].rpartition(".")[2])
        before["init_args"].__dict__.clear()

    words = "--model", f"{__name__}.Agent", OPTIMIZER, f"{__name__}.Adam", f"{OPTIMIZER}.decay", "0.5"
    words += OPTIMIZER, f"{__name__}.Nadam"
    assert agent_parser().parse_args(words).model.init_args.optimizer.init_args.decay == 0.5
    with jsonargparse_compat.before_class_change(prepare):
        assert agent_parser().parse_args(words).model.init_args.optimizer.init_args.decay == 0.2
    assert set(replaced) == {"Adam"}
    assert agent_parser().parse_args(words).model.init_args.optimizer.init_args.decay == 0.5


def test_option_names():
    names = jsonargparse_compat.option_names(agent_parser())
    assert {"steps", "model"} <= names
    assert not any(name.endswith(".help") for name in names)


def test_unknown_option():
    assert jsonargparse_compat.unknown_option(agent_error("--stepps", "3")) == ("stepps", None)
    assert jsonargparse_compat.unknown_option(agent_error("--model.sise", "3")) == ("sise", f"{__name__}.Agent")
    assert jsonargparse_compat.unknown_option(agent_error("--steps", "many")) is None


def test_help_body():
    text = agent_parser().format_help()
    assert text.startswith("usage:")
    assert "known subclasses:" in " ".join(text.split())
    body = jsonargparse_compat.help_body(text)
    assert "usage:" not in body
    assert "known subclasses" not in " ".join(body.split())
    assert "--steps" in body


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--steps", "many"], "steps=many: must be of type int"),
        (["--model.size", "many"], "model.size=many: must be of type int"),
        ([f"{OPTIMIZER}.kind", "none"], "model.optimizer.kind=none: must be of type Literal['linear', 'cosine']"),
        (["--model.sise", "3"], "model=CLASS.Agent: Option 'sise' is not accepted"),
        ([f"{OPTIMIZER}.deca", "3"], "model.optimizer: Option 'deca' is not accepted"),
        ([OPTIMIZER, "NoSuch"], "model.optimizer=NoSuch: no such class; give its whole path, module.Class"),
        ([OPTIMIZER, "CLASS.Agent"], "model.optimizer: Expected 'CLASS.Agent' to be a subclass of Adam"),
        ([f"{OPTIMIZER}.decay=-1"], "decay=-1.0: must be positive"),
        (["--stepps", "3"], "Unrecognized arguments: --stepps 3"),
    ],
)
def test_one_line(words, line):
    here = [word.replace("CLASS", __name__) for word in words]
    first = [] if here[0] == OPTIMIZER else [OPTIMIZER, f"{__name__}.Nadam"]
    text = jsonargparse_compat.one_line(agent_error(*first, *here))
    assert text.lower() == line.replace("CLASS", __name__).lower()
