"""Runs jobs in separate processes, one at a time, with one thread and one core, and collects their results."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.plan import Measurement
from benchmarks.settings import Job

ROOT = Path(__file__).resolve().parent.parent
STDERR_LINES = 20


@dataclass
class Outcome:
    """The results of a system's processes.

    Attributes:
        figures: one value per round by key; inf for a goal that was not reached, None if not measured.
        notes: one dictionary per round.
        failures: round, reason and last lines of stderr of each failed process.
        absent: reason if the system can't be measured, else empty.
    """

    figures: dict[str, list[float | None]]
    notes: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    absent: str = ""


def environment(device: str) -> dict[str, str]:
    """The environment variables of a job: one thread per library, and no network access."""
    one_thread = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM")
    variables = os.environ | {f"{library}_NUM_THREADS": "1" for library in one_thread}
    variables |= {
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
        "JAX_PLATFORMS": "cpu",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "WANDB_MODE": "offline",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    if device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def measure(measurement: Measurement, common: Job, rounds: int) -> dict[str, Outcome]:
    """Measure all systems, round by round.

    Args:
        measurement: the measurement.
        common: seconds, device, core and scratch folder of all jobs.
        rounds: processes per system; the round is the seed.

    Returns:
        One outcome per system, by name.
    """
    outcomes = {s.name: Outcome({key: [] for key in measurement.figures}) for s in measurement.systems}
    for turn in range(rounds):
        cache = tempfile.mkdtemp(prefix="kernels_", dir=common.scratch)
        for system in measurement.systems:
            outcome = outcomes[system.name]
            if outcome.absent:
                continue
            job = replace(system.job, seconds=common.seconds, seed=turn, device=common.device, core=common.core)
            job = replace(job, scratch=tempfile.mkdtemp(dir=common.scratch))
            job = replace(job, compile_cache=cache if job.own_compile_cache else "")
            [answer] = answers(system.entry, [job], measurement.timeout_s + common.seconds)
            _enter(outcome, answer, turn)
            progress(f"{measurement.name} {turn + 1}/{rounds} {system.name}: {_brief(answer)}")
    return outcomes


def answers(
    entry: str, jobs: list[Job], timeout: float, places: list[dict[str, str]] | None = None
) -> list[dict[str, Any]]:
    """Run one process per job in parallel until all have ended or the time is up.

    Args:
        entry: module and function of the jobs.
        jobs: jobs with separate scratch folders.
        timeout: time limit in s.
        places: additional environment variables of each job, such as its rank.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for job, place in zip(jobs, places or [{}] * len(jobs), strict=True):
            processes.append(_start(entry, job, place))
        end = time.monotonic() + timeout
        reasons = [_wait(process, end, timeout) for process in processes]
    finally:
        for process in processes:
            _end(process)
    return [_read(Path(job.scratch), reason) for job, reason in zip(jobs, reasons, strict=True)]


def _start(entry: str, job: Job, place: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start the process of one job."""
    scratch = Path(job.scratch)
    variables = environment(job.device) | place
    if job.compile_cache:
        variables["TORCHINDUCTOR_CACHE_DIR"] = job.compile_cache
    job = replace(job, launched_at=time.time())
    command = [sys.executable, "-m", "benchmarks.worker", entry, json.dumps(asdict(job)), str(scratch / "answer.json")]
    with (scratch / "stdout").open("w") as stdout, (scratch / "stderr").open("w") as stderr:
        return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=stdout, stderr=stderr, start_new_session=True)


def _wait(process: subprocess.Popen[bytes], end: float, timeout: float) -> str:
    """Wait for a process; returns how it ended."""
    try:
        return f"exit code {process.wait(max(0.0, end - time.monotonic()))}"
    except subprocess.TimeoutExpired:
        return f"no answer after {timeout:.0f} s"


def _read(scratch: Path, reason: str) -> dict[str, Any]:
    """Read the result of a process from its scratch folder."""
    with contextlib.suppress(OSError, json.JSONDecodeError):
        answer: dict[str, Any] = json.loads((scratch / "answer.json").read_text())
        return answer
    last = (scratch / "stderr").read_text(errors="replace").splitlines()[-STDERR_LINES:]
    return {"failed": f"{reason}, {last[-1].strip()}" if last else reason, "stderr": last}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _enter(outcome: Outcome, answer: dict[str, Any], turn: int) -> None:
    """Add the result of one process."""
    if "absent" in answer:
        outcome.absent = answer["absent"]
        return
    if "failed" in answer:
        outcome.failures.append({"round": turn, "why": answer["failed"], "stderr": answer["stderr"]})
    for key, values in outcome.figures.items():
        values.append(answer.get("figures", {}).get(key))
    outcome.notes.append(answer.get("notes", {}))


def _brief(answer: dict[str, Any]) -> str:
    """A result in one line."""
    if "figures" not in answer:
        return str(answer.get("absent") or answer["failed"])
    figures = answer["figures"].items()
    return ", ".join(f"{key} {value:.4g}" for key, value in figures)


def progress(line: str) -> None:
    """Print progress to stderr."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
