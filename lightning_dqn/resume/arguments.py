"""Constructor arguments as plain values, from which a class in a checkpoint can be instantiated.

A class is described as `{"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4, ...}}`, as in a LightningCLI
configuration. A Python object without such a description is `{"opaque": name}`: it must be passed again.
"""

import functools
import importlib
import inspect
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

from lightning_dqn.resume.plain_form import plain_form

T = TypeVar("T", bound=type)
# packages that export classes under a shorter path than that of the defining module
PUBLIC_MODULES = ("lightning_dqn", "torch.optim", "torch.optim.lr_scheduler", "torch.nn", "gymnasium.wrappers")


def record_arguments(cls: T) -> T:
    """Record the arguments of the constructor in each instance of a class and of its subclasses.

    `instance.init_args` are those of the outermost constructor, by name, defaults included; `instance.all_args` also
    contain those of the constructors that it calls with `super().__init__`.

    Args:
        cls: the class; changed in place.
    """
    owner: Any = cls

    def init_subclass(subclass: type, /, **kwargs: Any) -> None:
        super(owner, subclass).__init_subclass__(**kwargs)
        _record_arguments(subclass)

    owner.__init_subclass__ = classmethod(init_subclass)
    # of classes without a constructor
    owner.all_args = owner.init_args = {}
    return _record_arguments(cls)


def _record_arguments(cls: T) -> T:
    constructor: Any = cls.__dict__.get("__init__")
    if constructor is None:
        return cls
    signature = inspect.signature(constructor)
    variadic = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]

    @functools.wraps(constructor)
    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        constructor(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        _, *given = bound.arguments.items()
        own = {name: value for name, value in given if name not in variadic}
        for name in variadic:
            own |= bound.arguments[name]
        # constructors called with super() have already recorded their arguments
        self.all_args = {**getattr(self, "all_args", {}), **own}
        self.init_args = own

    cls.__init__ = recording  # type: ignore[misc]
    return cls


def public_path(cls: type) -> str:
    """The shortest import path of a class that stays valid when a package moves it between its modules."""
    for module in PUBLIC_MODULES:
        if cls.__module__.startswith(module) and getattr(importlib.import_module(module), cls.__name__, None) is cls:
            return f"{module}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def describe_class(cls: type, given: Mapping[str, Any], *, skip: int) -> dict[str, Any]:
    """Describe a class with its arguments, defaults included.

    Args:
        cls: the class.
        given: its arguments by name.
        skip: number of leading parameters to leave out, which the caller passes.
    """
    parameters = list(inspect.signature(cls).parameters.values())
    caller = {parameter.name for parameter in parameters[:skip]}
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    arguments = {name: value for name, value in {**defaults, **given}.items() if name not in caller}
    return {"class_path": public_path(cls), "init_args": {name: describe(value) for name, value in arguments.items()}}


def describe(value: Any, *, skip: int = 0) -> Any:
    """Describe a value as plain values.

    Args:
        value: plain values, a class, a `functools.partial` of a class, or anything else.
        skip: number of leading parameters of a class to leave out, which the caller passes.
    """
    if isinstance(value, type):
        return describe_class(value, {}, skip=skip)
    if isinstance(value, functools.partial):
        # jsonargparse passes a class as an argument of its own functions
        classes = [part for part in (value.func, *value.args) if isinstance(part, type)]
        if len(classes) == 1:
            return describe_class(classes[0], value.keywords, skip=skip)
    if callable(value):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return {"opaque": f"{getattr(value, '__module__', type(value).__module__)}.{name}"}
    return plain_form(value)


def describe_network(make: Any, net: Any, *, skip: int) -> Any:
    """Describe a class with its arguments: those of the callable or, for a lambda, those of the network it returned.

    Args:
        make: the callable.
        net: the network it returned, or a module that contains it; networks of this package record their arguments.
        skip: number of leading parameters of the class to leave out, which the caller passes.
    """
    described = describe(make, skip=skip)
    if isinstance(described, dict) and "opaque" in described:
        for module in net.modules():
            if hasattr(module, "init_args"):
                return describe_class(type(module), module.init_args, skip=skip)
    return described


def describe_optimizer(optimizer: Any) -> dict[str, Any]:
    """Describe the class and arguments of an optimizer, read from the instance."""
    names = inspect.signature(type(optimizer)).parameters
    return describe_class(type(optimizer), {k: v for k, v in optimizer.defaults.items() if k in names}, skip=1)


def describe_instance(make: Any, made: Any, *, skip: int) -> Any:
    """Describe a class with its arguments: those of the callable or, for a lambda, attributes of the returned object.

    Args:
        make: the callable.
        made: the object it returned; its class stores each argument in an attribute of the same name.
        skip: number of leading parameters of the class to leave out, which the caller passes.
    """
    described = describe(make, skip=skip)
    if isinstance(described, dict) and "opaque" in described:
        # last_epoch is part of a schedule's state
        names = [name for name in list(inspect.signature(type(made)).parameters)[skip:] if name != "last_epoch"]
        if all(hasattr(made, name) for name in names):
            kept = {name: getattr(made, name) for name in names}
            # MultiStepLR stores its list of milestones as a Counter
            given = {name: sorted(v.elements()) if isinstance(v, Counter) else v for name, v in kept.items()}
            return describe_class(type(made), given, skip=skip)
    return described
