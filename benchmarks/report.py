"""Converts raw figures to Markdown tables and result files, with the machine and the versions."""

import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.launch import ROOT, Outcome
from benchmarks.plan import Measurement
from benchmarks.settings import Job

# a lower share of CPU time means that the process waited for other processes, files or services
BUSY = 0.9
PACKAGES = ("lightning_dqn", "torch", "lightning", "gymnasium", "ale-py", "numpy", "stable-baselines3", "jax", "jaxlib")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine(common: Job) -> dict[str, Any]:
    """Processor, cores and load of this machine, and the device and core that were used."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": name,
        "cpu_count": os.cpu_count(),
        "system": platform.platform(),
        "load_before": load,
        "device": common.device,
        "pinned_to_core": common.core,
    }


def commit() -> str:
    """The commit of the working tree, with `-dirty` if there are uncommitted changes."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        # keep `git describe` from refreshing the index
        environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def heading(where: dict[str, Any], rounds: int, seconds: float) -> str:
    """The text above the tables: machine, versions, commit, and an explanation."""
    with_versions = ", ".join(f"{name} {version}" for name, version in versions().items())
    core = f"pinned to core {where['pinned_to_core']}" if where["pinned_to_core"] >= 0 else "not pinned"
    return (
        f"{where['cpu']}, {core}, one thread, device {where['device']}; commit {commit()}.\n"
        f"{with_versions}.\n"
        f"{rounds} interleaved rounds, rates over {seconds:g} s after the warm-up. "
        "Ratios are a system's figure over the yardstick's: of the medians / median of the rounds' own.\n"
    )


def table(measurement: Measurement, outcomes: dict[str, Outcome]) -> str:
    """One measurement in Markdown."""
    columns = ["figure", "system", "min", "median", "max", *(f"x {name}" for name in measurement.yardsticks)]
    rows: list[str] = []
    for key, unit in measurement.figures.items():
        measured = {name: outcome.figures[key] for name, outcome in outcomes.items()}
        rows += [
            _row([unit, name, *_spread(values), *(_ratio(values, measured[of]) for of in measurement.yardsticks)])
            for name, values in measured.items()
            if any(value is not None for value in values)
        ]
    lines = [f"\n### {measurement.name}: {measurement.title}\n"]
    if rows:
        lines += [_row(columns), _row(["---"] * len(columns)), *rows]
    for name, outcome in outcomes.items():
        if outcome.absent:
            lines.append(f"\n{name}: left out, {outcome.absent}.")
        if outcome.failures:
            why = "; ".join(f"round {failure['round'] + 1}: {failure['why']}" for failure in outcome.failures)
            lines.append(f"\n{name}: failed, {why}. The last lines of its stderr are in the results.")
        shares = [note["cpu_share"] for note in outcome.notes if "cpu_share" in note]
        if shares and min(shares) < BUSY:
            lines.append(f"\n{name}: its processes had as little as {min(shares):.0%} of their core's time.")
    return "\n".join(lines) + "\n"


def save(folder: Path, measurement: Measurement, outcomes: dict[str, Outcome], where: dict[str, Any], job: Job) -> Path:
    """Write one measurement with all raw figures; inf is written as "never"."""
    results = {
        "measurement": measurement.name,
        "title": measurement.title,
        "units": measurement.figures,
        "command": shlex.join([Path(sys.executable).name, "-m", "benchmarks", *sys.argv[1:]]),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": where,
        "seconds": job.seconds,
        "systems": {
            name: {
                "absent": outcome.absent,
                "figures": {key: [_plain(value) for value in values] for key, values in outcome.figures.items()},
                "notes": outcome.notes,
                "failures": outcome.failures,
            }
            for name, outcome in outcomes.items()
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{measurement.name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def _spread(values: list[float | None]) -> tuple[str, str, str]:
    """Minimum, median and maximum of the values."""
    known = [value for value in values if value is not None]
    return _number(min(known)), _number(statistics.median(known)), _number(max(known))


def _ratio(values: list[float | None], yardstick: list[float | None]) -> str:
    """Ratio of the medians / median of the rounds' ratios; a dash if either was not reached."""
    pairs = [(a, b) for a, b in zip(values, yardstick, strict=False) if a is not None and b]
    if not pairs:
        return "-"
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    of_rounds = statistics.median(a / b if math.isfinite(a) and math.isfinite(b) else math.nan for a, b in pairs)
    ratios = (ours / theirs if math.isfinite(ours) and math.isfinite(theirs) else math.nan, of_rounds)
    return " / ".join("-" if math.isnan(ratio) else f"{ratio:.2f}" for ratio in ratios)


def _number(value: float) -> str:
    """A number with at least three digits, or never."""
    if math.isinf(value):
        return "never"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _plain(value: float | None) -> float | str | None:
    return "never" if value == math.inf else value


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
