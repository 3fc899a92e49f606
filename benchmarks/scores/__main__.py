"""`python -m benchmarks.scores`: scores of agents at the end of training, over several seeds.

Every run is `python -m lightning_dqn fit --config ...` with the arguments of a variant, then `test` of its `last.ckpt`
over 100 new greedy episodes; the best checkpoint is not used. Results go to benchmarks/results/scores.json and
scores.png, in addition to existing ones. After Ctrl-C the same command continues: finished runs in the work folder or
in the results are repeated only if their settings have changed. Another --out starts from scratch.
"""

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from benchmarks.launch import ROOT
from benchmarks.report import machine
from benchmarks.scores import report
from benchmarks.scores.picture import draw
from benchmarks.scores.plan import ENVIRONMENTS, VARIANTS, Run, runs_of
from benchmarks.scores.runs import FailedError, Result, Runner, command, finished
from benchmarks.settings import Job


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names, variants = [e.name for e in ENVIRONMENTS], [v.name for v in VARIANTS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scores", description="Scores at the end of training.")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="ENV", help=", ".join(names))
    parser.add_argument(
        "--variants", nargs="+", choices=variants, default=variants, metavar="NAME", help=", ".join(variants)
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds per variant, from 0 (5)")
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs, each pinned to a separate core (1)")
    parser.add_argument("--timeout", type=float, default=3600, help="time limit of a run in s (3600)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "scores", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=report.default_out(), help="folder of the results")
    parser.add_argument("--dry", action="store_true", help="print the commands only")
    given = parser.parse_args(words)
    cores = available_cores()
    if not 1 <= given.jobs <= len(cores):
        parser.error(f"--jobs {given.jobs}: this process may use {len(cores)} cores, {cores}")
    if given.seeds < 1:
        parser.error(f"--seeds {given.seeds}: must be at least 1")
    # `fit` runs in the root of the repository
    given.work = given.work.resolve()
    return given


def available_cores() -> list[int]:
    """CPUs that this process may use; -1 if processes can't be pinned."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [-1] * (os.cpu_count() or 1)


def main() -> None:
    """Run all unfinished runs, then report all results."""
    given = arguments()
    runs = runs_of(given.only, given.variants, given.seeds)
    if given.dry:
        sys.stdout.write("".join(f"{command(run)}\n" for run in runs))
        return
    signal.signal(signal.SIGTERM, _stop)
    results = {run: result for run in runs if (result := finished(given.work, run)) is not None}
    before = report.load(given.out / "scores.json")
    due = [run for run in runs if run not in results and not report.holds(before, run)]
    _say(f"{len(runs)} runs, {len(runs) - len(due)} of them finished before")
    failed, interrupted = [], False
    # the last cores are the least used by other processes
    runner = Runner(given.work, available_cores()[-given.jobs :], given.timeout)
    with contextlib.closing(runner.play(due)) as played:
        try:
            for count, (run, outcome) in enumerate(played, 1):
                if isinstance(outcome, FailedError):
                    failed.append((run, outcome))
                else:
                    results[run] = outcome
                _say(f"{count}/{len(due)} {_brief(run, outcome)}")
        except KeyboardInterrupt:
            interrupted = True
    if results:
        _report(given.out, results)
    for run, error in failed:
        _say(f"\n{run.folder} failed, {error}")
    sys.exit(130 if interrupted else 1 if failed else 0)


def _report(out: Path, results: dict[Run, Result]) -> None:
    """Merge, plot and print the results."""
    where = {name: value for name, value in machine(Job()).items() if name in ("cpu", "cpu_count", "system")}
    scores = report.merge(report.load(out / "scores.json"), results.items(), where)
    report.save(out / "scores.json", scores)
    draw(out / "scores.png", scores)
    sys.stdout.write(report.tables(scores))


def _brief(run: Run, outcome: Result | FailedError) -> str:
    if isinstance(outcome, FailedError):
        return f"{run.folder} failed"
    kept = report.entry(outcome)
    return f"{run.folder}: {kept['score']:.1f} +- {kept['std']:.1f}, {kept['wall_s']:.0f} s"


def _stop(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
