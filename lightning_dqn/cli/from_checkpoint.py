"""The configuration of a run, read from its checkpoint: data of a file, checked before any of it reaches the parser."""

import functools
import math
import re
import typing
from collections.abc import Collection, Mapping
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dqn.callbacks import EpsilonSchedule
from lightning_dqn.data import DQNDataModule
from lightning_dqn.module import DQN
from lightning_dqn.monitoring.agent_video import AgentVideo
from lightning_dqn.monitoring.episode_plot import EpisodePlot
from lightning_dqn.monitoring.run_progress_bar import RunProgressBar
from lightning_dqn.resume.arguments import public_path
from lightning_dqn.resume.content import CheckpointError, check_dict, invalid
from lightning_dqn.resume.manifest import check_description
from lightning_dqn.resume.rebuild import (
    check_arguments,
    check_class,
    check_env_id,
    check_plain,
    check_sizes,
    make_wrappers,
)

# sections whose options have no influence on what is learnt; a checkpoint keeps those that a file may choose
OPTION_SECTIONS: dict[str, type] = {
    "trainer": Trainer,
    "checkpoint": ModelCheckpoint,
    "plot": EpisodePlot,
    "video": AgentVideo,
    "progress_bar": RunProgressBar,
}
SCHEDULES = ("target_update", "epsilon", "priorities")
# Strings that a file may give. Elsewhere jsonargparse imports the class that a string names, or opens the file; paths
# are chosen by who runs the command.
WORD = r"[\w\-]+(/[\w\-]+)*"
STRINGS = {
    "trainer.accelerator": "auto|cpu|gpu|cuda|mps",
    "trainer.strategy": "auto|ddp",
    # jsonargparse gives a number as a string
    "trainer.devices": "auto|[1-8]",
    "trainer.precision": r"64|32|16|bf16|(64|32|16|bf16)-true|(16|bf16)-mixed",
    "trainer.profiler": "simple|advanced|pytorch",
    "trainer.deterministic": "warn",
    "trainer.gradient_clip_algorithm": "norm|value",
    "checkpoint.filename": r"[\w\-]+",
    "checkpoint.monitor": WORD,
    "checkpoint.mode": "min|max",
    "checkpoint.save_last": "link",
    "plot.filename": r"[\w\-]+\.png",
}
# numbers that take this machine's processes, memory or hours: larger ones must be given by who runs the command
LARGEST = {
    # these leave out what every run of the command line has
    "trainer.barebones": 0,
    "trainer.overfit_batches": 0,
    "trainer.devices": 8,
    "trainer.num_nodes": 1,
    "trainer.num_sanity_val_steps": 100,
    "video.episodes": 100,
    "video.max_env_steps": 1_000_000,
    "data.num_envs": 4096,
    "data.frame_stack": 256,
    "data.steps_per_iteration": 1_000_000,
    "data.updates_per_iteration": 1_000_000,
    "data.batch_size": 10_000_000,
    "data.eval_episodes": 10_000,
}
LARGEST_ASYNC = 128
# of a description: YAML is parsed at 10,000 a second
MAX_VALUES = 20_000
# by which Lightning divides
POSITIVE = ("trainer.val_check_interval", "trainer.check_val_every_n_epoch")
# arguments of loggers that say neither where nor to whom they send
LOGGERS = {
    f"lightning.pytorch.loggers.{name}": {
        argument: WORD if argument in ("project", "prefix") else "all" for argument in own
    }
    for name, own in {
        "CSVLogger": ("prefix", "flush_logs_every_n_steps"),
        "MLFlowLogger": ("prefix", "log_model", "synchronous"),
        "TensorBoardLogger": ("prefix", "log_graph", "default_hp_metric"),
        "WandbLogger": ("prefix", "project", "offline", "log_model"),
    }.items()
}


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of a configuration beside the manifest: plain options, loggers, names of callbacks.

    Args:
        config: of a subcommand, as plain values.
    """
    options: dict[str, Any] = {
        f"{section}.{name}": value
        for section in OPTION_SECTIONS
        for name, value in config.get(section, {}).items()
        if _is_option(f"{section}.{name}", value)
    }
    loggers = config["trainer"]["logger"]
    if isinstance(loggers, (dict, list)):
        listed = loggers if isinstance(loggers, list) else [loggers]
        options["loggers"] = [_plain_logger(each) for each in listed if each["class_path"] in LOGGERS]
    callbacks = config["trainer"]["callbacks"] or []
    options["callbacks"] = [each["class_path"] for each in (callbacks if isinstance(callbacks, list) else [callbacks])]
    return options


def _is_option(name: str, value: Any, strings: Mapping[str, str] = STRINGS) -> bool:
    """Whether a file may give an option this value."""
    if type(value) is str:
        return name in strings and re.fullmatch(strings[name], value) is not None
    return _is_number_of(name, value) and not _is_out_of_bounds(name, value)


def _is_number_of(name: str, value: Any) -> bool:
    """Whether an option takes this number, bool or null; an argument of a logger may be any."""
    section, _, argument = name.partition(".")
    if section not in OPTION_SECTIONS:
        return value is None or type(value) in (bool, int, float)
    hints = _option_hints(section)
    takes = set(typing.get_args(hints.get(argument)) or (hints.get(argument),))
    return type(value) in takes or (type(value) is int and float in takes)


@functools.cache
def _option_hints(section: str) -> dict[str, Any]:
    hints: dict[str, Any] = typing.get_type_hints(OPTION_SECTIONS[section].__init__)  # type: ignore[misc]
    return hints


def _is_out_of_bounds(name: str, value: Any) -> bool:
    if name in POSITIVE and type(value) in (int, float) and value <= 0:
        return True
    return type(value) in (bool, int, float) and value > LARGEST.get(name, math.inf)


def _plain_logger(logger: Mapping[str, Any]) -> dict[str, Any]:
    known = LOGGERS[logger["class_path"]]
    arguments = {
        name: value for name, value in logger["init_args"].items() if name in known and _is_option(name, value, known)
    }
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
    if _count(agent) > MAX_VALUES:
        raise CheckpointError(f"agent has more than {MAX_VALUES:,} values, which take minutes to parse; use Python")
    check_description(agent, check_dict(checkpoint.get("manifest"), "manifest"))
    model = check_dict(agent["model"], "agent.model", ("class_path", "init_args"))
    arguments = check_dict(model["init_args"], "agent.model.init_args")
    model = {**model, "init_args": {name: value for name, value in arguments.items() if f"model.{name}" not in given}}
    check_class(model, DQN, "agent.model", trusted_modules)
    config: dict[str, Any] = {"model": model, "data": _data_config(agent["data"], given, trusted_modules)}
    for section in SCHEDULES:
        if section == "epsilon" and type(agent.get(section)) is dict and "class_path" in agent[section]:
            if section not in given:
                check_class(agent[section], EpsilonSchedule, f"agent.{section}", trusted_modules)
                config[section] = agent[section]
        elif section in agent:
            check_plain(check_dict(agent[section], f"agent.{section}"), f"agent.{section}")
            if not all(type(key) is str and key.isidentifier() for key in agent[section]):
                invalid(f"agent.{section}", "has a key that is no name of an argument")
            config[section] = agent[section]
    seed = agent["seed"]
    if seed is not None:
        if type(seed) is not int or not 0 <= seed < 2**32:
            invalid("agent.seed", "is no seed")
        config["seed_everything"] = seed
    check_inert(config, "agent")
    return _with_options(config, checkpoint.get("options", {}), given)


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
    for key, value in data.items():
        if _is_out_of_bounds(f"data.{key}", value):
            invalid(f"{name}.init_args.{key}", f"is {value}: if you mean it, give --data.{key}")
    if data.get("vectorization") == "async" and type(data.get("num_envs")) is int and data["num_envs"] > LARGEST_ASYNC:
        invalid(f"{name}.init_args.num_envs", "is more than 128 processes: if you mean it, give --data.num_envs")
    if "env_kwargs" in data and data["env_kwargs"] is not None:
        check_sizes(data["env_kwargs"], f"{name}.init_args.env_kwargs")
        for key in data["env_kwargs"]:
            if type(key) is not str or not key.isidentifier():
                invalid(f"{name}.init_args.env_kwargs", "has a key that is no name of an argument")
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


def _with_options(config: dict[str, Any], options: Any, given: Collection[str]) -> dict[str, Any]:
    for key, value in check_dict(options, "options").items():
        section, _, name = key.partition(".") if type(key) is str else ("", "", "")
        if key == "callbacks" or key in given:
            continue
        if key == "loggers":
            config.setdefault("trainer", {})["logger"] = _loggers(value)
        elif section in OPTION_SECTIONS and name.isidentifier() and _is_option(key, value):
            config.setdefault(section, {})[name] = value
        else:
            invalid(f"options.{str(key)[:80]}", "is no option that a checkpoint may set, or no value of it")
    return config


def _loggers(value: Any) -> Any:
    if type(value) is not list:
        invalid("options.loggers", "is not a list")
    for i, each in enumerate(value):
        name = f"options.loggers[{i}]"
        check_dict(each, name, ("class_path", "init_args"))
        if type(each["class_path"]) is not str or each["class_path"] not in LOGGERS or len(each) > 2:
            invalid(f"{name}.class_path", "is no logger that a checkpoint may name")
        known = LOGGERS[each["class_path"]]
        for key, argument in check_dict(each["init_args"], f"{name}.init_args").items():
            if key not in known or not _is_option(key, argument, known):
                invalid(f"{name}.init_args.{str(key)[:80]}", "is no option that a checkpoint may set")
    # the run's folder takes its place
    made = [{**each, "init_args": {**each["init_args"], "save_dir": "."}} for each in value]
    # another class on the command line takes over the arguments of a single one
    return made[0] if len(made) == 1 else made


def _count(value: Any) -> int:
    """How many values there are in a tree."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return 1 + sum(_count(item) for item in items)


def check_inert(value: Any, name: str) -> None:
    """Check that the command line, which reads configurations as YAML, takes each string in a value for a string alone.

    Where any value may be given, it parses strings once more, and makes what classes they describe.

    Raises:
        CheckpointError: naming the first string that is more.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            check_inert(key, f"{name}.{key}")
            check_inert(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            check_inert(item, f"{name}[{i}]")
    elif type(value) is str and not _is_plain_scalar(value):
        invalid(name[:120], "is a string that the command line would read as something else")


def _is_plain_scalar(text: str) -> bool:
    # neither collections, which could be nested deeper than the parser can follow, nor anchors, tags and quotes
    if not text or text[0] in "{[&*!|>%@`\"'?-" or re.search(r":(\s|$)|[\n\r\x00-\x1f]|\s#", text) or len(text) > 1000:
        return not text
    try:
        return bool(yaml.safe_load(text) == text)
    except yaml.YAMLError:
        return False


def missing_callbacks(checkpoint: Mapping[str, Any]) -> list[str]:
    """Class paths of the callbacks that a run was given by name, which a checkpoint does not bring with it."""
    names = checkpoint.get("options", {}).get("callbacks", [])
    return [name for name in names if type(name) is str] if type(names) is list else []
