"""What a sweep file says of one parameter, in W&B's words, and how Optuna is asked for a value of it."""

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import optuna

# what each distribution of W&B's needs
KEYS = {
    "constant": ("value",),
    "categorical": ("values",),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "q_uniform": ("min", "max"),
    "log_uniform": ("min", "max"),
    "q_log_uniform": ("min", "max"),
    "log_uniform_values": ("min", "max"),
    "q_log_uniform_values": ("min", "max"),
}
# of a quotient that is a whole number but for rounding
TINY = 1e-9


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a search.

    Args:
        name: an option of `fit` without its hyphens, `model.optimizer.lr`.
        distribution: a key of KEYS.
        choices: what a categorical parameter may be, or the one value of a constant.
        low: the least value; of a distribution without bounds 0.
        high: the greatest value; of a distribution without bounds 0.
        q: what all values are multiples of; None where they are not.
    """

    name: str
    distribution: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    q: float | None = None

    @property
    def example(self) -> Any:
        """A value that it may have."""
        return self.choices[0] if self.choices else self.low

    def ask(self, trial: optuna.Trial) -> Any:
        """A value, chosen by the sampler of the trial's study."""
        if self.distribution == "constant":
            return self.choices[0]
        if self.distribution == "categorical":
            # as text: Optuna's storages take no lists, and a command line is text anyway
            return trial.suggest_categorical(self.name, [str(choice) for choice in self.choices])
        if self.distribution == "int_uniform":
            return trial.suggest_int(self.name, int(self.low), int(self.high))
        log = "log" in self.distribution
        # of logarithms Optuna knows no steps
        value = trial.suggest_float(self.name, self.low, self.high, log=log, step=None if log else self.q)
        return value if self.q is None else _multiple(round(value / self.q), self.q)


def read_parameter(name: str, said: Any) -> Parameter:
    """What a sweep file says of a parameter.

    Args:
        name: of the parameter.
        said: the mapping under it.

    Raises:
        ValueError: if that is none of the distributions which are known here, or its bounds are no bounds.
    """
    where = f"parameters.{name}"
    if not isinstance(said, dict) or "parameters" in said:
        raise ValueError(
            f"{where}={said}: must be a mapping with values, value or min and max; write nested names dotted"
        )
    distribution = said.get("distribution") or _implied(said)
    if distribution not in KEYS:
        known = ", ".join(KEYS)
        raise ValueError(f"{where}.distribution={distribution}: Optuna has nothing like it; use one of {known}")
    needed = KEYS[distribution]
    allowed = {"distribution", *needed, *(("q",) if distribution.startswith("q_") else ())}
    for key in said.keys() - allowed:
        raise ValueError(f"{where}.{key}={said[key]}: means nothing to {distribution}; leave it out")
    for key in needed:
        if key not in said:
            raise ValueError(f"{where}.{key}: is missing, which {distribution} needs")
    if distribution in ("constant", "categorical"):
        return Parameter(name=name, distribution=distribution, choices=_choices(where, said))
    for key in ("min", "max", "q"):
        _check_number(f"{where}.{key}", said.get(key, 1), whole=distribution == "int_uniform")
    low, high, q = _bounds(where, distribution, said)
    return Parameter(name=name, distribution=distribution, low=low, high=high, q=q)


def _implied(said: dict[str, Any]) -> str:
    """The distribution that W&B takes where none is named."""
    if "value" in said:
        return "constant"
    if "values" in said:
        return "categorical_w_probabilities" if "probabilities" in said else "categorical"
    whole = all(isinstance(said.get(key), int) for key in ("min", "max"))
    return "int_uniform" if whole else "uniform"


def _choices(where: str, said: dict[str, Any]) -> tuple[Any, ...]:
    choices = [said["value"]] if "value" in said else said["values"]
    if not isinstance(choices, list) or not choices:
        raise ValueError(f"{where}.values={choices}: must be a list of one value or more")
    if None in choices:
        # W&B's agent makes its text by str()
        raise ValueError(f'{where}: null would be the word "None" on the command line; write "null", with the quotes')
    return tuple(choices)


def _check_number(where: str, value: Any, *, whole: bool) -> None:
    if isinstance(value, str):
        hint = "; to YAML 1e-4 is text, 1.0e-4 a number" if "e" in value.lower() else ""
        raise ValueError(f"{where}={value}: must be a number{hint}")
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where}={value}: must be {'an integer' if whole else 'a number'}")


def _bounds(where: str, distribution: str, said: dict[str, Any]) -> tuple[float, float, float | None]:
    """The least and the greatest value, and what all are multiples of."""
    low, high = said["min"], said["max"]
    if distribution.endswith("log_uniform"):
        # W&B means exponents of e here
        low, high = math.exp(low), math.exp(high)
    if low > high:
        raise ValueError(f"{where}.min={said['min']}: must not be above max={said['max']}")
    if "log" in distribution and low <= 0:
        raise ValueError(f"{where}.min={low}: must be positive, since its logarithm is taken")
    if not distribution.startswith("q_"):
        return low, high, None
    q = said.get("q", 1)
    if q <= 0:
        raise ValueError(f"{where}.q={q}: must be positive")
    # W&B rounds to multiples of q, where that leads out of the bounds too; here it does not
    first, last = math.ceil(low / q - TINY), math.floor(high / q + TINY)
    first = max(first, 1) if "log" in distribution else first
    if first > last:
        raise ValueError(f"{where}.q={q}: no multiple of it lies between {low} and {high}; choose a smaller one")
    return _multiple(first, q), _multiple(last, q), q


def _multiple(count: int, q: float) -> float:
    """Count times q: 3 times 0.1 is 0.3 here."""
    return count * q if isinstance(q, int) else float(count * Decimal(str(q)))
