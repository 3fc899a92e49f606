"""The environments with their configurations, and the variants as arguments of the command line."""

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

CONFIGS = Path("configs")


@dataclass(frozen=True)
class Environment:
    """One panel of the figure, and one table.

    Attributes:
        name: name for `--only` and for its folder.
        env_id: id in Gymnasium.
        config: path of its configuration from the repository root.
        env_steps: env steps of training.
        random: mean return of random actions.
        published: mean return of DQN after as many env steps in sb3-contrib's documentation; of v2 for LunarLander.
        shown: limits of the return axis.
    """

    name: str
    env_id: str
    config: str
    env_steps: int
    random: float
    published: float
    shown: tuple[float, float]


@dataclass(frozen=True)
class Variant:
    """One line in each panel.

    Attributes:
        name: name for `--variants` and for its folder.
        words: arguments in addition to the configuration of the environment.
        by_environment: additional arguments by environment.
    """

    name: str
    words: str = ""
    by_environment: dict[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Run:
    """One training run."""

    environment: Environment
    variant: Variant
    seed: int

    @property
    def folder(self) -> Path:
        """Path in the work folder."""
        return Path(self.environment.name, self.variant.name, str(self.seed))

    @property
    def words(self) -> list[str]:
        """The arguments that affect learning, without those of the run's folder and output."""
        further = f"{self.variant.words} {self.variant.by_environment.get(self.environment.name, '')}"
        return ["--config", self.environment.config, *further.split(), "--seed_everything", str(self.seed)]

    @property
    def configs(self) -> list[str]:
        """Configuration files in the arguments, in order."""
        return [word for flag, word in zip(self.words, self.words[1:], strict=False) if flag == "--config"]


ENVIRONMENTS = (
    Environment("cartpole", "CartPole-v1", "configs/cartpole_50k.yaml", 50_000, 22.0, 500.0, (0, 510)),
    Environment("acrobot", "Acrobot-v1", "configs/acrobot.yaml", 100_000, -499.0, -74.0, (-250, -60)),
    Environment("mountaincar", "MountainCar-v0", "configs/mountaincar.yaml", 120_000, -200.0, -107.0, (-202, -90)),
    Environment("lunarlander", "LunarLander-v3", "configs/lunarlander.yaml", 100_000, -180.0, 195.0, (-250, 290)),
)

# range of the discounted returns, for the atoms of C51
ATOMS = {
    "cartpole": "--model.v_min 0 --model.v_max 100",
    "acrobot": "--model.v_min -100 --model.v_max 0",
    "mountaincar": "--model.v_min -100 --model.v_max 0",
    "lunarlander": "--model.v_min -200 --model.v_max 300",
}

# over the whole run
ANNEALED = {
    "cartpole": "--priorities.anneal_env_steps 50000",
    "acrobot": "--priorities.anneal_env_steps 100000",
    "mountaincar": "--priorities.anneal_env_steps 120000",
    "lunarlander": "--priorities.anneal_env_steps 100000",
}

# an update per 8 env steps, rollouts of 128 env steps; the learning rate decays over all updates
ROLLOUTS = "--data.num_envs 8 --data.steps_per_iteration 16 --data.updates_per_iteration 16 --data.batch_size 32"
ROLLOUTS += " --data.n_step 1 --model PQN --model.network.layer_norm true --model.clip_grad_norm 10"
ROLLOUTS += " --model.td_lambda 0.9 --model.optimizer torch.optim.RAdam --model.optimizer.lr 1e-3"
UPDATES = {
    "cartpole": "--model.lr_scheduler.total_iters 6250",
    "acrobot": "--model.lr_scheduler.total_iters 12500",
    "mountaincar": "--model.lr_scheduler.total_iters 15000",
    "lunarlander": "--model.lr_scheduler.total_iters 12500",
}

# with the settings of DQN, the loss of C51 needs layer norm against forgetting
NORMED = {"cartpole": "--model.network.layer_norm true"}
RAINBOW = {name: f"{ATOMS[name]} {ANNEALED[name]} {NORMED.get(name, '')}" for name in ATOMS}
# C51 alone forgets less with the epsilon of its paper, 0.01 / 32, and atoms above 100, the value of endless balancing
STEADY = f"{NORMED['cartpole']} --model.v_min 0 --model.v_max 120 --model.optimizer.eps 3e-4"
CATEGORICAL = {**ATOMS, "cartpole": STEADY}

# A later --config is merged into an earlier one; another --model keeps the init_args that the new class accepts.
VARIANTS = (
    Variant("dqn", "--model.double false"),
    Variant("double", "--model.double true"),
    Variant("dueling", "--model.network.dueling true"),
    Variant("per", "--data.sampler lightning_dqn.PrioritizedSampler", ANNEALED),
    # five-step returns where DQN already uses three steps
    Variant("n-step", "--data.n_step 3", {"mountaincar": "--data.n_step 5"}),
    Variant("qrdqn", "--model QRDQN"),
    Variant("c51", "--model C51", CATEGORICAL),
    # a quarter of the paper's policy quantiles, which take most of the time of an update
    Variant("iqn", "--model IQN --model.num_policy_quantiles 8"),
    Variant("munchausen", "--model.double false --model.munchausen true --data.n_step 1"),
    Variant("rainbow", "--config configs/rainbow.yaml", RAINBOW),
    Variant("pqn", ROLLOUTS, UPDATES),
)


def runs_of(environments: list[str], variants: list[str], seeds: int) -> list[Run]:
    """All chosen runs, seed by seed, so that after an interruption all variants have about as many.

    Args:
        environments: names of environments.
        variants: names of variants.
        seeds: number of seeds, from 0.
    """
    chosen = [environment for environment in ENVIRONMENTS if environment.name in environments]
    ways = [variant for variant in VARIANTS if variant.name in variants]
    return [Run(environment, way, seed) for seed, environment, way in product(range(seeds), chosen, ways)]
