"""Private functions and message texts of jsonargparse and of Lightning's parser of subcommands."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from jsonargparse import ArgumentParser, _typehints


@contextlib.contextmanager
def before_class_change(prepare: Callable[[Any], None]) -> Iterator[None]:
    """Context manager in which a parser calls `prepare` before an object of another class replaces an old one.

    jsonargparse then keeps all arguments of the old value that the new class also has.

    Args:
        prepare: called with the old value, a Namespace with class_path and init_args, which it may change.
    """
    original = _typehints.discard_init_args_on_class_path_change

    def discard(parser: Any, before: Any, now: Any) -> None:
        if before and "init_args" in before and before["class_path"] != now["class_path"]:
            prepare(before)
        original(parser, before, now)  # type: ignore[no-untyped-call]

    _typehints.discard_init_args_on_class_path_change = discard
    try:
        yield
    finally:
        _typehints.discard_init_args_on_class_path_change = original


def option_names(parser: ArgumentParser) -> set[str]:
    """The options of a parser and the destinations of its arguments, without dashes; those for help are left out."""
    actions = parser._actions
    options = {option.lstrip("-") for action in actions for option in action.option_strings}
    return {
        name for name in options | {action.dest for action in actions} if not name.endswith((".help", "==SUPPRESS=="))
    }


def unknown_option(message: str) -> tuple[str, str | None] | None:
    """The unknown option in an error message, and the class without it if one is named; None for other messages."""
    option = re.search(r"(?:unrecognized arguments: -*|[oO]ption ')([\w.]+)", message)
    owner = re.search(r"class_path '([\w.]+)'", message)
    return (option[1], owner and owner[1]) if option else None


def help_body(text: str) -> str:
    """A help text without its usage and without the lists of all classes that an argument accepts."""
    text = re.sub(r"\Ausage:.*?\n\n", "", text, flags=re.DOTALL)
    return re.sub(r",\s+known\s+subclasses:[^)]*\)", ")", text)


def one_line(message: str) -> str:
    """An error message in one line: the key, the value and the reason, without the tree of types.

    Args:
        message: message of any exception.
    """
    keys = ".".join(dict.fromkeys(re.findall(r'Parser key "([\w.]+)":', message)))
    if not keys and "Does not validate against any of the Union subtypes" not in message:
        return " ".join(message.split())
    unknown = re.search(r"(?:class_path '([\w.]+)':\s+)?(Option '\w+' is not accepted)", message)
    if unknown:
        return f"{keys}={unknown[1]}: {unknown[2]}" if unknown[1] else f"{keys}: {unknown[2]}"
    value = re.search(r"(?:Got|Given) value: (?!Namespace\(|NestedArg\()(.*?)(?:\. Got value: .*)?$", message, re.M)
    name = re.search(r"Expected a dot import path string: (.*)", message)
    types = re.findall(r"Expected an? (?:<class '|typing\.)(?!NoneType)([\w.]+(?:\[[^\]]*\])?)", message)
    if types:
        reason = f"must be of type {' or '.join(types)}"
    elif name:
        value, reason = name, "no such class; give its whole path, module.Class"
    else:
        reason = _leaves(message)
    return f"{keys}={value[1]}: {reason}" if keys and value else f"{keys}: {reason}" if keys else reason


def _leaves(message: str) -> str:
    """The lines of a tree of type errors that are neither nodes nor types."""
    nodes = "Parser key|Problem with|Does not validate|Subtypes:|Errors:|Given value|Expected a path|Expected a <class"
    lines = [line.lstrip(" -") for line in message.splitlines()]
    leaves = [line for line in lines if line and not re.match(nodes, line)] or lines
    text = " ".join(re.sub(r"^Type .*? callable class: |\.* Got value: .*", "", leaf) for leaf in leaves)
    return re.sub(r"<class '([\w.]+)'>", r"\1", text)
