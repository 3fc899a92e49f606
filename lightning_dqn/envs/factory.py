"""Makes environments: single ones to evaluate in, vectors of them to learn from.

The start of the way of the data; nothing here knows of memories or networks.
"""

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
# the namespace of their ids
ATARI = "ALE"
# a seeded reset loads the game again, which takes as long as 170 steps: 3% of the time between two of them
ATARI_RESEED_AFTER = 5_000
# what installs the games of a namespace
EXTRAS = {ATARI: "atari", "MinAtar": "minatar"}
# wrappers whose running statistics differ between training and evaluation, and what does the same inside the agent
REPLACED_WRAPPERS: dict[type[gym.Env[Any, Any]], str] = {
    NormalizeObservation: "DQN(normalize_observations=True)",
    NormalizeReward: "DQN(reward_scale=...)",
}


@dataclass(frozen=True)
class EnvSettings:
    """Settings from which a run makes all its environments.

    Attributes:
        env_id: registered id, `module:Env-v0` included.
        env_kwargs: its arguments, of any type; of an Atari game, those of `AtariConfig`. `{"from_env": NAME}`, at any
            depth, stands for the value of an environment variable.
        wrappers: what is put around it, the innermost first.
        frame_stack: observations stacked along a new first axis, oldest first; 1 for no stacking.

    Raises:
        ValueError: if an argument is a secret that is given by value.
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
        ValueError: if no such environment, or no such module, is there.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"env_id={env_id}: there is no module {error.name!r}; install it or correct its name"
            ) from error
    _register_games(name)
    try:
        return gym.spec(name)
    except gym.error.Error as error:
        near = difflib.get_close_matches(name, gym.registry, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "a module that registers it is named as module:Env-v0"
        raise ValueError(f"env_id={env_id}: no such environment is registered; {hint}") from error


def _register_games(env_id: str) -> None:
    """Let packages of games that Gymnasium knows nothing of register theirs, when one is asked for.

    Raises:
        ValueError: if the package is not there.
    """
    namespace = env_id.partition("/")[0]
    try:
        if namespace == ATARI:
            # which registers them
            importlib.import_module("ale_py")
        if namespace == "MinAtar" and "MinAtar/Breakout-v1" not in gym.registry:
            importlib.import_module("minatar.gym").register_envs()
    except ModuleNotFoundError as error:
        raise ValueError(
            f'env_id={env_id}: needs {error.name}: pip install "lightning_dqn[{EXTRAS[namespace]}]"'
        ) from error


def make_env(settings: EnvSettings, render_mode: str | None = None) -> gym.Env[Any, Any]:
    """One environment, as it is evaluated: with true rewards and whole episodes.

    Args:
        settings: which one.
        render_mode: as in `gymnasium.make`.

    Raises:
        ValueError: if the environment can't be made with these arguments.
    """
    find_spec(settings.env_id)
    with _resolved_arguments(settings) as kwargs:
        if settings.is_atari:
            env = make_game(settings.env_id, AtariConfig(**kwargs), render_mode)
        else:
            # not every environment knows of rendering
            rendering: dict[str, Any] = {"render_mode": render_mode} if render_mode else {}
            env = gym.make(settings.env_id, **kwargs, **rendering)
    return _apply_wrappers(env, settings)


def make_vector_env(
    settings: EnvSettings, num_envs: int, vectorization: Vectorization = "auto"
) -> VectorEnv[Any, Any, Any]:
    """Environments to learn from, stepped in one call, with Gymnasium's NEXT_STEP autoreset.

    Args:
        settings: of each environment.
        num_envs: how many, N.
        vectorization: how they are stepped; `auto` takes the environment's own vector form for Atari games, and where
            it has one, there are several environments and nothing to hand on to each; elsewhere they are stepped one
            after the other, a single one without what several need.

    Raises:
        ValueError: if the environment has no such form, or resets itself in another way.
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
            f"{settings.env_id} resets itself by {mode} as {vectorization}; only NEXT_STEP is supported: "
            "use vectorization=sync"
        )
    return envs


def make_training_env(settings: EnvSettings) -> gym.Env[Any, Any]:
    """One environment to learn from, with the log of its episode; an Atari game's rewards are clipped there."""
    env = make_env(settings)
    if not settings.is_atari:
        return EpisodeLog(env)
    protocol = AtariConfig(**resolve(settings.env_kwargs)[0])
    if protocol.episodic_life:
        env.close()
        raise ValueError(
            "data.env_kwargs.episodic_life=true: only the native vector form continues after a lost life; use "
            "vectorization=auto"
        )
    if protocol.reward_clipping:
        env = TransformReward(env, _clip_reward)
    return EpisodeLog(env, reseed_after=ATARI_RESEED_AFTER)


def _clip_reward(reward: Any) -> float:
    return float(np.clip(reward, -1.0, 1.0))


def _make_native(settings: EnvSettings, spec: EnvSpec, num_envs: int) -> VectorEnv[Any, Any, Any]:
    """The environment's own vector form."""
    if spec.vector_entry_point is None:
        raise ValueError(f"vectorization=vector_entry_point: {settings.env_id} has no vector form of its own; use sync")
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
    """The arguments with references resolved, while an environment is made with them.

    Tracebacks reach log files, so where there are references an error is replaced by one that shows no values.

    Raises:
        ValueError: if a variable is not set, or the arguments don't fit the environment.
        RuntimeError: in place of another error, if there are references.
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
    """The wrappers that were asked for; nested observations, and bits, become one vector; frames are stacked."""
    for wrap in settings.wrappers:
        env = wrap(env)
    _check_wrappers(env, settings.env_id)
    space = env.observation_space
    if isinstance(space, (spaces.Dict, spaces.Tuple, spaces.MultiBinary)) and space.is_np_flattenable:
        env = FlattenObservation(env)
    if settings.frame_stack > 1 or settings.is_atari:
        # frames before an episode's first are black, as a memory that holds each frame once shows them
        env = FrameStackObservation(env, settings.frame_stack, padding_type="zero")
    return env


def _check_wrappers(env: gym.Env[Any, Any], env_id: str) -> None:
    """Reject wrappers that an option of the agent replaces.

    Args:
        env: with all its wrappers, those of its registration included.
        env_id: that it was made of.

    Raises:
        ValueError: naming the wrapper and the option; the environment is closed.
    """
    layer = env
    while isinstance(layer, gym.Wrapper):
        for wrapper, option in REPLACED_WRAPPERS.items():
            if isinstance(layer, wrapper):
                env.close()
                raise ValueError(
                    f"wrappers: {env_id} is wrapped in {type(layer).__name__}, whose running statistics are "
                    f"not those of evaluation and not saved; remove it and use {option}"
                )
        layer = layer.env


@contextmanager
def _ignore_sigint_in_workers() -> Iterator[None]:
    """A terminal sends Ctrl-C to all processes; those of environments have to finish the iteration under way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _detach_process_groups(envs: VectorEnv[Any, Any, Any]) -> None:
    """Who ends a run, such as torchrun, may tell all processes at once: those of environments go when the run does."""
    for process in getattr(envs, "processes", ()):
        # of children that have begun a program of their own, a system allows it no more; Windows has no groups
        with contextlib.suppress(OSError, AttributeError):
            os.setpgid(process.pid, process.pid)


def async_step_pair(envs: VectorEnv[Any, Any, Any]) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """Returns the functions that send actions and that wait for the result, as (send, recv) or (step_async, step_wait).

    Raises:
        ValueError: if the environments have no asynchronous step.
    """
    for dispatch, collect in (("send", "recv"), ("step_async", "step_wait")):
        if hasattr(envs, dispatch) and hasattr(envs, collect):
            return getattr(envs, dispatch), getattr(envs, collect)
    raise ValueError(
        f"data.overlap=true: {type(envs).__name__} has no asynchronous step; use data.vectorization=async or Atari"
    )
