"""What several test files need: a clean world for child processes, one default run of the CLI with a terminal and one
without, and wandb's own reader of an offline run."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_dqn import EpsilonDecay, SoftTargetUpdate

# On a machine with a busy core, two threads make networks this small up to 30 times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell lets its background jobs ignore Ctrl-C; tests send it to this process and to its children.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# 2 epochs of 250 env steps; one update an env step from the 128th on: 500 - 127 = 373 updates
DEFAULT_FIT = ("fit", "--data.epoch_env_steps", "250", "--trainer.max_epochs", "2", "--data.eval_episodes", "2")
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def clean_environment(home: Path, **extra: str) -> dict[str, str]:
    """The environment of a newcomer: no W&B settings, nothing in the home folder."""
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "XDG_", "JSONARGPARSE_"))
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    return {**env, "HOME": str(home), "NETRC": str(home / ".netrc"), "PATH": path, **extra}


@dataclass
class Finished:
    """A process that has ended."""

    cwd: Path
    env: dict[str, str]
    exit_code: int
    out: str
    err: str
    seconds: float

    @property
    def text(self) -> str:
        """All that was shown."""
        return self.out + self.err

    @property
    def summary(self) -> dict[str, list[str]]:
        """What the summary at the end of a fit says: a name and the lines under it."""
        entries: dict[str, list[str]] = {}
        for line in self.out.partition("Finished: ")[2].splitlines()[1:]:
            entry = re.match(r"  (\w+| ) +(\S.*)", line)
            if not entry:
                break
            name = entry[1].strip() or list(entries)[-1]
            entries.setdefault(name, []).append(entry[2].strip())
        return entries

    @property
    def folder(self) -> Path:
        """Of the run."""
        return (self.cwd / self.summary["plot"][0]).parent


def run_cli(cwd: Path, env: dict[str, str], *words: str) -> Finished:
    """`python -m lightning_dqn` with pipes for a terminal."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "lightning_dqn", *words]
    done = subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return Finished(cwd, env, done.returncode, done.stdout, done.stderr, time.monotonic() - begun)


@pytest.fixture(scope="session")
def default_runs(tmp_path_factory):
    """Two default fits, started at the same time in the same folder: `plain` into pipes, `tty` in a terminal."""
    import pexpect  # noqa: PLC0415  it has no Windows form

    cwd = tmp_path_factory.mktemp("default")
    env = clean_environment(tmp_path_factory.mktemp("home"))
    begun = time.monotonic()
    command = [sys.executable, "-m", "lightning_dqn", *DEFAULT_FIT]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    plain = subprocess.Popen(command, cwd=cwd, env=env, **pipes)
    tty = pexpect.spawn(command[0], command[1:], cwd=cwd, env=env, encoding="utf-8", timeout=120, dimensions=(40, 160))
    tty.expect(pexpect.EOF)
    shown = ANSI.sub("", tty.before).replace("\r\n", "\n")
    tty.close()
    out, err = plain.communicate(timeout=120)
    seconds = time.monotonic() - begun
    return {
        "plain": Finished(cwd, env, plain.returncode, out, err, seconds),
        "tty": Finished(cwd, env, tty.exitstatus, shown, "", seconds),
    }


@pytest.fixture(autouse=True)
def numbers_as_they_were():
    """A test may have chosen how the smallest floats are treated; hypothesis does not run with 0 for them."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def messages():
    """What Lightning's `rank_zero_info` says in this process, line by line."""
    lines: list[str] = []

    class Notebook(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("lightning.pytorch"), Notebook()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def read_offline_run(folder: Path) -> list[dict]:
    """The records of the W&B run in a run's folder, oldest first, as wandb itself reads them."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    try:
        from wandb.sdk.internal.datastore import DataStore  # noqa: PLC0415  in older versions
    except ImportError:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        text = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
        return [json.loads(line) for line in text.splitlines()]
    return list(_records(DataStore(), path))


def _records(store, path: Path):
    """What `wandb leet inspect --json` says, by the reader of versions that lack it."""
    from google.protobuf.json_format import MessageToDict  # noqa: PLC0415
    from wandb.proto.wandb_internal_pb2 import Record  # noqa: PLC0415

    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        content = MessageToDict(getattr(record, kind), preserving_proto_field_name=True)
        if kind == "history":
            content["item"] = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
        if kind == "config":
            content["update"] = {item.key: json.loads(item.value_json) for item in record.config.update}
        if kind == "run":
            content["config"] = {"update": {i.key: json.loads(i.value_json) for i in record.run.config.update}}
        yield {"type": kind, kind: content}


def quiet_trainer(checkpoint=None, **kwargs):
    """A trainer that prints nothing; on the CPU and for one epoch with the two schedules, unless told otherwise.

    It writes nothing but what a ModelCheckpoint that it is given does.
    """
    kwargs = {"accelerator": "cpu", "max_epochs": 1, "callbacks": [SoftTargetUpdate(), EpsilonDecay()], **kwargs}
    kwargs["callbacks"] = [*kwargs["callbacks"], *([checkpoint] if checkpoint else [])]
    return pl.Trainer(
        logger=False,
        enable_checkpointing=checkpoint is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **kwargs,
    )
