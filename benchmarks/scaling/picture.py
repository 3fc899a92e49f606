"""Plots the predictions over ranks: env steps/s above and the time of an update below, one panel per workload."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("tab:blue", "tab:red", "tab:green")


def draw(path: Path, found: dict[str, Any]) -> None:
    """Write the figure.

    Args:
        path: path of the PNG.
        found: content of scaling.json.
    """
    workloads = found["workloads"].values()
    figure = Figure(figsize=(4.4 * len(workloads) + 0.6, 6.8), layout="constrained")
    panels = figure.subplots(2, len(workloads), squeeze=False, sharex=True)
    lines: dict[str, Any] = {}
    for (above, below), workload in zip(panels.T, workloads, strict=True):
        lines |= _panels(above, below, workload)
        above.set_title(workload["title"])
        below.set_xlabel("ranks")
    panels[0, 0].set_ylabel("env steps a second, all ranks")
    panels[1, 0].set_ylabel("an update, ms: mean, and 99 of 100")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(path, dpi=110)


def _panels(above: Axes, below: Axes, workload: dict[str, Any]) -> dict[str, Any]:
    """Plot one workload; returns the lines by name."""
    lines: dict[str, Any] = {}
    for color, (network, predicted) in zip(COLORS, workload["predicted"].items(), strict=True):
        ranks = {int(world): row for world, row in predicted["ranks"].items()}
        worlds = list(ranks)
        rates, means, tails = (
            [row[name] for row in ranks.values()] for name in ("env_steps_per_s", "update_ms", "update_p99_ms")
        )
        [lines[network]] = above.plot(worlds, rates, color=color, marker=".")
        below.plot(worlds, means, color=color, marker=".")
        below.fill_between(worlds, means, tails, color=color, alpha=0.15, lw=0)
    ideal = [world * rates[0] for world in worlds]
    [lines["no loss"]] = above.plot(worlds, ideal, color="grey", ls=":")
    check = workload["check"]
    for panel, name in ((above, "env_steps_per_s"), (below, "update_ms")):
        [lines["two ranks, measured"]] = panel.plot(2, check[name]["measured"], "k+", ms=11, mew=1.6, zorder=5)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(worlds, [str(world) for world in worlds])
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return lines
