"""Reads W&B's sweep file: the space, the score, who may go on, and the command lines that an agent would run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_dqn.sweep.space import Parameter, read_parameter

PROGRAM = ["-m", "lightning_dqn", "fit"]
ARGS = "${args}"
GOALS = ("maximize", "minimize")
METHODS = ("bayes", "random")


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """Which runs are stopped before their end.

    Args:
        min_iter: evaluations before a run may be stopped.
        eta: the best 1/eta go on.
    """

    min_iter: int
    eta: float


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """A search.

    Args:
        name: of the study.
        metric: what a trial's score is the best value of.
        goal: maximize or minimize.
        method: bayes or random.
        pruning: which trials are stopped before their end; None for none.
        before: words of `fit` that stand before the parameters.
        after: words of `fit` that stand behind them.
        parameters: in the order of their names, as W&B has them: so a class comes before its knobs.
    """

    name: str
    metric: str
    goal: Literal["maximize", "minimize"]
    method: str
    pruning: Pruning | None
    before: list[str]
    after: list[str]
    parameters: list[Parameter]

    def words(self, values: Mapping[str, Any], extra: list[str]) -> list[str]:
        """The words of `fit` of one trial.

        Args:
            values: of the parameters.
            extra: words of the user's, who can't change a parameter with them: they stand before those.
        """
        chosen = [f"--{parameter.name}={values[parameter.name]}" for parameter in self.parameters]
        return [*self.before, *extra, *chosen, *self.after]


def read_sweep_file(path: Path) -> SweepFile:
    """What a sweep file says.

    Args:
        path: of the YAML file.

    Raises:
        ValueError: if it is no sweep of `python -m lightning_dqn fit`, or asks for what is not known here.
        FileNotFoundError: if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; configs/sweep.yaml is a sweep file")
    try:
        said = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is no YAML ({error})") from error
    parameters = said.get("parameters") if isinstance(said, dict) else None
    if not isinstance(parameters, dict) or not parameters:
        raise ValueError(f"{path}: has no parameters; see configs/sweep.yaml for what a sweep file says")
    metric = _section(said, "metric", {"name", "goal"})
    name, goal = metric.get("name"), metric.get("goal", "minimize")
    if not name or goal not in GOALS:
        raise ValueError(f"metric={metric}: must have a name, as val/episode_return, and a goal, {' or '.join(GOALS)}")
    method = said.get("method")
    if method not in METHODS:
        raise ValueError(f"method={method}: must be {' or '.join(METHODS)}")
    before, after = _command(said.get("command"))
    return SweepFile(
        name=str(said.get("name") or path.stem),
        metric=name,
        goal=goal,
        method=method,
        pruning=_pruning(said),
        before=before,
        after=after,
        parameters=[read_parameter(key, parameters[key]) for key in sorted(parameters)],
    )


def _section(said: dict[str, Any], key: str, allowed: set[str]) -> dict[str, Any]:
    section = said.get(key) or {}
    if not isinstance(section, dict):
        raise ValueError(f"{key}={section}: must be a mapping with {', '.join(sorted(allowed))}")
    for name in section.keys() - allowed:
        raise ValueError(f"{key}.{name}={section[name]}: is not known here; leave it out")
    return section


def _pruning(said: dict[str, Any]) -> Pruning | None:
    if not said.get("early_terminate"):
        return None
    section = _section(said, "early_terminate", {"type", "min_iter", "eta"})
    if section.get("type") != "hyperband":
        raise ValueError(f"early_terminate.type={section.get('type')}: must be hyperband")
    min_iter, eta = section.get("min_iter"), section.get("eta", 3)
    if not isinstance(min_iter, int) or min_iter < 1:
        raise ValueError(f"early_terminate.min_iter={min_iter}: must be a number of evaluations, at least 1")
    if not isinstance(eta, (int, float)) or not eta > 1:
        raise ValueError(f"early_terminate.eta={eta}: must be above 1")
    return Pruning(min_iter=min_iter, eta=eta)


def _command(said: Any) -> tuple[list[str], list[str]]:
    """The words of `fit` before and behind the parameters."""
    words = [str(word) for word in said] if isinstance(said, list) else []
    starts = [i for i in range(len(words)) if words[i : i + len(PROGRAM)] == PROGRAM]
    if not starts:
        raise ValueError(f"command={said}: must be a list with the words {', '.join(PROGRAM)} in it, and {ARGS}")
    words = words[starts[0] + len(PROGRAM) :]
    for word in words:
        if "${" in word and word != ARGS:
            raise ValueError(f"command: {word} is not known here; write its value, or {ARGS} for the parameters")
    if words.count(ARGS) != 1:
        raise ValueError(f"command: must have {ARGS} once, where the parameters go, behind {' '.join(PROGRAM)}")
    place = words.index(ARGS)
    return words[:place], words[place + 1 :]
