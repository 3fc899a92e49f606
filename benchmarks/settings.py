"""The workloads of all systems, and the job of one process.

Imports nothing heavy, since the launcher and jobs that measure the startup time import it.
"""

import math
from dataclasses import dataclass
from typing import Any

ENV_ID = "CartPole-v1"
Result = dict[str, dict[str, Any]]


class AbsentError(Exception):
    """A job needs a library that is not installed, or a feature that is missing; the table shows the reason."""


@dataclass(frozen=True)
class Work:
    """One workload. Lengths are in env steps unless the name states another unit.

    Attributes:
        hidden_sizes: units of the hidden layers, ReLU between them.
        batch_size: transitions per update.
        memory_capacity: transitions.
        learning_starts: env steps before the first update.
        learning_rate: learning rate of the optimizer.
        gamma: discount.
        tau: coefficient of the Polyak update of the target net.
        epsilon_start: epsilon at env step 0.
        epsilon_end: final epsilon.
        epsilon_decay: time constant of the exponential schedule, or length of the linear one.
    """

    hidden_sizes: tuple[int, int]
    batch_size: int
    memory_capacity: int
    learning_starts: int
    learning_rate: float
    gamma: float
    tau: float
    epsilon_start: float
    epsilon_end: float
    epsilon_decay: int


# AdamW with amsgrad, Huber loss, Polyak update after each update, exponential epsilon
TEXTBOOK = Work((128, 128), 128, 10_000, 128, 1e-4, 0.99, 0.005, 0.9, 0.05, 1_000)
# Adam, Huber loss, the target net copied, linear epsilon; 256 env steps, then 128 updates
ZOO = Work((256, 256), 64, 100_000, 1_000, 2.3e-3, 0.99, 1.0, 1.0, 0.04, 8_000)
ZOO_STEPS_PER_ITERATION = 256
ZOO_UPDATES_PER_ITERATION = 128
ZOO_ENV_STEPS = 50_000

# warm-up in env steps, which includes the first updates and any compilation
WARMUP_ENV_STEPS = 2_000

SOLVED_RETURN = 475.0
EVAL_EPISODES = 100
EVAL_EVERY_ENV_STEPS = 2_500

# (inputs, outputs) of the network's layers
TEXTBOOK_LAYERS = ((4, 128), (128, 128), (128, 2))
ADAMW_DECAY = 0.01
ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


def textbook_epsilon(env_steps: float) -> float:
    """Epsilon of the textbook workload after a number of env steps."""
    left = math.exp(-env_steps / TEXTBOOK.epsilon_decay)
    return TEXTBOOK.epsilon_end + (TEXTBOOK.epsilon_start - TEXTBOOK.epsilon_end) * left


@dataclass(frozen=True)
class Job:
    """The job of one process; the plan sets the fields before `seconds`, the launcher the others.

    Attributes:
        num_envs: parallel environments; on CartPole also the updates per step of all environments.
        compiled: whether this package compiles its update, or its sum tree.
        work: name of a workload of `scaling`.
        config: path of a configuration from the repository root; empty for the settings of `Work`.
        threads: threads of torch.
        all_cores: whether the process may use all cores instead of `core`.
        own_compile_cache: whether to use a separate compile cache, empty at the start of the round.
        seconds: duration of a rate measurement in s.
        seed: seed of all random numbers.
        device: cpu or cuda.
        core: CPU of the process; -1 for all.
        scratch: folder for temporary files.
        compile_cache: folder of torch's compile cache; empty for its default.
        launched_at: start time of the process in seconds since the Unix epoch.
    """

    num_envs: int = 1
    compiled: bool = False
    work: str = ""
    config: str = ""
    threads: int = 1
    all_cores: bool = False
    own_compile_cache: bool = False
    seconds: float = 10.0
    seed: int = 0
    device: str = "cpu"
    core: int = -1
    scratch: str = ""
    compile_cache: str = ""
    launched_at: float = 0.0
