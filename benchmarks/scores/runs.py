"""Trains and tests runs in parallel processes, each on a separate core; finished runs are not repeated.

The folder of a run contains the run, `output`, `returns.json` and finally `result.json`.
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
# options of the output do not affect learning
QUIET = "--trainer.logger CSVLogger --trainer.enable_progress_bar false --video.episodes 0"
FIT = f"fit {QUIET} --data.save_memory false"
TEST = "test --trainer.enable_progress_bar false --video.episodes 0"
RETURNS_WRITER = "benchmarks.scores.returns.ReturnsWriter"

Result = dict[str, Any]


class FailedError(Exception):
    """A process of a run failed; the message contains its command and output."""


class Runner:
    """Executes runs in parallel.

    Args:
        work: folder of all runs.
        cores: CPUs to use, one run at a time on each; -1 for any CPU.
        timeout_s: time limit of a process in s.
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
        """Yield the result of each run when it has finished. If the caller is interrupted, all processes are ended."""
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
        """Train and test one run from the start."""
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
        """Run the command line; returns wall time and CPU time in s.

        Raises:
            FailedError: if the exit code is not 0, or the time is up.
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
                # Ctrl-C is handled by this process
                start_new_session=True,
            )
            self._processes.add(process)
        if core >= 0:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, {core})
        timer = threading.Timer(self.timeout_s, _kill, [process])
        timer.start()
        # the only wait function that returns the resource usage
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        with self._lock:
            process.returncode = os.waitstatus_to_exitcode(status)
            self._processes.discard(process)
        if process.returncode:
            last = output.read_text(errors="replace").splitlines()[-OUTPUT_LINES:]
            tail = "\n".join(["", *last])
            raise FailedError(f"exit code {process.returncode}: python -m lightning_dqn {' '.join(words)}{tail}")
        return time.monotonic() - start, usage.ru_utime + usage.ru_stime

    def _end_all(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._processes:
                _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a running process and its children."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def command(run: Run) -> str:
    """The shell command that trains the same agent."""
    return f"python -m lightning_dqn fit {' '.join(run.words)}"


def key(run: Run) -> str:
    """A hash of the settings of a run without its seed: its arguments and the content of its configuration files."""
    without_seed = run.words[:-1]
    contents = [yaml.safe_load((ROOT / name).read_text()) if (ROOT / name).is_file() else None for name in run.configs]
    return hashlib.sha256(json.dumps([without_seed, contents]).encode()).hexdigest()[:16]


def finished(work: Path, run: Run) -> Result | None:
    """The result of a finished run with these settings, or None."""
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
    """Write a file atomically."""
    beside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)
