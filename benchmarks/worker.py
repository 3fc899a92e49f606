"""The process of one job: pins itself to its core, runs the job, and writes what came out for the launcher.

Imports nothing heavy before the job does, since some jobs time their own start.
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
        answer: file for the result, or for why there is none.
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
        # less than 1 where other processes used the core, or the job waited for something
        result["notes"]["cpu_share"] = time.process_time() / (time.time() - job.launched_at)
        result["notes"]["python_mops"] = python_mops()
        outcome = result
    Path(answer).write_text(json.dumps(outcome))


def peak_mib() -> float:
    """Most memory that this process has held at once, in MiB; not that of processes it started."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource  # noqa: PLC0415  # not on every system

    # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def python_mops() -> float:
    """Million turns a second of an empty Python loop: how fast the machine was just now."""
    turns = 2_000_000
    start = time.perf_counter()
    for _ in range(turns):
        pass
    return turns / (time.perf_counter() - start) / 1e6


if __name__ == "__main__":
    main(*sys.argv[1:])
