"""Mean, interquartile mean and bootstrap intervals of scores over training seeds (Agarwal et al. 2021).

Legend: R runs, T tasks. A run's score is its mean over evaluation episodes; runs are resampled, since the
episodes of one agent have no information about another training.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95

Scores = NDArray[np.float64]


def interquartile_mean(scores: Scores) -> Any:
    """Mean without the lowest and the highest quarter, along the last axis.

    A quarter is rounded down to whole scores, as scipy's `trim_mean` and so the paper's library does: of 5 the
    middle 3 remain.
    """
    count = scores.shape[-1]
    cut = count // 4
    return np.sort(scores, axis=-1)[..., cut : count - cut].mean(-1)


def stratified_interval(tasks: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap interval of the interquartile mean over all tasks' runs.

    Args:
        tasks: T lists of the scores of their R runs; R may differ. Runs are resampled within each task (strata).
        seed: seed of the resampling.
    """
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(np.asarray(scores, np.float64), (RESAMPLES, len(scores))) for scores in tasks]
    means = interquartile_mean(np.concatenate(drawn, axis=1))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def summary(tasks: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean and standard deviation (of the sample, R T - 1), IQM and its interval, over all runs of the tasks.

    Args:
        tasks: see `stratified_interval`; one for the figures of one environment.
    """
    scores = np.concatenate([np.asarray(task, np.float64) for task in tasks])
    return {
        "mean": float(scores.mean()),
        "std": float(scores.std(ddof=1)) if len(scores) > 1 else 0.0,
        "iqm": float(interquartile_mean(scores)),
        "iqm_interval": list(stratified_interval(tasks)),
    }


def normalized(score: float, random: float, published: float) -> float:
    """Linear normalization: 0 for random actions, 1 for the published score."""
    return (score - random) / (published - random)
