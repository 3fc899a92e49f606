"""Secrets among the arguments of environments, which are given by the name of an environment variable.

`{"api_token": {"from_env": "GAME_TOKEN"}}` is resolved when an environment is made, so that no other object and no file
of a run contains the value.
"""

import copy
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_dqn.resume.plain_form import path_step

REFERENCE = "from_env"
HIDDEN = "<hidden>"
CONTAINERS = (dict, list, tuple)
SECRET_WORDS = {
    *("token", "apikey", "secret", "secrets", "password", "passwd", "passphrase", "pwd"),
    *("credential", "credentials", "auth", "authorization", "bearer", "cookie"),
}


def is_secret_name(name: Any) -> bool:
    """Whether a name contains a word of `SECRET_WORDS` or ends in the word key, unlike key_color."""
    if not isinstance(name, str):
        return False
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name).lower().replace("_", " ").replace("-", " ").split()
    return not SECRET_WORDS.isdisjoint(words) or words[-1:] == ["key"]


def _is_reference(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {REFERENCE}


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    """Items of a container, by key or index."""
    return value.items() if isinstance(value, dict) else enumerate(value)


def check_secrets(env_kwargs: Mapping[str, Any]) -> None:
    """Reject secrets that are given by value.

    Raises:
        ValueError: if a string under the name of a secret, at any depth, is not given by reference, or a reference does
            not name an environment variable.
    """
    _check(dict(env_kwargs), "env_kwargs", False, ())


def _check(value: Any, path: str, is_secret: bool, parents: tuple[int, ...]) -> None:
    """Check a value; `parents` are the ids of the containers around it, since a container may contain itself."""
    if _is_reference(value):
        if not isinstance(value[REFERENCE], str):
            raise ValueError(f"{path}={value}: {REFERENCE} must be the name of an environment variable, a string")
    elif isinstance(value, CONTAINERS) and id(value) not in parents:
        for key, item in _items(value):
            _check(item, path + path_step(key), is_secret or is_secret_name(key), (*parents, id(value)))
    elif is_secret and isinstance(value, (str, bytes, bytearray)) and value:
        raise ValueError(
            f"{path}: a secret given by value would be saved with the run; store it in an environment variable and "
            f"pass its name: {{{REFERENCE}: NAME}}"
        )


def resolve(env_kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Replace the references in arguments by the values of their environment variables.

    Args:
        env_kwargs: arguments; they are not changed, and containers without a reference are not copied.

    Returns:
        The resolved arguments, and the values of all references.

    Raises:
        ValueError: if an environment variable is not set.
    """
    values: list[str] = []
    return dict(_resolve(dict(env_kwargs), "env_kwargs", values, ())), values


def _resolve(value: Any, path: str, values: list[str], parents: tuple[int, ...]) -> Any:
    if _is_reference(value):
        name = value[REFERENCE]
        if name not in os.environ:
            raise ValueError(f"{path}={{{REFERENCE}: {name}}}: the environment variable {name} is not set")
        values.append(os.environ[name])
        return values[-1]
    if not isinstance(value, CONTAINERS) or id(value) in parents:
        return value
    parents = (*parents, id(value))
    items = {key: _resolve(item, path + path_step(key), values, parents) for key, item in _items(value)}
    if all(items[key] is item for key, item in _items(value)):
        return value
    if isinstance(value, tuple):
        return type(value)._make(items.values()) if hasattr(value, "_make") else tuple(items.values())
    copied: Any = copy.copy(value)
    copied.update(items) if isinstance(value, dict) else copied.__setitem__(slice(None), items.values())
    return copied


def hide_values(text: str, values: list[str]) -> str:
    """Replace values of environment variables in a text, also in their `repr` form."""
    for value in filter(None, values):
        text = text.replace(value, HIDDEN).replace(repr(value)[1:-1], HIDDEN)
    return text
