"""Plots learning curves: a panel per environment, a line per variant, and a band from its worst to its best seed."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.scores.plan import ENVIRONMENTS, VARIANTS, Environment

COLUMNS = 2
# evaluations of a few episodes are noisy; the mean with the neighbors is less so
SMOOTH = 3


def draw(path: Path, scores: dict[str, Any]) -> None:
    """Write the figure of all learning curves.

    Args:
        path: path of the PNG.
        scores: content of scores.json.
    """
    shown = [environment for environment in ENVIRONMENTS if environment.name in scores["environments"]]
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(6.4 * min(COLUMNS, len(shown)), 4.2 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, min(COLUMNS, len(shown)), squeeze=False).ravel()
    lines: dict[str, Any] = {}
    for panel, environment in zip(panels, shown, strict=False):
        lines |= _panel(panel, environment, scores["environments"][environment.name]["variants"])
    for empty in panels[len(shown) :]:
        empty.set_visible(False)
    names = [variant.name for variant in VARIANTS if variant.name in lines]
    figure.legend([lines[name] for name in names], names, loc="outside lower center", ncols=6, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _panel(panel: Axes, environment: Environment, variants: dict[str, Any]) -> dict[str, Any]:
    """Plot one environment; returns the lines by name."""
    lines = {}
    for number, variant in enumerate(VARIANTS):
        if variant.name not in variants:
            continue
        env_steps, values = curves(list(variants[variant.name]["seeds"].values()))
        plain = variant.name == "dqn"
        color = "black" if plain else mpl.colormaps["tab10"]((number - 1) % 10)
        mean = values.mean(0)
        panel.fill_between(env_steps, values.min(0), values.max(0), color=color, alpha=0.15 if plain else 0.05, lw=0)
        [lines[variant.name]] = panel.plot(
            env_steps, mean, color=color, lw=2.2 if plain else 1.3, zorder=3 if plain else 2
        )
    panel.axhline(environment.published, color="grey", ls=":", lw=1)
    panel.annotate("published DQN", (1, environment.published), (-2, 2), ("axes fraction", "data"), "offset points",
                   ha="right", va="bottom", fontsize=8, color="grey")  # fmt: skip
    panel.set_ylim(*environment.shown)
    panel.set_xlim(0, environment.env_steps)
    panel.set_title(environment.env_id)
    panel.set_xlabel("env steps")
    panel.set_ylabel("greedy episode return")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    return lines


def curves(seeds: list[dict[str, Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Env steps (E,) and returns (R, E) of R seeds at E evaluations, each the mean of itself and its neighbors."""
    length = min(len(seed["curve"]) for seed in seeds)
    points = np.array([seed["curve"][:length] for seed in seeds], np.float64)
    values = points[..., 1]
    reach = SMOOTH // 2
    windows = [values[:, max(0, i - reach) : i + reach + 1].mean(1) for i in range(length)]
    return points[..., 0].mean(0), np.stack(windows, 1)
