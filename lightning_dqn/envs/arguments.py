"""Secrets among the arguments of environments: given by the name of an environment variable, never by value.

`{"api_token": {"from_env": "GAME_TOKEN"}}` is resolved where an environment is made, so that no other object, and no
file of a run, holds the value.
"""

import copy
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_dqn.resume.plain_form import path_step

REFERENCE = "from_env"
HIDDEN = "<hidden>"
CONTAINERS = (dict, list, tuple)
WORDS = {
    *("token", "apikey", "secret", "secrets", "password", "passwd", "passphrase", "pwd"),
    *("credential", "credentials", "auth", "authorization", "bearer", "cookie"),
}


def is_secret_name(name: Any) -> bool:
    """Whether a name is that of a secret: a word of it is in `WORDS`, or it ends in the word key (not key_color)."""
    if not isinstance(name, str):
        return False
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name).lower().replace("_", " ").replace("-", " ").split()
    return not WORDS.isdisjoint(words) or words[-1:] == ["key"]


def is_reference(value: Any) -> bool:
    """Whether a value is a dict with `from_env` as its only key."""
    return isinstance(value, dict) and value.keys() == {REFERENCE}


def has_reference(value: Any, above: tuple[int, ...] = ()) -> bool:
    """Whether a value holds a reference at any depth; `above` are the ids of the containers that it is in."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    inner = (item for item in items if isinstance(item, CONTAINERS) and id(item) not in above)
    return is_reference(value) or any(has_reference(item, (*above, id(value))) for item in inner)


def check_secrets(env_kwargs: Mapping[str, Any]) -> None:
    """Reject secrets that are given by value.

    Raises:
        ValueError: if a string under the name of a secret, at any depth, is not given by reference, or a reference does
            not name an environment variable; it names the path of the argument.
    """
    _check(dict(env_kwargs), "env_kwargs", False, ())


def _check(value: Any, path: str, is_secret: bool, above: tuple[int, ...]) -> None:
    """Check a container.

    Args:
        value: of any type.
        path: of the value.
        is_secret: whether a name on the path is that of a secret.
        above: ids of the containers that it is in, since they may contain themselves.

    Raises:
        ValueError: as `check_secrets`.
    """
    if is_reference(value):
        if not isinstance(value[REFERENCE], str):
            raise ValueError(f"{path}={value}: {REFERENCE} takes the name of an environment variable, a string")
        return
    for key, item in _items(value):
        secret = is_secret or is_secret_name(key)
        if secret and isinstance(item, (str, bytes, bytearray)) and item:
            raise ValueError(
                f"{path}{path_step(key)}: a secret given by value would be saved with the run; put it into an "
                f"environment variable and give the name of that: {{{REFERENCE}: NAME}}"
            )
        if isinstance(item, CONTAINERS) and id(item) not in above:
            _check(item, path + path_step(key), secret, (*above, id(value)))


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    """Items of a container, by key or index."""
    return iter(value.items() if isinstance(value, dict) else enumerate(value))


def resolve(env_kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Replace the references among arguments by the values of their environment variables.

    Args:
        env_kwargs: not changed; containers without a reference are not copied.

    Returns:
        The arguments with the values in place, and the values.

    Raises:
        ValueError: if a variable is not set; it names the path of the argument and the variable.
    """
    values: list[str] = []
    return _resolve(dict(env_kwargs), "env_kwargs", values), values


def _resolve(value: Any, path: str, values: list[str]) -> Any:
    if is_reference(value):
        name = value[REFERENCE]
        if name not in os.environ:
            raise ValueError(f"{path}={{{REFERENCE}: {name}}}: the environment variable {name} is not set")
        values.append(os.environ[name])
        return values[-1]
    if not has_reference(value):
        return value
    items = {key: _resolve(item, path + path_step(key), values) for key, item in _items(value)}
    if isinstance(value, tuple):
        return type(value)._make(items.values()) if hasattr(value, "_make") else tuple(items.values())
    copied = copy.copy(value)
    copied.update(items) if isinstance(value, dict) else copied.__setitem__(slice(None), items.values())
    return copied


def hide_values(text: str, values: list[str]) -> str:
    """A text without the values of environment variables, as they are or as Python writes them."""
    for value in filter(None, values):
        text = text.replace(value, HIDDEN).replace(repr(value)[1:-1], HIDDEN)
    return text
