"""`python -m benchmarks.curves OUT.png RUN ...`: plots training returns of runs over env steps, from metrics.csv."""

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure

PANEL = (5.6, 3.6)


def read_returns(run: Path) -> tuple[list[float], list[float]]:
    """Env steps, and the mean return of the last 100 training episodes at each.

    Args:
        run: folder of a run with a CSVLogger.
    """
    [path] = run.glob("**/metrics.csv")
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/episode_return"]]
    return [float(row["env_steps"]) for row in rows], [float(row["train/episode_return"]) for row in rows]


def main() -> None:
    """Draw a panel per run, named after its environment, the parent folder of the run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description="Draws training returns of runs.")
    parser.add_argument("out", type=Path, help="PNG file to write")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, runs/<environment>/<time>")
    given = parser.parse_args()
    figure = Figure(figsize=(PANEL[0] * len(given.runs), PANEL[1]), layout="constrained")
    panels = figure.subplots(1, len(given.runs), squeeze=False).ravel()
    for panel, run in zip(panels, given.runs, strict=True):
        panel.plot(*read_returns(run), lw=1.5)
        panel.set_title(run.resolve().parent.name)
        panel.set_xlabel("env steps")
        panel.set_ylabel("training return, mean of 100")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(given.out, dpi=100)


if __name__ == "__main__":
    main()
