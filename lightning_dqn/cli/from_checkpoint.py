"""Reads the configuration of a run from its checkpoint, and checks all values before they are parsed."""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import yaml

from lightning_dqn.callbacks import EpsilonSchedule
from lightning_dqn.datamodule import DQNDataModule
from lightning_dqn.module import DQN
from lightning_dqn.resume.arguments import public_path
from lightning_dqn.resume.content import CheckpointError, check_dict, check_int, check_plain, invalid
from lightning_dqn.resume.manifest import check_description
from lightning_dqn.resume.rebuild import check_env_id, check_env_kwargs, make_arguments, make_factory, make_wrappers

SCHEDULES = ("target_update", "epsilon", "priorities")
# Options outside of the manifest that are saved in a checkpoint, and patterns of their values. None names a folder, a
# file or a class, which jsonargparse would open or import. None occupies the whole machine.
FLAG, WORD, COUNT = "True|False", r"[\w\-]+(/[\w\-]+)*", r"[1-9]\d{0,8}"
LOGGER = "trainer.logger"
LOGGERS = ("CSVLogger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger")
OPTIONS = {
    "trainer.accelerator": "auto|cpu|gpu|cuda|mps",
    "trainer.strategy": "auto|ddp",
    "trainer.devices": "auto|[1-8]",
    "trainer.precision": r"64|32|16|bf16|(64|32|16|bf16)-true|(16|bf16)-mixed",
    "trainer.max_epochs": rf"-1|None|{COUNT}",
    "trainer.check_val_every_n_epoch": COUNT,
    "trainer.log_every_n_steps": COUNT,
    "trainer.enable_progress_bar": FLAG,
    "trainer.enable_model_summary": FLAG,
    LOGGER: f"False|{'|'.join(LOGGERS)}",
    f"{LOGGER}.project": WORD,
    f"{LOGGER}.offline": FLAG,
    "checkpoint.monitor": WORD,
    "checkpoint.mode": "min|max",
    "checkpoint.filename": r"[\w\-]+",
    "checkpoint.save_top_k": rf"-1|0|{COUNT}",
    "plot.filename": r"[\w\-]+\.png",
    "plot.window": COUNT,
    "video.episodes": r"\d{1,2}",
}
# larger values must be given on the command line
LARGEST = {
    "num_envs": 4096,
    "frame_stack": 256,
    "steps_per_iteration": 1_000_000,
    "updates_per_iteration": 1_000_000,
    "batch_size": 10_000_000,
    "eval_episodes": 10_000,
}
LARGEST_ASYNC = 128
# of a description: parsing YAML takes a second per 10,000 values
MAX_VALUES = 20_000


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run that are saved in its checkpoints.

    Args:
        config: configuration of a subcommand, as plain values.
    """
    options = {f"{section}.{name}": value for section in config for name, value in _items(config[section])}
    logger = options[LOGGER]
    if isinstance(logger, dict):
        options[LOGGER] = logger["class_path"].rpartition(".")[2]
        options |= {f"{LOGGER}.{name}": value for name, value in logger["init_args"].items()}
    return {name: value for name, value in options.items() if _is_option(name, value)}


def _items(section: Any) -> Collection[tuple[str, Any]]:
    return section.items() if isinstance(section, dict) else ()


def _is_option(name: Any, value: Any) -> bool:
    """Whether a file may give an option this value."""
    known = type(value) in (bool, int, str, type(None)) and type(name) is str and name in OPTIONS
    return known and re.fullmatch(OPTIONS[name], str(value)) is not None


def config_of(
    checkpoint: Mapping[str, Any], given: Collection[str], trusted_modules: Collection[str]
) -> dict[str, Any]:
    """The configuration of the run that saved a checkpoint.

    Args:
        checkpoint: the loaded checkpoint.
        given: names of the options on the command line, which override those of the checkpoint.
        trusted_modules: modules from which the checkpoint may name classes and environments; they are imported.

    Raises:
        CheckpointError: naming the first value that is wrong, is not trusted, or must be given again.
    """
    agent = check_dict(checkpoint.get("agent"), "agent", ("model", "data", "seed"))
    check_description(agent, check_dict(checkpoint.get("manifest"), "manifest"))
    model = check_dict(agent["model"], "agent.model", ("class_path", "init_args"))
    arguments = check_dict(model["init_args"], "agent.model.init_args")
    model = {**model, "init_args": {name: value for name, value in arguments.items() if f"model.{name}" not in given}}
    config: dict[str, Any] = {"model": model, "data": _data_config(agent["data"], given, trusted_modules)}
    config |= {section: agent[section] for section in SCHEDULES if section in agent and section not in given}
    if agent["seed"] is not None:
        config["seed_everything"] = check_int(agent["seed"], "agent.seed", 0, 2**32 - 1)
    _check_inert(config)
    make_factory(model, DQN, "agent.model", trusted_modules)
    for section in SCHEDULES:
        arguments = check_dict(config.get(section, {}), f"agent.{section}")
        if section == "epsilon" and "class_path" in arguments:
            make_factory(arguments, EpsilonSchedule, f"agent.{section}", trusted_modules)
            continue
        check_plain(arguments, f"agent.{section}")
        if not all(type(key) is str and key.isidentifier() for key in arguments):
            invalid(f"agent.{section}", "has a key that is no name of an argument")
    return _with_options(config, checkpoint.get("options", {}), given)


def _data_config(description: Any, given: Collection[str], trusted_modules: Collection[str]) -> dict[str, Any]:
    check_dict(description, "agent.data", ("class_path", "init_args"))
    if description["class_path"] != public_path(DQNDataModule):
        raise CheckpointError(
            f"agent.data: the run had the data module {description['class_path']}, which the command line does not "
            "know; resume it in Python"
        )
    name = "agent.data.init_args"
    content = check_dict(description["init_args"], name, ("env_id", "env_kwargs", "wrappers"))
    data = {key: value for key, value in content.items() if f"data.{key}" not in given}
    largest = {**LARGEST, "num_envs": LARGEST_ASYNC} if data.get("vectorization") == "async" else LARGEST
    for key, value in data.items():
        if type(value) in (int, float) and value > largest.get(key, math.inf):
            invalid(f"{name}.{key}", f"is {value}: if you mean it, give --data.{key}")
    rest = dict(data)
    check_env_kwargs(rest.pop("env_kwargs", None), f"{name}.env_kwargs")
    make_wrappers(rest.pop("wrappers", None), f"{name}.wrappers", trusted_modules)
    if "env_id" in rest:
        check_env_id(rest.pop("env_id"), f"{name}.env_id", trusted_modules)
    make_arguments(DQNDataModule, rest, name, trusted_modules)
    return data


def _with_options(config: dict[str, Any], options: Any, given: Collection[str]) -> dict[str, Any]:
    for key, value in check_dict(options, "options").items():
        if not _is_option(key, value):
            invalid(f"options.{str(key)[:80]}", "is no option that a checkpoint may set, or no value of it")
        section, _, name = key.partition(".")
        if key not in given and not key.startswith(LOGGER):
            config.setdefault(section, {})[name] = value
    logger = options.get(LOGGER)
    if logger is not None and LOGGER not in given:
        # save_dir is replaced by the folder of the run
        own = {name: options[f"{LOGGER}.{name}"] for name in ("project", "offline") if f"{LOGGER}.{name}" in options}
        described = {"class_path": f"lightning.pytorch.loggers.{logger}", "init_args": {"save_dir": ".", **own}}
        config.setdefault("trainer", {})["logger"] = described if logger else False
    return config


def _check_inert(config: dict[str, Any]) -> None:
    """Check that the command line, which reads configurations as YAML, reads each string as a string.

    For options of any type it parses strings a second time, and instantiates the classes that they describe.
    """
    for count, (name, value) in enumerate(_scalars(config, "agent")):
        if count > MAX_VALUES:
            raise CheckpointError(f"agent has more than {MAX_VALUES:,} values, which take minutes to parse; use Python")
        if type(value) is str and not _is_plain_scalar(value):
            invalid(name[:120], "is a string that the command line would read as something else")


def _scalars(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Names and values of all keys and scalars in a tree."""
    if isinstance(tree, dict):
        for key, item in tree.items():
            yield f"{name}.{key}", key
            yield from _scalars(item, f"{name}.{key}")
    elif isinstance(tree, (list, tuple)):
        for i, item in enumerate(tree):
            yield from _scalars(item, f"{name}[{i}]")
    else:
        yield name, tree


def _is_plain_scalar(text: str) -> bool:
    # neither collections, which could be nested deeper than the parser supports, nor anchors, tags and quotes
    if not text or text[0] in "{[&*!|>%@`\"'?-" or re.search(r":(\s|$)|[\n\r\x00-\x1f]|\s#", text) or len(text) > 1000:
        return not text
    try:
        return bool(yaml.safe_load(text) == text)
    except yaml.YAMLError:
        return False
