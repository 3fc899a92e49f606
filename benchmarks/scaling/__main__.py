"""`python -m benchmarks.scaling`: predicts the throughput of 2 to 64 ranks from one, and checks it against two.

Measures a single rank, a rank whose collective calls return at once, and messages between two processes; `model`
predicts from these. Then two ranks train with Lightning's `strategy="ddp"` and gloo over loopback, one core each, and
are compared with the prediction. Takes two to three minutes on an idle machine;
needs `pip install -e ".[bench]"` for Pong. Writes benchmarks/results/scaling.json and scaling.png.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.launch import ROOT, answers, progress
from benchmarks.report import machine
from benchmarks.scaling.picture import draw
from benchmarks.scaling.report import Measured, results
from benchmarks.scaling.tables import check_table, markdown, messages_table
from benchmarks.scaling.workloads import WORKLOADS
from benchmarks.settings import AbsentError, Job

TIMEOUT_S = 600


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description="How far ranks would scale.")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="workloads")
    parser.add_argument("--cores", nargs=2, type=int, metavar="CPU", help="cores of the two ranks (the last two)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the runs and the simulation (0)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--table", action="store_true", help="print the table of docs/benchmarks.md from saved results")
    given = parser.parse_args()
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [-1, -1]
    given.cores = given.cores or available[-2:]
    if not given.table and (len(given.cores) < 2 or not set(given.cores) <= set(available)):
        parser.error(f"--cores {given.cores}: two ranks need two of the CPUs of this process, {available}")
    return given


def main() -> None:
    """Measure, predict and compare, or print saved results."""
    given = arguments()
    path = given.out / "scaling.json"
    if given.table:
        sys.stdout.write(markdown(json.loads(path.read_text())))
        return
    with tempfile.TemporaryDirectory(prefix="scaling_", ignore_cleanup_errors=True) as scratch:
        common = Job(seed=given.seed, core=given.cores[-1], scratch=scratch)
        where = machine(common) | {"pinned_to_core": given.cores}
        messages = _run("messages", common, given.cores)
        runs = {}
        for name in given.only:
            try:
                runs[name] = _measure(name, common, given.cores)
            except AbsentError as error:
                progress(f"{name}: left out, {error}")
    spans = [answer["notes"]["spans"] for answer in messages]
    found = results(runs, spans, messages[0]["figures"]["hop_us"] / 1e6, where, given.seed)
    given.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    draw(given.out / "scaling.png", found)
    sys.stdout.write("\n".join([messages_table(found), check_table(found), markdown(found)]))


def _measure(name: str, common: Job, cores: list[int]) -> Measured:
    """Measure one rank in both ways, and two ranks."""
    job = replace(common, work=name)
    return Measured(
        single=_run("single", job, cores[-1:])[0],
        answered=_run("answered", job, cores[-1:], world=2)[0],
        together=_run("together", job, cores),
    )


def _run(entry: str, job: Job, cores: list[int], world: int | None = None) -> list[dict[str, Any]]:
    """Run a process on each core, as ranks of one world unless there are fewer; returns their results.

    Raises:
        AbsentError: if a required package is not installed.
        SystemExit: if a process failed.
    """
    world = world or len(cores)
    jobs = [replace(job, core=core, scratch=tempfile.mkdtemp(dir=job.scratch)) for core in cores]
    port = _free_port()
    places = [place(rank, world, port) for rank in range(len(cores))] if world > 1 else None
    found = answers(f"benchmarks.scaling.processes:{entry}", jobs, TIMEOUT_S, places)
    for answer in found:
        if "absent" in answer:
            raise AbsentError(answer["absent"])
        if "failed" in answer:
            sys.exit("\n".join([f"{entry} {job.work}: {answer['failed']}", *answer["stderr"]]))
    shown = ", ".join(f"{key} {value:.4g}" for key, value in found[0]["figures"].items())
    progress(f"{job.work or 'two ranks'} {entry}: {shown}")
    return found


def place(rank: int, world: int, port: int) -> dict[str, str]:
    """Environment variables for Lightning and torch."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


if __name__ == "__main__":
    main()
