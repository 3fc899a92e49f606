"""What is trained: the environments with their configurations, and the variants as words of the command line."""

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

CONFIGS = Path("configs")


@dataclass(frozen=True)
class Environment:
    """One panel of the picture, and one table.

    Attributes:
        name: for `--only`, and of its folder.
        env_id: Gymnasium's.
        config: file of its settings, from the repository root.
        env_steps: of training.
        random: mean return of random actions.
        published: mean return of DQN after as many env steps, sb3-contrib's page; on v2 for LunarLander.
        shown: returns at the bottom and the top of its panel.
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
        name: for `--variants`, and of its folder.
        words: of the command line, on top of the environment's configuration.
        by_environment: further words that depend on it.
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
        """Where it lies in the work folder."""
        return Path(self.environment.name, self.variant.name, str(self.seed))

    @property
    def words(self) -> list[str]:
        """The settings on the command line: what is learnt, and nothing about where the run lies or what it shows."""
        further = f"{self.variant.words} {self.variant.by_environment.get(self.environment.name, '')}"
        return ["--config", self.environment.config, *further.split(), "--seed_everything", str(self.seed)]

    @property
    def configs(self) -> list[str]:
        """Files that its words name, in their order."""
        return [word for flag, word in zip(self.words, self.words[1:], strict=False) if flag == "--config"]


ENVIRONMENTS = (
    Environment("cartpole", "CartPole-v1", "configs/cartpole_50k.yaml", 50_000, 22.0, 500.0, (0, 510)),
    Environment("acrobot", "Acrobot-v1", "configs/acrobot.yaml", 100_000, -499.0, -74.0, (-250, -60)),
    Environment("mountaincar", "MountainCar-v0", "configs/mountaincar.yaml", 120_000, -200.0, -107.0, (-202, -90)),
    Environment("lunarlander", "LunarLander-v3", "configs/lunarlander.yaml", 100_000, -180.0, 195.0, (-250, 290)),
)

# discounted returns that occur: the support of C51's atoms
ATOMS = {
    "cartpole": "--model.v_min 0 --model.v_max 100",
    "acrobot": "--model.v_min -100 --model.v_max 0",
    "mountaincar": "--model.v_min -100 --model.v_max 0",
    "lunarlander": "--model.v_min -200 --model.v_max 300",
}

# from the first env step to the last
ANNEALED = {
    "cartpole": "--priorities.anneal_env_steps 50000",
    "acrobot": "--priorities.anneal_env_steps 100000",
    "mountaincar": "--priorities.anneal_env_steps 120000",
    "lunarlander": "--priorities.anneal_env_steps 100000",
}

# an update for every 8 env steps, of rollouts of 128; the learning rate falls over all of them
ROLLOUTS = "--data.num_envs 8 --data.steps_per_iteration 16 --data.updates_per_iteration 16 --data.batch_size 32"
ROLLOUTS += " --data.n_step 1 --model PQN --model.network.layer_norm true --model.clip_grad_norm 10"
ROLLOUTS += " --model.td_lambda 0.9 --model.optimizer torch.optim.RAdam --model.optimizer.lr 1e-3"
UPDATES = {
    "cartpole": "--model.lr_scheduler.total_iters 6250",
    "acrobot": "--model.lr_scheduler.total_iters 12500",
    "mountaincar": "--model.lr_scheduler.total_iters 15000",
    "lunarlander": "--model.lr_scheduler.total_iters 12500",
}

# what learns with the settings of DQN forgets again with C51's loss, unless its layers are normalised
NORMED = {"cartpole": "--model.network.layer_norm true"}
RAINBOW = {name: f"{ATOMS[name]} {ANNEALED[name]} {NORMED.get(name, '')}" for name in ATOMS}
# and C51 alone less often with the epsilon of its paper, 0.01 / 32, and room above 100, the value of balancing for ever
STEADY = f"{NORMED['cartpole']} --model.v_min 0 --model.v_max 120 --model.optimizer.eps 3e-4"
CATEGORICAL = {**ATOMS, "cartpole": STEADY}

# A later --config is merged into an earlier one; another --model keeps those of its init_args that the new class has.
VARIANTS = (
    Variant("dqn", "--model.double false"),
    Variant("double", "--model.double true"),
    Variant("dueling", "--model.network.dueling true"),
    Variant("per", "--data.sampler lightning_dqn.PrioritizedSampler", ANNEALED),
    # where DQN itself sums three rewards already, five
    Variant("n-step", "--data.n_step 3", {"mountaincar": "--data.n_step 5"}),
    Variant("qrdqn", "--model QRDQN"),
    Variant("c51", "--model C51", CATEGORICAL),
    # a quarter of the paper's quantiles to choose by: they cost most of an update
    Variant("iqn", "--model IQN --model.num_policy_quantiles 8"),
    Variant("munchausen", "--model.double false --model.munchausen true --data.n_step 1"),
    Variant("rainbow", "--config configs/rainbow.yaml", RAINBOW),
    Variant("pqn", ROLLOUTS, UPDATES),
)


def runs_of(environments: list[str], variants: list[str], seeds: int) -> list[Run]:
    """All runs that are asked for, seed by seed, so that a stop leaves each variant about as many.

    Args:
        environments: names.
        variants: names.
        seeds: 0 to seeds - 1 are run.
    """
    chosen = [environment for environment in ENVIRONMENTS if environment.name in environments]
    ways = [variant for variant in VARIANTS if variant.name in variants]
    return [Run(environment, way, seed) for seed, environment, way in product(range(seeds), chosen, ways)]
