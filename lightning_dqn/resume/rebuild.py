"""Creates classes and objects from the descriptions in a checkpoint.

A class that a checkpoint names is imported only from this package, from torch's optimizers, schedules and layers,
and from Gymnasium's wrappers. The caller must trust any other module by its name.
"""

import functools
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym
import torch
from torch import nn

from lightning_dqn.resume.content import CheckpointError, check_dict, check_plain, invalid
from lightning_dqn.resume.plain_form import path_step


@runtime_checkable
class _Sampler(Protocol):
    """The interface of a sampler."""

    def add(self, rows: Any) -> None: ...

    def drop_oldest(self, count: int) -> None: ...

    def draw(self, size: int, minibatches: int = 1) -> Any: ...


# modules whose classes a file may name, submodules included
ALLOWED_MODULES = ("lightning_dqn", "torch.optim", "torch.nn", "gymnasium.wrappers")
# arguments that are classes with arguments themselves, and their required base classes
CLASS_ARGUMENTS: dict[str, type] = {
    "network": nn.Module,
    "optimizer": torch.optim.Optimizer,
    "lr_scheduler": torch.optim.lr_scheduler.LRScheduler,
    "sampler": _Sampler,
}
NOT_FROM_FILE = (gym.wrappers.RecordVideo, gym.wrappers.HumanRendering)
# largest length of a list of layers, milestones or sizes
MAX_ITEMS = 1000
# names of arguments that determine the size of an array, and their largest value in a file
SIZE_NAMES, MAX_SIDE = "size|shape|stack|width|height|threads|repeat", 4096
PLAIN_TYPES = (Any, None, type(None), bool, int, float, str, list, tuple, dict)


def _is_trusted(module: str, trusted_modules: Collection[str]) -> bool:
    """Whether a module that a file names may be imported: it or a package that contains it is trusted."""
    return any(module == name or module.startswith(f"{name}.") for name in (*ALLOWED_MODULES, *trusted_modules))


def _check_trusted(module: str, name: str, trusted_modules: Collection[str]) -> None:
    """Check that a module that a file names under `name` may be imported.

    Raises:
        CheckpointError: if it may not; the message names the option that allows it.
    """
    if not _is_trusted(module, trusted_modules):
        root = module.partition(".")[0]
        raise CheckpointError(
            f"{name} in the checkpoint is of the module {module}, which is imported only if you trust it: "
            f"--trust {root}, in Python trusted_modules=[{root!r}]"
        )


def modules_to_trust(description: Any) -> set[str]:
    """Packages of the described classes and of the environment's id that must be trusted."""
    found: set[str] = set()
    if isinstance(description, dict):
        for key, value in description.items():
            module = value.rpartition("." if key == "class_path" else ":")[0] if isinstance(value, str) else ""
            if key in ("class_path", "env_id") and module and not _is_trusted(module, ()):
                found.add(module.partition(".")[0])
            found |= modules_to_trust(value)
    elif isinstance(description, list):
        found = found.union(*map(modules_to_trust, description))
    return found


def trust_option(description: Any) -> str:
    """The option of the command line that trusts the modules of a described run, after a space; empty without any."""
    modules = ",".join(sorted(modules_to_trust(description)))
    return f" --trust {modules}" if modules else ""


def resolve_class(class_path: Any, base: type, name: str, trusted_modules: Collection[str] = ()) -> type:
    """The class that a checkpoint names.

    Args:
        class_path: dotted import path.
        base: required base class.
        name: name of the value in the checkpoint.
        trusted_modules: further modules that may be imported.

    Raises:
        CheckpointError: if it is not in a trusted module, does not exist, or is not a subclass of `base`.
    """
    if type(class_path) is not str or not re.fullmatch(r"[A-Za-z]\w*(\._?[A-Za-z]\w*)+", class_path):
        # importing a `__main__` module would run it
        invalid(name, "is not the import path of a class")
    module, _, attribute = class_path.rpartition(".")
    _check_trusted(module, name, trusted_modules)
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except (ImportError, gym.error.Error) as error:
        raise CheckpointError(f"{name}={class_path} in the checkpoint can't be imported: {error}") from error
    if found is None:
        raise CheckpointError(f"{name}={class_path} in the checkpoint: the module {module} has no {attribute} any more")
    if not isinstance(found, type) or not issubclass(found, base):
        invalid(name, f"is {class_path}, which is not a subclass of {base.__module__}.{base.__qualname__}")
    if issubclass(found, NOT_FROM_FILE):
        invalid(name, f"is {class_path}, which writes files or opens windows")
    # a trusted module may re-export classes of other modules
    _check_trusted(found.__module__, name, trusted_modules)
    return found


def make_arguments(
    cls: type, arguments: Any, name: str, trusted_modules: Collection[str] = (), given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Check the arguments of a class; classes that are described among them become factories.

    Args:
        cls: the class.
        arguments: arguments in the checkpoint.
        name: name of the arguments in the checkpoint.
        trusted_modules: further modules that may be imported.
        given: arguments that override those of the checkpoint.

    Raises:
        CheckpointError: naming an argument that has no plain form and must be given again, or that is not allowed.
    """
    made, hints = dict(given or {}), _type_hints(cls)
    for key, value in check_dict(arguments, name).items():
        where = f"{name}.{key}"
        if type(key) is not str or not key.isidentifier():
            invalid(where[:80], "is no name of an argument")
        if key in (given or {}):
            continue
        _check_not_opaque(value, where, f"{key}=...")
        if key in CLASS_ARGUMENTS:
            made[key] = None if value is None else make_factory(value, CLASS_ARGUMENTS[key], where, trusted_modules)
            continue
        if value is not None and _takes_code(hints.get(key)):
            invalid(where, "is a function, which no file may name")
        if isinstance(value, (list, tuple)) and len(value) > MAX_ITEMS:
            invalid(where, f"has {len(value):,} items, over {MAX_ITEMS:,}")
        check_plain(value, where)
        _check_strings(value, hints.get(key, Any), where)
        made[key] = value
    return made


def make_factory(
    description: Any, base: type, name: str, trusted_modules: Collection[str] = ()
) -> functools.partial[Any]:
    """Check a described class and its arguments, and create a factory.

    Args:
        description: `{"class_path": ..., "init_args": {...}}` from a file.
        base: required base class.
        name: name of the description in the checkpoint.
        trusted_modules: further modules that may be imported.

    Raises:
        CheckpointError: as `resolve_class` and `make_arguments`.
    """
    content = check_dict(description, name, ("class_path", "init_args"))
    for key in content.keys() - {"class_path", "init_args"}:
        invalid(f"{name}.{key}", "is unknown")
    if base is gym.Wrapper:
        _check_sizes(content["init_args"], f"{name}.init_args")
    cls = resolve_class(content["class_path"], base, name, trusted_modules)
    return functools.partial(cls, **make_arguments(cls, content["init_args"], f"{name}.init_args", trusted_modules))


def make_wrappers(descriptions: Any, name: str, trusted_modules: Collection[str] = ()) -> list[Callable[..., Any]]:
    """Create factories of the described Gymnasium wrappers."""
    if descriptions is None:
        return []
    if not isinstance(descriptions, list):
        invalid(name, "is not a list of wrappers")
    _check_not_opaque(descriptions, name, "wrappers=[...]")
    return [make_factory(each, gym.Wrapper, f"{name}[{i}]", trusted_modules) for i, each in enumerate(descriptions)]


def check_env_kwargs(value: Any, name: str) -> dict[str, Any]:
    """Check the arguments of an environment; None becomes an empty dict.

    Raises:
        CheckpointError: naming an argument that has no plain form, or is too large.
    """
    if value is None:
        return {}
    _check_not_opaque(value, name, "env_kwargs={...}")
    check_plain(value, name)
    _check_sizes(value, name)
    if not all(type(key) is str and key.isidentifier() for key in value):
        invalid(name, "has a key that is no name of an argument")
    return dict(value)


def check_env_id(env_id: Any, name: str, trusted_modules: Collection[str] = ()) -> str:
    """Check an environment's id, and that the module it may contain is trusted.

    Raises:
        CheckpointError: if it is not an id, or its module is not trusted.
    """
    if type(env_id) is not str or not env_id or len(env_id) > 500:
        invalid(name, "is not the id of an environment")
    if env_id.startswith("GymV2"):
        invalid(name, f"is {env_id}, which imports whatever its arguments name")
    module = env_id.rpartition(":")[0]
    if module:
        _check_trusted(module, name, trusted_modules)
    return env_id


def _check_sizes(arguments: Any, name: str) -> None:
    """Check that no size among the arguments of an environment or wrapper exceeds `MAX_SIDE`."""
    for key, value in check_dict(arguments, name).items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if re.search(SIZE_NAMES, str(key)) and any(type(n) in (int, float) and n > MAX_SIDE for n in numbers):
            raise CheckpointError(
                f"{name}.{key} in the checkpoint is more than {MAX_SIDE}; give it again if you mean it"
            )


def _check_not_opaque(value: Any, name: str, argument: str) -> None:
    """Check that a value holds no digest or name of a Python object; else the caller must pass `argument`."""
    if isinstance(value, dict) and value.keys() in ({"digest"}, {"opaque"}):
        (original,) = value.values()
        raise CheckpointError(f"{name} was {str(original).partition(' ')[0]}, which a file can't hold: pass {argument}")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        _check_not_opaque(item, name + path_step(key), argument)


def _type_hints(cls: type) -> dict[str, Any]:
    """Annotations of a constructor's parameters, evaluated if possible."""
    try:
        return typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    except (NameError, TypeError, AttributeError):
        parameters = inspect.signature(cls).parameters.values()
        return {p.name: p.annotation for p in parameters if p.annotation is not inspect.Parameter.empty}


def _takes_code(hint: Any) -> bool:
    """Whether an annotation allows a function or a class."""
    return hint is type or "Callable" in str(hint) or "type[" in str(hint).lower()


def _check_strings(value: Any, hint: Any, name: str) -> None:
    """Check that only parameters that accept strings get strings: for others jsonargparse imports the named object."""
    atoms = list(_atoms(hint))
    literal = [word for each in atoms if typing.get_origin(each) is typing.Literal for word in typing.get_args(each)]
    known = all(each in PLAIN_TYPES or typing.get_origin(each) is typing.Literal for each in atoms)
    takes = Any in atoms or str in atoms or dict in atoms or list in atoms
    if _has_string(value) and not (type(value) is str and value in literal) and not (known and takes):
        invalid(name, f"is or holds a string, where the constructor takes {hint}")


def _has_string(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_string(item) for pair in value.items() for item in pair)
    return type(value) is str or (isinstance(value, (list, tuple)) and any(map(_has_string, value)))


def _atoms(hint: Any) -> Iterator[Any]:
    """Yield the types that an annotation consists of."""
    arguments = [each for each in typing.get_args(hint) if each is not ...]
    if not arguments or typing.get_origin(hint) is typing.Literal:
        yield hint
    else:
        for each in arguments:
            yield from _atoms(each)
