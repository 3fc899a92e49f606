"""Which arguments of environments are secrets, and what stands in their place in every file of a run.

A rule that needs no list: a value is a secret if a word of its name says so. It is given again at a resume.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

WORDS = {
    *("token", "key", "apikey", "secret", "secrets", "password", "passwd", "passphrase", "pwd"),
    *("credential", "credentials", "auth", "authorization", "bearer", "cookie"),
}
LEFT_OUT = "<a secret, left out>"
OPTION = "--data.env_kwargs"


def is_secret(name: str) -> bool:
    """Whether a word of a name, like the `token` of `api_token` or `apiToken`, says that its value is a secret."""
    return not WORDS.isdisjoint(re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name).lower().replace("_", " ").split())


def hide_secrets(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments, at all depths, with a remark in the place of each secret."""
    return {
        name: LEFT_OUT if is_secret(str(name)) and value is not None else _hide_within(value)
        for name, value in arguments.items()
    }


def _hide_within(value: Any) -> Any:
    if isinstance(value, Mapping):
        return hide_secrets(value)
    return [_hide_within(item) for item in value] if isinstance(value, (list, tuple)) else value


def paths_of_left_out(value: Any, path: str = "") -> Iterator[str]:
    """Where the remark stands in arguments that were read from such a file."""
    if value == LEFT_OUT:
        yield path
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from paths_of_left_out(item, f"{path}.{name}")


def hide_in_text(text: str, arguments: Mapping[str, Any]) -> str:
    """What others say of arguments, without the secrets among them."""
    for value in _secrets(arguments, within=False):
        text = text.replace(value, LEFT_OUT)
    return text


def hide_in_words(words: list[str]) -> list[str]:
    """The words of a command line, without the secrets among the arguments of its environments."""
    shown, flag = [], ""
    for word in words:
        named = word.startswith("--")
        flag, equals, value = word.partition("=") if named else (flag, "", word)
        if flag.startswith(OPTION) and value:
            value = _hide_value(flag, value)
        shown.append(f"{flag}{equals}{value}" if named else value)
    return shown


def _hide_value(flag: str, value: str) -> str:
    if is_secret(flag.rpartition(".")[2]):
        return LEFT_OUT
    try:
        arguments = yaml.safe_load(value)
    except yaml.YAMLError:
        return LEFT_OUT
    hidden = hide_secrets(arguments) if isinstance(arguments, Mapping) else arguments
    return value if hidden == arguments else str(hidden)


def _secrets(value: Any, *, within: bool) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _secrets(item, within=within or is_secret(str(name)))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _secrets(item, within=within)
    elif within and str(value):
        yield str(value)
