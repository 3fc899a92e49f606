"""Makes environments: single ones for evaluation, vector environments for training."""

import contextlib
import copy
import difflib
import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import (
    FlattenObservation,
    FrameStackObservation,
    NormalizeObservation,
    NormalizeReward,
    TransformReward,
)

from lightning_dqn.envs.arguments import check_secrets, hide_values, resolve
from lightning_dqn.envs.atari import AtariConfig, make_atari_vec, make_game
from lightning_dqn.envs.episode_log import EpisodeLog
from lightning_dqn.envs.single import SingleVectorEnv

Vectorization = Literal["auto", "sync", "async", "vector_entry_point"]
EnvWrapper = Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]]
# namespace of the ids of Atari games
ATARI = "ALE"
# a seeded reset reloads the game, which takes as long as 170 steps: 3% of this interval
ATARI_RESEED_AFTER = 5_000
# the extra of this package that installs the games of a namespace
EXTRAS = {ATARI: "atari", "MinAtar": "minatar"}
# wrappers whose running statistics differ between training and evaluation, and the option that replaces them
REPLACED_WRAPPERS: dict[type[gym.Env[Any, Any]], str] = {
    NormalizeObservation: "DQN(normalize_observations=True)",
    NormalizeReward: "DQN(reward_scale=...)",
}


@dataclass(frozen=True)
class EnvSettings:
    """Settings from which a run makes all its environments.

    Attributes:
        env_id: registered id, also as `module:Env-v0`.
        env_kwargs: arguments of the environment, of any type; those of `AtariConfig` for Atari games. `{"from_env":
            NAME}`, at any depth, is replaced by the value of an environment variable.
        wrappers: wrappers, innermost first.
        frame_stack: observations stacked along a new first axis, oldest first; 1 for no stacking.

    Raises:
        ValueError: if a secret is given by value.
    """

    env_id: str
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    wrappers: Sequence[EnvWrapper] = ()
    frame_stack: int = 1

    def __post_init__(self) -> None:
        check_secrets(self.env_kwargs)

    @property
    def is_atari(self) -> bool:
        """Whether it is a game of the Arcade Learning Environment."""
        return self.env_id.rpartition(":")[2].startswith(f"{ATARI}/")


def find_spec(env_id: str) -> EnvSpec:
    """The registered specification of an environment.

    Args:
        env_id: a registered id, or `module:Env-v0` to import a module that registers it.

    Raises:
        ValueError: if there is no such environment or module.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"env_id={env_id}: there is no module {error.name!r}; install it or correct the name"
            ) from error
    _register_games(name)
    try:
        return gym.spec(name)
    except gym.error.Error as error:
        near = difflib.get_close_matches(name, gym.registry, n=3, cutoff=0.5)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else "use module:Env-v0 to import a module that registers it"
        )
        raise ValueError(f"env_id={env_id}: no such environment is registered; {hint}") from error


def _register_games(env_id: str) -> None:
    """Register the games of ale_py or minatar if the id is in their namespace.

    Raises:
        ValueError: if the package is not installed.
    """
    namespace = env_id.partition("/")[0]
    try:
        if namespace == ATARI:
            # the import registers the games
            importlib.import_module("ale_py")
        if namespace == "MinAtar" and "MinAtar/Breakout-v1" not in gym.registry:
            importlib.import_module("minatar.gym").register_envs()
    except ModuleNotFoundError as error:
        raise ValueError(
            f'env_id={env_id}: needs {error.name}: pip install "lightning_dqn[{EXTRAS[namespace]}]"'
        ) from error


def make_env(settings: EnvSettings, render_mode: str | None = None) -> gym.Env[Any, Any]:
    """One environment for evaluation, with unclipped rewards and whole episodes.

    Args:
        settings: settings of the environment.
        render_mode: as in `gymnasium.make`.

    Raises:
        ValueError: if the environment can't be made with these arguments.
    """
    find_spec(settings.env_id)
    with _resolved_arguments(settings) as kwargs:
        if settings.is_atari:
            env = make_game(settings.env_id, AtariConfig(**kwargs), render_mode)
        else:
            # not all environments take a render_mode
            rendering: dict[str, Any] = {"render_mode": render_mode} if render_mode else {}
            env = gym.make(settings.env_id, **kwargs, **rendering)
    return _apply_wrappers(env, settings)


def make_vector_env(
    settings: EnvSettings, num_envs: int, vectorization: Vectorization = "auto"
) -> VectorEnv[Any, Any, Any]:
    """A vector environment for training, with Gymnasium's NEXT_STEP autoreset.

    Args:
        settings: settings of each environment.
        num_envs: number of environments, N.
        vectorization: how they are stepped. `auto` uses the environment's own vector form for Atari games and, if there
            is one, for several environments without arguments, wrappers and frame stack; a `SingleVectorEnv` for one
            environment; and else a SyncVectorEnv.

    Raises:
        ValueError: if there is no such vector form, or its autoreset mode is another one.
    """
    spec = find_spec(settings.env_id)
    if vectorization == "auto":
        bare = not (settings.env_kwargs or settings.wrappers or settings.frame_stack > 1)
        native = spec.vector_entry_point is not None and num_envs > 1 and bare
        if num_envs == 1 and not settings.is_atari:
            return SingleVectorEnv(make_training_env(settings))
        vectorization = "vector_entry_point" if native or settings.is_atari else "sync"
    if vectorization == "vector_entry_point":
        envs = _make_native(settings, spec, num_envs)
    else:
        make: type[VectorEnv[Any, Any, Any]] = SyncVectorEnv if vectorization == "sync" else AsyncVectorEnv
        with _ignore_sigint_in_workers():
            envs = make([partial(make_training_env, settings)] * num_envs)  # type: ignore[call-arg]
        _detach_process_groups(envs)
        envs.spec = copy.deepcopy(spec)
        envs.spec.kwargs = dict(settings.env_kwargs)
    mode = envs.metadata.get("autoreset_mode")
    if mode != AutoresetMode.NEXT_STEP:
        envs.close()
        raise ValueError(
            f"vectorization={vectorization}: {settings.env_id} has autoreset mode {mode}; only NEXT_STEP is supported, "
            "use vectorization=sync"
        )
    return envs


def make_training_env(settings: EnvSettings) -> gym.Env[Any, Any]:
    """One environment for training, with an `EpisodeLog`; rewards of Atari games are clipped if chosen."""
    env = make_env(settings)
    if not settings.is_atari:
        return EpisodeLog(env)
    protocol = AtariConfig(**resolve(settings.env_kwargs)[0])
    if protocol.episodic_life:
        env.close()
        raise ValueError(
            "env_kwargs.episodic_life=True: only the native vector form supports it; use vectorization=auto"
        )
    if protocol.reward_clipping:
        env = TransformReward(env, _clip_reward)
    return EpisodeLog(env, reseed_after=ATARI_RESEED_AFTER)


def _clip_reward(reward: Any) -> float:
    return float(np.clip(reward, -1.0, 1.0))


def _make_native(settings: EnvSettings, spec: EnvSpec, num_envs: int) -> VectorEnv[Any, Any, Any]:
    """The environment's own vector form.

    Raises:
        ValueError: if it has none, or does not support wrappers or the frame stack.
    """
    if spec.vector_entry_point is None:
        raise ValueError(f"vectorization=vector_entry_point: {settings.env_id} has no vector form; use sync")
    if settings.wrappers or (settings.frame_stack > 1 and not settings.is_atari):
        raise ValueError(
            "vectorization=vector_entry_point: wrappers and frame_stack are for single environments; use sync or async"
        )
    with _resolved_arguments(settings) as kwargs:
        if settings.is_atari:
            return make_atari_vec(settings.env_id, num_envs, AtariConfig(**kwargs), settings.frame_stack)
        return gym.make_vec(settings.env_id, num_envs, "vector_entry_point", **kwargs)


@contextmanager
def _resolved_arguments(settings: EnvSettings) -> Iterator[dict[str, Any]]:
    """Context manager around the construction of an environment: gives the arguments with references resolved.

    With references, errors are replaced by ones without their values, since tracebacks may be written to log files.

    Raises:
        ValueError: if a variable is not set, or the environment does not accept the arguments.
        RuntimeError: instead of any other error, if there are references.
    """
    kwargs, values = resolve(settings.env_kwargs)
    try:
        yield kwargs
    except Exception as error:
        text = hide_values(str(error), values)
        if isinstance(error, (TypeError, gym.error.Error)):
            text = text.replace(f"{AtariConfig.__name__}.__init__()", "an Atari game")
            text = f"env_id={settings.env_id}, env_kwargs={settings.env_kwargs}: {text}"
            raise ValueError(text) from (None if values else error)
        if values:
            raise RuntimeError(f"{type(error).__name__}: {text}") from None
        raise


def _apply_wrappers(env: gym.Env[Any, Any], settings: EnvSettings) -> gym.Env[Any, Any]:
    """Apply the wrappers; flatten Dict, Tuple and MultiBinary observations; stack frames."""
    for wrap in settings.wrappers:
        env = wrap(env)
    _check_wrappers(env, settings.env_id)
    space = env.observation_space
    if isinstance(space, (spaces.Dict, spaces.Tuple, spaces.MultiBinary)) and space.is_np_flattenable:
        env = FlattenObservation(env)
    if settings.frame_stack > 1 or settings.is_atari:
        # zero frames before the first, as in a replay memory that stores each frame once
        env = FrameStackObservation(env, settings.frame_stack, padding_type="zero")
    return env


def _check_wrappers(env: gym.Env[Any, Any], env_id: str) -> None:
    """Reject wrappers that an option of the agent replaces, also those of the registration.

    Raises:
        ValueError: if there is one; the environment is closed.
    """
    layer = env
    while isinstance(layer, gym.Wrapper):
        for wrapper, option in REPLACED_WRAPPERS.items():
            if isinstance(layer, wrapper):
                env.close()
                raise ValueError(
                    f"wrappers: {env_id} is wrapped in {type(layer).__name__}, whose running statistics are not saved "
                    f"and not shared with evaluation; remove it and use {option}"
                )
        layer = layer.env


@contextmanager
def _ignore_sigint_in_workers() -> Iterator[None]:
    """Context manager: processes started in it ignore Ctrl-C, so that the current iteration can finish."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _detach_process_groups(envs: VectorEnv[Any, Any, Any]) -> None:
    """Give worker processes their own groups: signals to the group of the run, as by torchrun, do not reach them."""
    for process in getattr(envs, "processes", ()):
        # not permitted after the child has called exec; Windows has no process groups
        with contextlib.suppress(OSError, AttributeError):
            os.setpgid(process.pid, process.pid)


def async_step_pair(envs: VectorEnv[Any, Any, Any]) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """The functions that send actions and that wait for the result: (send, recv) or (step_async, step_wait).

    Raises:
        ValueError: if the environments have no asynchronous step.
    """
    for dispatch, collect in (("send", "recv"), ("step_async", "step_wait")):
        if hasattr(envs, dispatch) and hasattr(envs, collect):
            return getattr(envs, dispatch), getattr(envs, collect)
    raise ValueError(f"overlap=True: {type(envs).__name__} has no asynchronous step; use vectorization=async or Atari")
