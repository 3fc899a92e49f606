"""The measurements, each with its systems in the order of their runs, its figures and its references."""

from dataclasses import dataclass, replace

from benchmarks.settings import Job

SIZES = ("1000", "10000", "100000", "1000000")
PRIORITY_KINDS = {
    "uniform": "uniform sample",
    "prioritized": "prioritised sample and write",
    "append": "append, uniform",
    "append_prioritized": "append, prioritised",
}


USUAL = Job()


@dataclass(frozen=True)
class System:
    """One row of a table.

    Attributes:
        name: name in the table.
        entry: module and function that run the job.
        job: fields of its `Job`.
    """

    name: str
    entry: str
    job: Job = USUAL


@dataclass(frozen=True)
class Measurement:
    """One table.

    Attributes:
        name: name for `--only` and for the file of results.
        title: title of the table.
        figures: key of each figure in the results, and its label with the unit.
        systems: rows, in the order of their runs.
        yardsticks: names of the reference systems of the ratios.
        timeout_s: time limit of a process in s, in addition to its `seconds`.
    """

    name: str
    title: str
    figures: dict[str, str]
    systems: tuple[System, ...]
    yardsticks: tuple[str, ...]
    timeout_s: float = 300


SB3, JAX = "Stable-Baselines3", "JAX, one XLA loop"
PLAIN, COMPILED = "ours, plain", "ours, compiled"
RATES = {
    "env_steps_per_s": "env steps/s",
    "updates_per_s": "updates/s",
    "outside_step_share": "share of time outside the updates",
}


def _rates(num_envs: int) -> tuple[System, ...]:
    """The same workload for all systems."""
    job = Job(num_envs=num_envs)
    return (
        System(PLAIN, "benchmarks.ours:rates", job),
        System(COMPILED, "benchmarks.ours:rates", replace(job, compiled=True)),
        System(SB3, "benchmarks.sb3:rates", job),
        System(JAX, "benchmarks.jax_loop:rates", job),
    )


LEAN_SB3 = "Stable-Baselines3, optimize_memory_usage"
WRAPPED = "Gymnasium, 1 wrapped env"
EAGER_FLOOR, COMPILED_FLOOR = "floor: a bare update, eager", "floor: a bare update, compiled"


def _pong(*, all_cores: bool, threads: int = 1) -> tuple[System, ...]:
    """One update every 4 env steps for all systems, and the update alone."""
    one = Job(all_cores=all_cores, threads=threads)
    four = replace(one, num_envs=4)
    compiled_one, compiled_four = (replace(job, compiled=True) for job in (one, four))
    return (
        System("ours, 4 envs, compiled", "benchmarks.atari.ours:rates", compiled_four),
        System("ours, 4 envs, plain", "benchmarks.atari.ours:rates", four),
        System("ours, 1 env, compiled", "benchmarks.atari.ours:rates", compiled_one),
        System(SB3, "benchmarks.atari.sb3:rates", one),
        System("Stable-Baselines3, 4 envs", "benchmarks.atari.sb3:rates", four),
        System(EAGER_FLOOR, "benchmarks.atari.floor:eager", one),
        System(COMPILED_FLOOR, "benchmarks.atari.floor:compiled", compiled_one),
    )


MEASUREMENTS = (
    Measurement("textbook", "textbook work, 1 env, 1 update an iteration", RATES, _rates(1), (SB3, JAX)),
    Measurement("vector", "textbook work, 16 envs, 16 updates an iteration", RATES, _rates(16), (SB3, JAX)),
    Measurement(
        "floor",
        "one update's matrix products; a bare torch update without game, memory and Lightning",
        {"updates_per_s": "updates/s"},
        (
            System("the 11 matrix products", "benchmarks.floor:products"),
            System("eager torch, fused AdamW", "benchmarks.floor:bare_update"),
        ),
        ("the 11 matrix products",),
    ),
    Measurement(
        "startup",
        "start of the process to the end of the first update (128 env steps before it)",
        {"startup_s": "s"},
        (
            System("ours, plain, default logger", "benchmarks.startup:ours"),
            System(SB3, "benchmarks.sb3:startup"),
            System(JAX, "benchmarks.jax_loop:startup"),
            System("imports and environment only", "benchmarks.startup:bare"),
        ),
        (SB3, "imports and environment only"),
    ),
    Measurement(
        "compilation",
        "what compiling adds to the time until the first update",
        {"compile_s": "s"},
        (
            System("ours, empty cache", "benchmarks.ours:compilation", Job(own_compile_cache=True)),
            System("ours, second run", "benchmarks.ours:compilation", Job(own_compile_cache=True)),
        ),
        ("ours, empty cache",),
    ),
    Measurement(
        "solve",
        "CartPole with the Zoo's settings, evaluation excluded; one seed a round",
        {
            "solve_s": "s of training to the first greedy mean >= 475",
            "solve_env_steps": "env steps to it",
            "stable_s": "s of training to the first of three in a row",
            "stable_env_steps": "env steps to that",
            "train_s": "s of training in the whole run",
        },
        (
            System(PLAIN, "benchmarks.ours:solve"),
            System(COMPILED, "benchmarks.ours:solve", Job(compiled=True)),
            System("ours, cartpole_fast.yaml", "benchmarks.ours:solve", Job(config="configs/cartpole_fast.yaml")),
            System(SB3, "benchmarks.sb3:solve"),
        ),
        (SB3,),
        timeout_s=1800,
    ),
    Measurement(
        "memory",
        "one append of one env, one sample of 128 rows; spread = dearest size / cheapest",
        {f"{kind}_{size}_us": f"us, {kind} at {int(size):,} rows" for kind in ("append", "sample") for size in SIZES}
        | {"append_spread": "append, spread", "sample_spread": "sample, spread"},
        (System("ours", "benchmarks.memory:ours"), System(SB3, "benchmarks.memory:sb3")),
        (SB3,),
        timeout_s=600,
    ),
    Measurement(
        "priorities",
        "one uniform sample of 128 rows; a prioritised one with the write of its priorities; one append of one env",
        {f"ratio_{size}": f"prioritised / uniform at {int(size):,} rows" for size in SIZES[1:]}
        | {
            f"{kind}_{size}_us": f"us, {words} at {int(size):,} rows"
            for kind, words in PRIORITY_KINDS.items()
            for size in SIZES[1:]
        },
        (
            System("compiled tree", "benchmarks.memory:prioritized", Job(compiled=True)),
            System("numpy tree", "benchmarks.memory:prioritized"),
        ),
        ("compiled tree",),
        timeout_s=600,
    ),
    Measurement(
        "peak",
        "peak resident memory of the textbook work, 1 env",
        {"peak_mib": "MiB"},
        _rates(1),
        (SB3,),
    ),
    Measurement(
        "atari",
        "Pong, NatureCNN, one update of 32 every 4 env steps",
        RATES,
        _pong(all_cores=False),
        (SB3, COMPILED_FLOOR),
        timeout_s=900,
    ),
    Measurement(
        "atari_cores",
        "the same on all cores, two threads of torch, or one that leaves the others to the games",
        RATES,
        (
            *_pong(all_cores=True, threads=2),
            System(
                "ours, 4 envs, compiled, one thread",
                "benchmarks.atari.ours:rates",
                Job(num_envs=4, compiled=True, all_cores=True),
            ),
        ),
        (SB3, COMPILED_FLOOR),
        timeout_s=900,
    ),
    Measurement(
        "atari_memory",
        "peak resident memory at 100,000 env steps of Pong in the memory, and the first update",
        {"peak_mib": "MiB"},
        (
            System("ours, 4 envs, compiled", "benchmarks.atari.ours:fill", Job(num_envs=4, compiled=True)),
            System("ours, 4 envs, plain", "benchmarks.atari.ours:fill", Job(num_envs=4)),
            System(SB3, "benchmarks.atari.sb3:fill"),
            System(LEAN_SB3, "benchmarks.atari.sb3:fill_lean"),
        ),
        (SB3, LEAN_SB3),
        timeout_s=1800,
    ),
    Measurement(
        "atari_stepping",
        "Pong's frames alone, 4 a step, stacked, random actions",
        {"env_steps_per_s": "env steps/s"},
        (
            System("ours, 64 envs, all cores", "benchmarks.atari.ours:stepping", Job(num_envs=64, all_cores=True)),
            System("ours, 8 envs, all cores", "benchmarks.atari.ours:stepping", Job(num_envs=8, all_cores=True)),
            System("ours, 8 envs, one core", "benchmarks.atari.ours:stepping", Job(num_envs=8)),
            System(WRAPPED, "benchmarks.atari.gymnasium_env:stepping"),
        ),
        (WRAPPED,),
    ),
)
