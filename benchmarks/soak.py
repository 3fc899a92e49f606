"""`python -m benchmarks.soak`: stops a CartPole run at random times by signals and resumes it each time.

With SIGTERM only, the run must end with the weights of an uninterrupted run. With SIGKILL, SIGTERM and SIGINT, all
checkpoints in its folder must load after each signal. Prints its results; exits with 1 if either fails.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from lightning_dqn.resume.checkpoint_io import AtomicCheckpointIO

# a checkpoint about every second, and a run of half a minute
WORDS = "fit --trainer.logger false --video.episodes 0 --trainer.enable_progress_bar false --model.compile false"
WORDS += " --data.epoch_env_steps 1000 --data.eval_episodes 2 --data.eval_max_steps 50 --trainer.max_epochs 20"
# except for signals during imports, for which Python sets the code
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}


def main() -> None:
    """Run both tests, each for half of the time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="Random stops of one CartPole run.")
    parser.add_argument("--minutes", type=float, default=30.0, help="total duration (30)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times and signals (0)")
    given = parser.parse_args()
    # background jobs of a shell ignore it, and child processes would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rng = random.Random(given.seed)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak_") as scratch:
        whole = Path(scratch) / "whole"
        if _play(whole, None, None) != 0:
            raise RuntimeError("the uninterrupted run failed")
        wanted = _weights(_last(whole))
        half = start + 30 * given.minutes
        exact, stops = [], Counter[str]()
        while time.monotonic() < half:
            folder = Path(scratch) / f"stopped_{len(exact)}"
            _soak(folder, rng, [signal.SIGTERM], stops, half + 120)
            exact.append(_same(_weights(_last(folder)), wanted))
        _say(f"SIGTERM only: {stops.total()} stops in {len(exact)} runs; {sum(exact)} ended with the same weights")
        kinds, loaded = Counter[str](), 0
        for i in range(1_000_000):
            if time.monotonic() > start + 60 * given.minutes:
                break
            loaded += _soak(Path(scratch) / f"killed_{i}", rng, list(EXIT_CODES), kinds, start + 60 * given.minutes)
        _say(f"any signal: {dict(kinds)}; {loaded} checkpoints read behind them, all of them whole")
    _say(f"{(time.monotonic() - start) / 60:.1f} minutes")
    sys.exit(0 if all(exact) else 1)


def _soak(folder: Path, rng: random.Random, kinds: list[signal.Signals], stops: Counter[str], end: float) -> int:
    """Stop and resume one run until it ends or the time is up; returns the number of checkpoints read.

    Raises:
        RuntimeError: if the exit code of a process does not match its signal.
        CheckpointError: if a checkpoint can't be read.
    """
    read, code = 0, -1
    while code != 0 and time.monotonic() < end:
        kind = rng.choice(kinds)
        code = _play(folder, kind, rng.uniform(3.0, 12.0))
        if code not in (0, EXIT_CODES[kind], -kind):
            raise RuntimeError(f"a run that was sent {kind.name} left with code {code}")
        stops[kind.name] += code != 0
        for path in folder.glob("*/*/checkpoints/*.ckpt"):
            AtomicCheckpointIO().load_checkpoint(path)
            read += 1
    return read


def _play(folder: Path, kind: signal.Signals | None, seconds: float | None) -> int:
    """Start a run, or resume it from its last checkpoint; send a signal after some seconds."""
    words = [sys.executable, "-m", "lightning_dqn", *WORDS.split(), "--trainer.default_root_dir", str(folder)]
    last = list(folder.glob("*/*/checkpoints/last.ckpt"))
    words += ["--ckpt_path", str(last[0])] if last else []
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            assert kind is not None
            process.send_signal(kind)
            return process.wait(120)


def _last(folder: Path) -> Path:
    [path] = folder.glob("*/*/checkpoints/last.ckpt")
    return path


def _weights(path: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = AtomicCheckpointIO().load_checkpoint(path)["state_dict"]
    return weights


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
