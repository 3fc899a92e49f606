"""The configuration of a run, read from its checkpoint: data of a file, checked before any of it reaches the parser."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from lightning_dqn.data import DQNDataModule
from lightning_dqn.module import DQN
from lightning_dqn.resume.arguments import public_path
from lightning_dqn.resume.content import CheckpointError, check_dict, invalid
from lightning_dqn.resume.rebuild import check_arguments, check_class, check_env_id, check_plain, make_wrappers

# sections whose options have no influence on what is learnt; a checkpoint keeps those that are plain
OPTION_SECTIONS = ("trainer", "checkpoint", "plot", "video", "progress_bar")
SCHEDULES = ("target_update", "epsilon", "priorities")
# paths are chosen by who runs the command, not by a file
PATH = re.compile(r"dir|path|folder|version|(^|_)(id|name)$")
WORD = re.compile(r"[\w\-]+(/[\w\-]+)*(\.png)?")
LOGGERS = {f"lightning.pytorch.loggers.{name}" for name in ("CSVLogger", "TensorBoardLogger", "WandbLogger")}


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of a configuration beside the manifest: plain options, loggers, names of callbacks.

    Args:
        config: of a subcommand, as plain values.
    """
    options: dict[str, Any] = {
        f"{section}.{name}": value
        for section in OPTION_SECTIONS
        for name, value in config.get(section, {}).items()
        if _is_option(name, value)
    }
    loggers = config["trainer"]["logger"]
    if isinstance(loggers, (dict, list)):
        listed = loggers if isinstance(loggers, list) else [loggers]
        options["loggers"] = [_plain_logger(each) for each in listed if each["class_path"] in LOGGERS]
    callbacks = config["trainer"]["callbacks"] or []
    options["callbacks"] = [each["class_path"] for each in (callbacks if isinstance(callbacks, list) else [callbacks])]
    return options


def _is_option(name: str, value: Any) -> bool:
    if PATH.search(name):
        return False
    if isinstance(value, str):
        return WORD.fullmatch(value) is not None
    return value is None or type(value) in (bool, int, float)


def _plain_logger(logger: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {name: value for name, value in logger["init_args"].items() if _is_option(name, value)}
    return {"class_path": logger["class_path"], "init_args": arguments}


def config_of(
    checkpoint: Mapping[str, Any], given: Collection[str], trusted_modules: Collection[str]
) -> dict[str, Any]:
    """The configuration of the run that a checkpoint is of.

    Args:
        checkpoint: as it was read.
        given: names of the options on the command line, which replace what no file can hold.
        trusted_modules: modules from which the checkpoint may name classes and environments; they are imported.

    Raises:
        CheckpointError: naming the first value that is wrong, is not trusted, or must be given again.
    """
    agent = check_dict(checkpoint.get("agent"), "agent", ("model", "data", "seed"))
    model = check_dict(agent["model"], "agent.model", ("class_path", "init_args"))
    arguments = check_dict(model["init_args"], "agent.model.init_args")
    model = {**model, "init_args": {name: value for name, value in arguments.items() if f"model.{name}" not in given}}
    check_class(model, DQN, "agent.model", trusted_modules)
    config: dict[str, Any] = {"model": model, "data": _data_config(agent["data"], given, trusted_modules)}
    for section in SCHEDULES:
        if section in agent:
            check_plain(check_dict(agent[section], f"agent.{section}"), f"agent.{section}")
            config[section] = agent[section]
    seed = agent["seed"]
    if seed is not None:
        if type(seed) is not int or not 0 <= seed < 2**32:
            invalid("agent.seed", "is no seed")
        config["seed_everything"] = seed
    return _with_options(config, checkpoint.get("options", {}))


def _data_config(description: Any, given: Collection[str], trusted_modules: Collection[str]) -> dict[str, Any]:
    name = "agent.data"
    check_dict(description, name, ("class_path", "init_args"))
    if description["class_path"] != public_path(DQNDataModule):
        raise CheckpointError(
            f"{name}: the run had the data module {description['class_path']}, which the command line does not know; "
            "resume it in Python"
        )
    content = check_dict(description["init_args"], f"{name}.init_args", ("env_id", "env_kwargs", "wrappers"))
    data = {key: value for key, value in content.items() if f"data.{key}" not in given}
    if "env_id" in data:
        check_env_id(data["env_id"], f"{name}.init_args.env_id", trusted_modules)
    if "wrappers" in data:
        make_wrappers(data["wrappers"], f"{name}.init_args.wrappers", trusted_modules)
    check_arguments(
        DQNDataModule,
        {key: value for key, value in data.items() if key not in ("env_id", "wrappers")},
        f"{name}.init_args",
        trusted_modules,
    )
    return data


def _with_options(config: dict[str, Any], options: Any) -> dict[str, Any]:
    for key, value in check_dict(options, "options").items():
        section, _, name = key.partition(".") if type(key) is str else ("", "", "")
        if key == "callbacks":
            continue
        if key == "loggers":
            config.setdefault("trainer", {})["logger"] = _loggers(value)
        elif section in OPTION_SECTIONS and name.isidentifier() and _is_option(name, value):
            config.setdefault(section, {})[name] = value
        else:
            invalid(f"options.{key}", "is no option that a checkpoint may set")
    return config


def _loggers(value: Any) -> list[dict[str, Any]]:
    if type(value) is not list:
        invalid("options.loggers", "is not a list")
    for i, each in enumerate(value):
        name = f"options.loggers[{i}]"
        check_dict(each, name, ("class_path", "init_args"))
        if each["class_path"] not in LOGGERS:
            invalid(f"{name}.class_path", "is no logger that a checkpoint may name")
        for key, argument in check_dict(each["init_args"], f"{name}.init_args").items():
            if not _is_option(str(key), argument):
                invalid(f"{name}.init_args.{key}", "is no option that a checkpoint may set")
    # the run's folder takes its place
    return [{**each, "init_args": {**each["init_args"], "save_dir": "."}} for each in value]


def missing_callbacks(checkpoint: Mapping[str, Any]) -> list[str]:
    """Class paths of the callbacks that a run was given by name, which a checkpoint does not bring with it."""
    names = checkpoint.get("options", {}).get("callbacks", [])
    return [name for name in names if type(name) is str] if type(names) is list else []
