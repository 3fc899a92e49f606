"""The process of one job: pins itself to its core, runs the job, and writes the result for the launcher.

Imports nothing heavy before the job, since some jobs measure their startup time.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

from benchmarks.settings import AbsentError, Job, Result


def main(entry: str, job_json: str, answer: str) -> None:
    """Run a job.

    Args:
        entry: module and function, `package.module:function`.
        job_json: fields of the `Job`.
        answer: file for the result or the reason why there is none.
    """
    job = Job(**json.loads(job_json))
    if job.core >= 0 and not job.all_cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {job.core})
    module, _, function = entry.partition(":")
    try:
        run = getattr(importlib.import_module(module), function)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(job.threads)
        result: Result = run(job)
    except AbsentError as error:
        outcome: object = {"absent": str(error)}
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("benchmarks", "lightning_dqn"):
            raise
        outcome = {"absent": f"{missing} is not installed"}
    else:
        result["figures"]["peak_mib"] = peak_mib()
        # less than 1 if other processes used the core, or the job waited
        result["notes"]["cpu_share"] = time.process_time() / (time.time() - job.launched_at)
        result["notes"]["python_mops"] = python_mops()
        outcome = result
    Path(answer).write_text(json.dumps(outcome))


def peak_mib() -> float:
    """Peak memory of this process in MiB, without child processes."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource  # noqa: PLC0415  # not available on all systems

    # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def python_mops() -> float:
    """Million iterations per second of an empty Python loop, as a measure of the current speed of the machine."""
    turns = 2_000_000
    start = time.perf_counter()
    for _ in range(turns):
        pass
    return turns / (time.perf_counter() - start) / 1e6


if __name__ == "__main__":
    main(*sys.argv[1:])
