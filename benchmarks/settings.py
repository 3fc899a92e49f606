"""What every system is given to do: the work, in numbers, and the job that one process runs.

Imports nothing heavy: the launcher and processes whose start is timed read it.
"""

import math
from dataclasses import dataclass
from typing import Any

ENV_ID = "CartPole-v1"
Result = dict[str, dict[str, Any]]


class AbsentError(Exception):
    """What a job needs is not here: a peer that isn't installed, or a path that isn't built. Its row says so."""


@dataclass(frozen=True)
class Work:
    """One learning task. Lengths are in env steps where the name doesn't say otherwise.

    Attributes:
        hidden_sizes: units of the hidden layers, ReLU between them.
        batch_size: transitions an update.
        memory_capacity: transitions.
        learning_starts: before the first update.
        learning_rate: of the optimizer.
        gamma: discount.
        tau: share of the way that the target net moves.
        epsilon_start: at env step 0.
        epsilon_end: in the long run.
        epsilon_decay: of the exponential, or length of the linear way.
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


# AdamW with amsgrad, Huber loss, the target net moved after each update, exponential epsilon
TEXTBOOK = Work((128, 128), 128, 10_000, 128, 1e-4, 0.99, 0.005, 0.9, 0.05, 1_000)
# Adam, Huber loss, the target net copied, linear epsilon; 256 env steps, then 128 updates
ZOO = Work((256, 256), 64, 100_000, 1_000, 2.3e-3, 0.99, 1.0, 1.0, 0.04, 8_000)
ZOO_STEPS_PER_ITERATION = 256
ZOO_UPDATES_PER_ITERATION = 128
ZOO_ENV_STEPS = 50_000

# rates are taken after so many env steps, which include the first updates and so any compilation
WARMUP_ENV_STEPS = 2_000

SOLVED_RETURN = 475.0
EVAL_EPISODES = 100
EVAL_EVERY_ENV_STEPS = 2_500

# the network's products: (inputs, outputs) of its layers
TEXTBOOK_LAYERS = ((4, 128), (128, 128), (128, 2))
ADAMW_DECAY = 0.01
ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8


def textbook_epsilon(env_steps: float) -> float:
    """Epsilon of the textbook work after so many env steps."""
    left = math.exp(-env_steps / TEXTBOOK.epsilon_decay)
    return TEXTBOOK.epsilon_end + (TEXTBOOK.epsilon_start - TEXTBOOK.epsilon_end) * left


@dataclass(frozen=True)
class Job:
    """What one process is to measure; the plan sets what stands before `seconds`, the launcher the others.

    Attributes:
        num_envs: environments side by side; on CartPole as many updates follow each step of all of them.
        compiled: whether ours compiles its update, or its sum tree.
        work: name of the workload, of those that ranks are measured with.
        config: file that holds the run's settings, from the repository root; empty for those of `Work`.
        threads: of torch.
        all_cores: whether the process may use all of them, whatever `core` says.
        own_compile_cache: whether torch compiles into a cache of this round, which is empty at its start.
        seconds: how long rates are measured.
        seed: of everything random.
        device: cpu or cuda.
        core: the CPU that the process may use; -1 for all.
        scratch: folder that may be written to.
        compile_cache: folder of torch's compiled kernels; empty for its default.
        launched_at: seconds since the epoch, right before the process was started.
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
