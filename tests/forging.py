"""Forged checkpoints: mutations of the values in real ones, and what comes of opening them."""

import contextlib
import copy
import io
import logging
import math
import multiprocessing
import os
import random
import resource
import signal
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

# what a module in the working folder would leave behind if a file could have it imported
PAYLOAD = "payload_module"
MARKER = "EXECUTED"
SECONDS = 10
CODE = (
    "os.system",
    "subprocess.Popen",
    "builtins.exec",
    "unittest.mock.Mock",
    f"{PAYLOAD}.Net",
    f"{PAYLOAD}.png",
    "lightning_dqn.cli.command.DQNCLI",
    "lightning_dqn.__main__.DQN",
    "torch.nn.Identity",
    "torch.hub.load",
    "evil",
    f"{{class_path: {PAYLOAD}.Net}}",
    "../../outside",
    "-",
)
OTHERS: dict[str, Any] = {
    "none": None,
    "bool": True,
    "str": "x",
    "float": 0.5,
    "negative": -1,
    "zero": 0,
    "huge": 2**60,
    "enormous": 10**30,
    "nan": math.nan,
    "inf": math.inf,
    "list": [1, [2]],
    "dict": {"class_path": f"{PAYLOAD}.Net", "init_args": {}},
    "empty dict": {},
    "tensor": torch.ones(3),
    "sparse": torch.eye(3).to_sparse(),
    "expanded": torch.zeros(1).expand(10**10),
}


def leaves(value, path=()):
    """Key paths of all values in a checkpoint, containers included; of long lists the first."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in list(items)[: 3 if isinstance(value, (list, tuple)) else None]:
        yield from leaves(item, (*path, key))


def item(tree, path):
    """What is at a key path."""
    for key in path:
        tree = tree[key]
    return tree


def replaced(tree, path, change):
    """A copy of a tree, its tensors shared, with `change` applied to the container of the last key of a path."""
    if len(path) > 1:
        inner = replaced(tree[path[0]], path[1:], change)
        if isinstance(tree, tuple):
            return (*tree[: path[0]], inner, *tree[path[0] + 1 :])
    new = copy.copy(tree) if not isinstance(tree, tuple) else list(tree)
    if len(path) > 1:
        new[path[0]] = inner
    else:
        change(new)
    return new


def mutations_of(value):
    """Names of the mutations that make sense of a value."""
    names = ["missing", "extra", *OTHERS]
    if isinstance(value, torch.Tensor):
        names += ["dtype", "shape", "empty", "transposed", "complex", "nan inside", "negative inside", "huge inside"]
    if isinstance(value, str):
        names += [f"code {i}" for i in range(len(CODE))]
    return [*names, "deep", "foreign"]


def mutated(tensor: torch.Tensor, name: str) -> Any:
    """A tensor that is like another one, but for one thing."""
    number = tensor.to(torch.float32) if tensor.dtype == torch.bool else tensor.clone()
    if name in ("nan inside", "negative inside", "huge inside"):
        integral = not number.is_floating_point()
        value = {"nan": -7 if integral else math.nan, "negative": -3, "huge": 2**60}[name.removesuffix(" inside")]
        return (number if tensor.dtype != torch.uint8 else number.long()).fill_(value).to(tensor.dtype)
    return {
        "dtype": lambda: tensor.to(torch.float64 if tensor.dtype != torch.float64 else torch.int16),
        "shape": lambda: torch.cat([tensor.reshape(-1), tensor.reshape(-1)]),
        "empty": lambda: tensor.reshape(-1)[:0],
        "transposed": lambda: tensor.t() if tensor.dim() == 2 else tensor[None],
        "complex": lambda: tensor.to(torch.complex64),
    }[name]()


def forge(checkpoint: dict[str, Any], path: tuple[Any, ...], name: str, rng: random.Random) -> dict[str, Any]:
    """A checkpoint with one mutation of the value at a key path."""
    value, last = item(checkpoint, path), path[-1]
    if name == "missing":
        return replaced(checkpoint, path, lambda parent: parent.pop(last))
    if name == "extra":
        if isinstance(value, (dict, OrderedDict)):
            new = {**value, "surplus": 1}
        else:
            new = [*value, 1] if isinstance(value, list) else [value]
    elif name == "foreign":
        paths = list(leaves(checkpoint))
        new = item(checkpoint, rng.choice(paths))
    elif name == "deep":
        new = "MARKERDEEP"
    elif name.startswith("code "):
        new = CODE[int(name.split()[1])]
    elif name in OTHERS:
        new = OTHERS[name]
    else:
        new = mutated(value, name)

    def put(parent):
        parent[last] = new

    return replaced(checkpoint, path, put)


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Save a checkpoint; MARKERDEEP in it becomes a list nested 10,000 deep, which torch.save could not write."""
    torch.save(checkpoint, path)
    reader = torch._C.PyTorchFileReader(str(path))
    parts = {name: reader.get_record(name) for name in reader.get_all_records()}
    marker = b"X\x0a\0\0\0MARKERDEEP"
    if marker not in parts["data.pkl"]:
        return
    parts["data.pkl"] = parts["data.pkl"].replace(marker, b"]" * 10_000 + b"a" * 9_999)
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, data in parts.items():
        if name not in ("version", "byteorder") and not name.startswith(".data/"):
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()


class Hang(BaseException):
    """It takes too long; nothing catches it but who waits."""


def opened(words: list[str] | str) -> tuple[Any, str]:
    """Exit code of a command line, or the name of an exception, and what was written to stderr.

    `load PATH` is `load_agent`, `module PATH` is `DQN.load_from_checkpoint`.
    """
    from lightning_dqn import DQN, load_agent  # noqa: PLC0415  in a process of its own
    from lightning_dqn.cli import main  # noqa: PLC0415
    from lightning_dqn.resume.content import CheckpointError  # noqa: PLC0415

    def ring(*_):
        raise Hang(f"{SECONDS} s are over")

    # as in a process of the command line: spawned ones of environments import torch again
    multiprocessing.set_start_method("fork", force=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    err = io.StringIO()
    # of this process; other ones may keep it waiting
    signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(6 * SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                if words[0] == "load":
                    load_agent(words[1])
                elif words[0] == "module":
                    DQN.load_from_checkpoint(words[1])
                else:
                    main(words)
            except CheckpointError as error:
                return 2, f"error: {error}"
        return 0, ""
    except SystemExit as left:
        return left.code, err.getvalue()
    except BaseException as error:  # a Hang too
        place = error.__traceback__
        while place.tb_next is not None:
            place = place.tb_next
        return f"{type(error).__name__} in {place.tb_frame.f_code.co_filename}:{place.tb_lineno}", str(error)
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def attempt(folder: str, base: str, path: tuple[Any, ...], name: str, seed: int) -> dict[str, Any]:
    """Forge a checkpoint and open it, in a folder with a module and a configuration that nothing may touch."""
    os.chdir(folder)
    sys.path[:0] = [""] * ("" not in sys.path)
    torch.set_num_threads(1)
    checkpoint = torch.load(base, weights_only=True)
    rng = random.Random(seed)
    file = Path(f"{os.getpid()}.ckpt")
    write(forge(checkpoint, path, name, rng), file)
    epochs = ["--trainer.max_epochs", "2", "--trainer.enable_model_summary", "false", "--video.episodes", "0"]
    command = rng.choice(["fit", "fit", "fit", "test", "load", "module"])
    if path[0] in ("DQNDataModule", "loops", "callbacks", "optimizer_states", "generators", "lr_schedulers"):
        command = "fit"
    words = [command, *([] if command in ("load", "module") else ["--ckpt_path"]), str(file)]
    code, text = opened([*words, *(epochs if command == "fit" else [])])
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    executed = Path(MARKER).exists()
    return {"command": command, "code": code, "text": text, "megabytes": used, "executed": executed}
