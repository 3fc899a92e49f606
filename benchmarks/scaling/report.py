"""Converts traces to results: predictions for all numbers of ranks, and the comparison for two."""

import shlex
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import commit, versions
from benchmarks.scaling.model import NETWORKS, Cost, Gloo, Prediction, drawing, fit, halved_at, simulate
from benchmarks.scaling.trace import COLLECTIVES, Trace
from benchmarks.scaling.workloads import WORKLOADS

WORLDS = (2, 4, 8, 16, 32, 64)
ASSUMPTIONS = (
    "every rank has a core of its own, as fast as the one measured, and shares neither memory bandwidth nor caches",
    "ranks are late independently of each other: each computes as in an iteration drawn from those measured",
    "all ranks leave a call at once, when the last has come and the messages have passed",
    "an iteration's calls are those counted: no evaluation, checkpoint or end of an epoch",
    "a hop costs the same whatever the number of ranks; links don't disturb each other",
    "how late a call comes back is as between two ranks",
)


@dataclass(frozen=True)
class Measured:
    """The results of the processes of one run.

    Attributes:
        single: a single rank.
        answered: one of two ranks, whose calls returned at once.
        together: both of two ranks.
    """

    single: dict[str, Any]
    answered: dict[str, Any]
    together: list[dict[str, Any]]


def results(
    runs: dict[str, Measured], spans: list[dict[str, Any]], hop_s: float, where: dict[str, Any], seed: int
) -> dict[str, Any]:
    """The content of scaling.json.

    Args:
        runs: runs by workload.
        spans: entry and return times of calls of two ranks, by kind and bytes.
        hop_s: one-way time of a small message in s.
        where: machine and cores.
        seed: seed of the simulation.
    """
    gloo = Gloo(hop_s, {kind: fit(kind, hop_s, _seconds(spans, kind)) for kind in COLLECTIVES})
    return {
        "measurement": "scaling",
        "command": shlex.join([Path(sys.executable).name, "-m", "benchmarks.scaling", *sys.argv[1:]]),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": where,
        "assumptions": ASSUMPTIONS,
        "networks": [{**asdict(network), "bytes_per_s": _finite(network.bytes_per_s)} for network in NETWORKS],
        "hop_us": hop_s * 1e6,
        "messages": {kind: _describe_cost(cost, _seconds(spans, kind)) for kind, cost in gloo.costs.items()},
        "workloads": {name: _workload(name, measured, gloo, seed) for name, measured in runs.items()},
    }


def _seconds(spans: list[dict[str, Any]], kind: str) -> dict[int, Any]:
    """Seconds from the last entry to the last return of a call, by bytes."""
    found = {}
    for size in spans[0][kind]:
        both = np.array([of_rank[kind][size] for of_rank in spans])
        found[int(size)] = both[..., 1].max(0) - both[..., 0].max(0)
    return found


def _describe_cost(cost: Cost, measured: dict[int, Any]) -> dict[str, Any]:
    quantiles = {size: np.quantile(seconds, (0.5, 0.9)) * 1e6 for size, seconds in measured.items()}
    return {
        "fixed_us": cost.fixed_s * 1e6,
        "mb_per_s": 1e-6 / cost.byte_s if cost.byte_s else None,
        "measured_us": {size: {"median": median, "p90": p90} for size, (median, p90) in quantiles.items()},
    }


def _workload(name: str, measured: Measured, gloo: Gloo, seed: int) -> dict[str, Any]:
    """One run: the work of a rank, the predictions, and the two ranks."""
    single = Trace.from_json(measured.single["notes"]["trace"])
    trace = Trace.from_json(measured.answered["notes"]["trace"])
    work = Work(measured.single["figures"]["env_steps"], trace.updates)
    rng = np.random.default_rng(seed)
    alone = simulate(single, 1, lambda kind, size: np.zeros(1), rng)
    predicted: dict[str, Any] = {}
    for network in NETWORKS:
        all_worlds = {1: alone} | {
            world: simulate(trace, world, drawing(world, network, gloo, rng), rng) for world in WORLDS
        }
        rows = {world: work.figures(found, world, alone.iteration_s) for world, found in all_worlds.items()}
        efficiencies = {world: row["efficiency"] for world, row in rows.items()}
        predicted[network.name] = {"ranks": rows, "halved_at": halved_at(efficiencies)}
    pair = work.figures(_as_measured(measured.together), 2, alone.iteration_s)
    counted = {event: trace.events.count(event) for event in trace.events if event[0] in COLLECTIVES}
    return {
        "title": WORKLOADS[name].title,
        "env_steps_per_iteration": work.env_steps,
        "updates_per_iteration": work.updates,
        "messages_per_iteration": [{"call": k, "bytes": b, "count": count} for (k, b), count in counted.items()],
        "core_shares": [answer["notes"]["cpu_share"] for answer in (measured.single, measured.answered)],
        "predicted": predicted,
        "check": _check(predicted[NETWORKS[0].name]["ranks"][2], pair),
    }


@dataclass(frozen=True)
class Work:
    """The work of an iteration.

    Attributes:
        env_steps: env steps of a rank.
        updates: updates, the same on all ranks.
    """

    env_steps: float
    updates: int

    def figures(self, found: Prediction, world: int, alone_s: float) -> dict[str, float]:
        """Rates and times of `world` ranks, in the units of the tables.

        Args:
            found: times in s.
            world: ranks, W.
            alone_s: time of an iteration of a single rank in s.
        """
        return {
            "env_steps_per_s": world * self.env_steps / found.iteration_s,
            "updates_per_s": self.updates / found.iteration_s,
            "efficiency": alone_s / found.iteration_s,
            "update_ms": found.latency_s * 1e3,
            "update_p99_ms": found.latency_p99_s * 1e3,
            "iteration_ms": found.iteration_s * 1e3,
            "compute_ms": found.compute_s * 1e3,
            "messages_ms": found.message_s * 1e3,
            "waiting_ms": found.waiting_s * 1e3,
        }


def _as_measured(answers: list[dict[str, Any]]) -> Prediction:
    """The measured ranks, as a prediction of the model would describe them."""
    traces = [Trace.from_json(answer["notes"]["trace"]) for answer in answers]
    calls = [i for i, (name, _) in enumerate(traces[0].events) if name in COLLECTIVES]
    came, left = (np.max([getattr(trace, at)[:, calls] for trace in traces], 0) for at in ("entered", "left"))
    latencies = np.concatenate([trace.latencies() for trace in traces])
    return Prediction(
        iteration_s=float(np.mean([trace.iteration_s for trace in traces])),
        compute_s=float(np.mean([trace.gaps.sum(1) for trace in traces])),
        message_s=float((left - came).sum(1).mean()),
        latency_s=float(latencies.mean()),
        latency_p99_s=float(np.quantile(latencies, 0.99)),
    )


def _check(predicted: dict[str, float], measured: dict[str, float]) -> dict[str, dict[str, float]]:
    """Measurement, prediction and its error."""
    return {
        name: {"predicted": value, "measured": measured[name], "error": value / measured[name] - 1}
        for name, value in predicted.items()
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
