"""Trains and tests the runs, each in processes of its own on a core of its own; finished ones are not repeated.

A run's folder holds the run itself, `output`, `returns.json` and, once all is done, `result.json`.
"""

import contextlib
import csv
import hashlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml

from benchmarks.launch import ROOT, environment
from benchmarks.report import commit
from benchmarks.scores.plan import Run

EPISODES = 100
OUTPUT_LINES = 15
# nothing that is shown or kept takes part in what is learnt
QUIET = "--trainer.logger CSVLogger --trainer.enable_progress_bar false --video.episodes 0"
FIT = f"fit {QUIET} --data.save_memory false"
TEST = "test --trainer.enable_progress_bar false --video.episodes 0"
RETURNS_WRITER = "benchmarks.scores.returns.ReturnsWriter"

Result = dict[str, Any]


class FailedError(Exception):
    """A run's process did not end well; says which and how."""


class Runner:
    """Works through runs side by side.

    Args:
        work: folder of all runs.
        cores: CPUs to use, one run at a time on each; -1 stands for any.
        timeout_s: seconds that one process may take.
    """

    def __init__(self, work: Path, cores: list[int], timeout_s: float) -> None:
        self.work = work
        self.timeout_s = timeout_s
        self.jobs = len(cores)
        self._cores: queue.SimpleQueue[int] = queue.SimpleQueue()
        for core in cores:
            self._cores.put(core)
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def play(self, runs: list[Run]) -> Iterator[tuple[Run, Result | FailedError]]:
        """Give each run's result when it is there. Where the caller is interrupted, all processes end."""
        pool = ThreadPoolExecutor(self.jobs)
        futures = {pool.submit(self._one, run): run for run in runs}
        try:
            for future in as_completed(futures):
                error = future.exception()
                if error is not None and not isinstance(error, FailedError):
                    raise error
                yield futures[future], error or future.result()
        finally:
            self._end_all()
            pool.shutdown(cancel_futures=True)

    def _one(self, run: Run) -> Result:
        """Train and test one run from its beginning."""
        folder = self.work / run.folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        core = self._cores.get()
        try:
            result = {"key": key(run), "command": command(run), "commit": commit(), "load": os.getloadavg()[0]}
            words = [*FIT.split(), *run.words, "--trainer.default_root_dir", str(folder)]
            wall_s, cpu_s = self._process(words, folder / "output", core)
            [last] = folder.glob("*/*/checkpoints/last.ckpt")
            test = [*TEST.split(), "--ckpt_path", str(last), "--data.eval_episodes", str(EPISODES)]
            returns = folder / "returns.json"
            test += [f"--trainer.callbacks+={RETURNS_WRITER}", f"--trainer.callbacks.path={returns}"]
            self._process(test, folder / "output", core)
        finally:
            self._cores.put(core)
        curve = read_curve(folder)
        result |= {"wall_s": wall_s, "cpu_s": cpu_s, "env_steps": curve[-1][0], "curve": curve}
        result |= {"returns": json.loads(returns.read_text())}
        write(folder / "result.json", json.dumps(result))
        return result

    def _process(self, words: list[str], output: Path, core: int) -> tuple[float, float]:
        """Run the command line; seconds by the clock, and of the processor.

        Raises:
            FailedError: unless it ends with 0 in time.
        """
        start = time.monotonic()
        with output.open("ab") as file, self._lock:
            if self._stopped:
                raise FailedError("stopped")
            process = subprocess.Popen(
                [sys.executable, "-m", "lightning_dqn", *words],
                cwd=ROOT,
                env=environment("cpu"),
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                # Ctrl-C is ours to pass on
                start_new_session=True,
            )
            self._processes.add(process)
        if core >= 0:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, {core})
        timer = threading.Timer(self.timeout_s, _kill, [process])
        timer.start()
        # the only wait that tells what the process has used
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        with self._lock:
            process.returncode = os.waitstatus_to_exitcode(status)
            self._processes.discard(process)
        if process.returncode:
            last = output.read_text(errors="replace").splitlines()[-OUTPUT_LINES:]
            said = "\n".join(["", *last])
            raise FailedError(f"exit code {process.returncode}: python -m lightning_dqn {' '.join(words)}{said}")
        return time.monotonic() - start, usage.ru_utime + usage.ru_stime

    def _end_all(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._processes:
                _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process that has not been waited for, and what it has started."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def command(run: Run) -> str:
    """What trains the same agent, to be typed."""
    return f"python -m lightning_dqn fit {' '.join(run.words)}"


def key(run: Run) -> str:
    """Names the settings of a run but for its seed: its words and what their files say, comments apart."""
    without_seed = run.words[:-1]
    said = [yaml.safe_load((ROOT / name).read_text()) if (ROOT / name).is_file() else None for name in run.configs]
    return hashlib.sha256(json.dumps([without_seed, said]).encode()).hexdigest()[:16]


def finished(work: Path, run: Run) -> Result | None:
    """The result of a run with these settings, if it was ever finished."""
    path = work / run.folder / "result.json"
    if not path.is_file():
        return None
    result: Result = json.loads(path.read_text())
    return result if result["key"] == key(run) else None


def read_curve(folder: Path) -> list[tuple[int, float]]:
    """(env steps, mean greedy return) of the evaluations in a run."""
    [path] = folder.glob("*/*/**/metrics.csv")
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/episode_return")]
    return [(round(float(row["env_steps"])), float(row["val/episode_return"])) for row in rows]


def write(path: Path, text: str) -> None:
    """Write a file that is never half there."""
    beside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)
