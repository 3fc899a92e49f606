"""`python -m benchmarks`: runs the measurements, prints their tables, and writes benchmarks/results/<name>.json.

Every figure comes from a separate process, pinned to one core with one thread unless its title states otherwise; the
systems alternate. Run it from the repository after `pip install -e ".[bench]"`, on an idle machine. Libraries that are
not installed are skipped.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.launch import ROOT, measure
from benchmarks.plan import MEASUREMENTS
from benchmarks.report import heading, machine, save, table
from benchmarks.settings import Job


def arguments() -> argparse.Namespace:
    """The command line."""
    names = [measurement.name for measurement in MEASUREMENTS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="lightning_dqn beside its peers.")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=3, help="processes per system, with the round as seed (3)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="duration of a rate measurement after warm-up, in s (10)"
    )
    parser.add_argument("--core", type=int, help="CPU to use (the last one); -1 for all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device of the networks (cpu)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    given = parser.parse_args()
    if given.rounds < 1 or given.seconds <= 0:
        parser.error(f"--rounds {given.rounds} --seconds {given.seconds}: both must be positive")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [-1]
    if given.core is None:
        given.core = cores[-1]
    elif given.core not in (-1, *cores):
        parser.error(f"--core {given.core}: choose one of {cores}, or -1 for all of them")
    return given


def main() -> None:
    """Run the chosen measurements and print a table for each."""
    given = arguments()
    with tempfile.TemporaryDirectory(prefix="benchmarks_", ignore_cleanup_errors=True) as scratch:
        common = Job(seconds=given.seconds, device=given.device, core=given.core, scratch=scratch)
        where = machine(common)
        sys.stdout.write(heading(where, given.rounds, given.seconds))
        for measurement in MEASUREMENTS:
            if measurement.name not in given.only:
                continue
            outcomes = measure(measurement, common, given.rounds)
            save(given.out, measurement, outcomes, where, common)
            sys.stdout.write(table(measurement, outcomes))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
