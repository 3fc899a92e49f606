"""Converts the results of runs to scores.json and Markdown tables."""

import json
import re
import statistics
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.launch import ROOT
from benchmarks.report import versions
from benchmarks.scores.plan import ENVIRONMENTS, VARIANTS, Environment, Run
from benchmarks.scores.runs import EPISODES, Result, key, write
from benchmarks.scores.statistics import normalized, summary

PROTOCOL = (
    f"greedy, {EPISODES} fresh episodes, final weights; std: over seeds (n - 1), or over the episodes of one; IQM over "
    "seeds with the 95% interval of a bootstrap over seeds, within each environment"
)
Scores = dict[str, Any]


def entry(result: Result) -> dict[str, Any]:
    """The entry of one run in scores.json."""
    returns = result["returns"]
    return {
        "score": round(statistics.fmean(returns), 3),
        "std": round(statistics.pstdev(returns), 3),
        "min": round(min(returns), 3),
        "env_steps": result["env_steps"],
        "wall_s": round(result["wall_s"], 1),
        "cpu_s": round(result["cpu_s"], 1),
        "load": round(result["load"], 2),
        "commit": result["commit"],
        "command": result["command"],
        "curve": [[env_steps, round(value, 2)] for env_steps, value in result["curve"]],
    }


def holds(scores: Scores, run: Run) -> bool:
    """Whether the results contain a run with these settings, from any machine."""
    variants = scores.get("environments", {}).get(run.environment.name, {}).get("variants", {})
    variant = variants.get(run.variant.name, {"key": None, "seeds": {}})
    return variant["key"] == key(run) and str(run.seed) in variant["seeds"]


def merge(scores: Scores, results: Iterable[tuple[Run, Result]], where: dict[str, Any]) -> Scores:
    """Add results to existing ones; existing seeds with other settings are removed.

    Args:
        scores: content of scores.json, or an empty dictionary; changed in place.
        results: results of runs, in any order.
        where: description of the machine.
    """
    scores.setdefault("environments", {})
    for run, result in results:
        place = scores["environments"].setdefault(run.environment.name, {"variants": {}})
        place |= {"env_id": run.environment.env_id, "published": run.environment.published}
        variant = place["variants"].setdefault(run.variant.name, {"key": "", "seeds": {}})
        if variant["key"] != result["key"]:
            variant |= {"key": result["key"], "seeds": {}}
        variant["seeds"][str(run.seed)] = entry(result)
        variant["seeds"] = dict(sorted(variant["seeds"].items(), key=lambda item: int(item[0])))
    for place in scores["environments"].values():
        for variant in place["variants"].values():
            variant.update(rounded(summary([_scores_of(variant)])))
    scores |= {"protocol": PROTOCOL, "versions": versions(), "machine": where, "over_environments": _overall(scores)}
    scores["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    return scores


def _scores_of(variant: dict[str, Any]) -> list[float]:
    return [seed["score"] for seed in variant["seeds"].values()]


def _overall(scores: Scores) -> dict[str, Any]:
    """Scores over the environments common to all variants, with 0 for random actions and 1 for published DQN."""
    places = {e: scores["environments"].get(e.name, {}).get("variants", {}) for e in ENVIRONMENTS}
    overall = {}
    for variant in VARIANTS:
        tasks = [
            [normalized(score, e.random, e.published) for score in _scores_of(ways[variant.name])]
            for e, ways in places.items()
            if variant.name in ways
        ]
        if len(tasks) == len(ENVIRONMENTS):
            overall[variant.name] = rounded(summary(tasks), 3)
    return overall


def rounded(figures: dict[str, Any], digits: int = 2) -> dict[str, Any]:
    """The value with rounded numbers."""
    return {
        name: [round(each, digits) for each in value] if isinstance(value, list) else round(value, digits)
        for name, value in figures.items()
    }


def load(path: Path) -> Scores:
    """Read a file of scores; empty if it does not exist."""
    return json.loads(path.read_text()) if path.is_file() else {}


def save(path: Path, scores: Scores) -> None:
    """Write a file of scores, with one list of numbers per line."""
    text = json.dumps(scores, indent=1)
    # innermost lists first, then lists of them
    for pattern in (r"\[[^\[\]{}]*\]", r"\[(?:\s*\[[^\[\]{}]*\],?)+\s*\]"):
        text = re.sub(pattern, lambda found: re.sub(r"\s+", " ", found.group()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, text + "\n")


def tables(scores: Scores) -> str:
    """All scores in Markdown: a table per environment, and one over all environments."""
    parts = [scores["protocol"][0].upper() + scores["protocol"][1:] + ".\n"]
    for environment in ENVIRONMENTS:
        if environment.name in scores["environments"]:
            parts.append(_table(environment, scores["environments"][environment.name]["variants"]))
    if scores["over_environments"]:
        lines = [
            "### All environments, 0 = random actions, 1 = published DQN\n",
            "| | mean | IQM |",
            "| --- | --- | --- |",
        ]
        lines += [f"| {name} | {f['mean']:.2f} | {_iqm(f, 2)} |" for name, f in scores["over_environments"].items()]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _table(environment: Environment, variants: dict[str, Any]) -> str:
    lines = [
        f"### {environment.env_id}, {environment.env_steps:,} env steps (published DQN {environment.published:g})\n",
        "| | mean +- std | IQM | by seed, +- over its episodes | s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in [variant.name for variant in VARIANTS if variant.name in variants]:
        figures, seeds = variants[name], variants[name]["seeds"].values()
        by_seed = ", ".join(f"{seed['score']:.1f} +- {seed['std']:.1f}" for seed in seeds)
        seconds = statistics.median(seed["wall_s"] for seed in seeds)
        mean = f"{figures['mean']:.1f} +- {figures['std']:.1f}"
        lines.append(f"| {name} | {mean} | {_iqm(figures, 1)} | {by_seed} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def _iqm(figures: dict[str, Any], digits: int) -> str:
    low, high = figures["iqm_interval"]
    return f"{figures['iqm']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def default_out() -> Path:
    """Folder of the results."""
    return ROOT / "benchmarks" / "results"
