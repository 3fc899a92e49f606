"""Converts Gymnasium spaces to plain values in a checkpoint, and back."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation
from numpy.typing import NDArray

from lightning_dqn.resume.arguments import public_path
from lightning_dqn.resume.content import check_dict, check_int, invalid

# largest number of elements or categories of a space
MAX_SIZE = 2**24
DTYPES = "bool|u?int(8|16|32|64)|float(16|32|64)"


def encode_space(space: gym.Space[Any]) -> dict[str, Any]:  # noqa: PLR0911  one for each kind
    """Convert a space to plain values: its kind and its constructor arguments.

    Raises:
        TypeError: if it is of another kind than Box, Discrete, MultiDiscrete, MultiBinary, Dict, Tuple and Text.
    """
    kind = type(space).__name__
    if isinstance(space, spaces.Box):
        bounds = {"low": _compact(space.low), "high": _compact(space.high)}
        return {"kind": kind, **bounds, "shape": list(space.shape), "dtype": str(space.dtype)}
    if isinstance(space, spaces.Discrete):
        return {"kind": kind, "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {"kind": kind, "nvec": np.asarray(space.nvec).tolist(), "start": np.asarray(space.start).tolist()}
    if isinstance(space, spaces.MultiBinary):
        return {"kind": kind, "n": space.n if isinstance(space.n, int) else list(space.shape)}
    if isinstance(space, spaces.Text):
        characters = "".join(sorted(space.character_set))
        return {"kind": kind, "max_length": space.max_length, "min_length": space.min_length, "charset": characters}
    if isinstance(space, spaces.Dict):
        return {"kind": kind, "spaces": {str(name): encode_space(part) for name, part in space.spaces.items()}}
    if isinstance(space, spaces.Tuple):
        return {"kind": kind, "spaces": [encode_space(part) for part in space.spaces]}
    raise TypeError(f"space {space}: has no plain form; use a Box, Discrete, MultiDiscrete, MultiBinary, Dict or Tuple")


def decode_space(value: Any, name: str, depth: int = 0) -> gym.Space[Any]:
    """Create a space from the result of `encode_space`.

    Args:
        value: plain values from a file.
        name: name of the value in the checkpoint.
        depth: number of Dict and Tuple spaces around it.

    Raises:
        CheckpointError: if the value does not describe a space.
    """
    kind = check_dict(value, name, ("kind",))["kind"]
    if depth > 8:
        invalid(name, "is nested too deeply")
    try:
        return _decode(kind, value, name, depth)
    except (KeyError, TypeError, ValueError, AssertionError, OverflowError) as error:
        invalid(name, f"describes no {kind if isinstance(kind, str) else 'space'} ({type(error).__name__}: {error})")


def _decode(  # noqa: PLR0911  one for each kind
    kind: str, value: Mapping[str, Any], name: str, depth: int
) -> gym.Space[Any]:
    if kind == "Box":
        shape, dtype = _shape(value["shape"], f"{name}.shape"), value["dtype"]
        if type(dtype) is not str or not re.fullmatch(DTYPES, dtype):
            invalid(f"{name}.dtype", f"is {dtype!r}")
        low, high = (_expand(value[bound], shape, np.dtype(dtype), f"{name}.{bound}") for bound in ("low", "high"))
        return spaces.Box(low, high, shape, np.dtype(dtype).type)
    if kind == "Discrete":
        return spaces.Discrete(
            check_int(value["n"], f"{name}.n", 1, MAX_SIZE), start=check_int(value["start"], f"{name}.start", -(2**62))
        )
    if kind == "MultiDiscrete":
        nvec, start = (np.asarray(value[part]) for part in ("nvec", "start"))
        if nvec.dtype != np.int64 or start.dtype != np.int64 or not 0 < nvec.sum() < MAX_SIZE:
            raise ValueError("nvec and start must be int64")
        return spaces.MultiDiscrete(nvec, start=start)
    if kind == "MultiBinary":
        n = value["n"]
        return spaces.MultiBinary(_shape(n, f"{name}.n") if isinstance(n, list) else _shape([n], f"{name}.n")[0])
    if kind == "Text":
        lengths = [check_int(value[part], f"{name}.{part}", 0, MAX_SIZE) for part in ("max_length", "min_length")]
        return spaces.Text(lengths[0], min_length=lengths[1], charset=str(value["charset"]))
    if kind == "Dict":
        parts = check_dict(value["spaces"], f"{name}.spaces")
        _check_total(parts.values(), name)
        # the order of the pairs is the order of flattening
        pairs = parts.items()
        return spaces.Dict([(key, decode_space(part, f"{name}.spaces.{key}", depth + 1)) for key, part in pairs])
    if kind == "Tuple":
        _check_total(value["spaces"], name)
        return spaces.Tuple(decode_space(part, f"{name}.spaces", depth + 1) for part in value["spaces"])
    raise ValueError(f"kind {kind!r} is unknown")


def _check_total(parts: Iterable[Any], name: str) -> None:
    """Check that the boxes of a Dict or Tuple are not too large together."""
    shapes = [part["shape"] for part in parts if type(part) is dict and part.get("kind") == "Box" and "shape" in part]
    if sum(math.prod(_shape(shape, f"{name}.shape")) for shape in shapes) > MAX_SIZE or len(shapes) > 10_000:
        invalid(name, "has boxes that are too large together")


def _shape(value: Any, name: str) -> tuple[int, ...]:
    if type(value) is not list or len(value) > 32:
        invalid(name, "is no shape")
    shape = tuple(check_int(size, name, 0, MAX_SIZE) for size in value)
    if math.prod(shape) > MAX_SIZE:
        invalid(name, f"is {shape}, which is too large")
    return shape


def _compact(bounds: NDArray[Any]) -> Any:
    """One number if all bounds are equal, as for images; else a flat list."""
    flat = bounds.ravel()
    return flat[0].item() if flat.size and (flat == flat[0]).all() else flat.tolist()


def _expand(value: Any, shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    numbers = value if isinstance(value, list) else [value]
    if not all(type(number) in (bool, int, float) and not math.isnan(number) for number in numbers):
        invalid(name, "is no bound of numbers")
    size = math.prod(shape)
    flat = np.full(size, numbers[0], dtype) if len(numbers) == 1 else np.array(numbers, dtype)
    return flat.reshape(shape)


def describe_env(env: gym.Env[Any, Any]) -> dict[str, Any]:
    """Describe an environment as plain values: its layers, outermost first, time limit and observation space."""
    layers = [env]
    while isinstance(layers[-1], gym.Wrapper):
        layers.append(layers[-1].env)
    innermost = next((layer for layer in layers if not isinstance(layer, FlattenObservation)), env)
    limit = env.spec.max_episode_steps if env.spec else None
    return {
        "env": {"layers": [public_path(type(layer)) for layer in layers], "max_episode_steps": limit},
        "env_observation_space": encode_space(innermost.observation_space),
    }
