"""Every learner of the family on a chain whose values are known: a real fit arrives at them."""

import chain
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import quiet_trainer

from lightning_dqn import (
    C51,
    DQN,
    IQN,
    MLP,
    QRDQN,
    DQNDataModule,
    EpsilonDecay,
    PrioritizedSampler,
    PriorityUpdate,
    SoftTargetUpdate,
)

# 10 environments, and 10 updates from each of their steps
DATA = {"num_envs": 10, "updates_per_iteration": 10, "batch_size": 64, "warmup_env_steps": 500}
STATES = torch.eye(chain.STATES)


def linear(space, outputs):
    """A table."""
    return MLP(space, outputs, hidden_sizes=[])


def learnt(make=DQN, *, network=linear, updates=1000, lr=0.03, tau=0.1, data=(), **options):
    """Action values after a fit that plays each action as often as the other, unless the learner explores itself."""
    pl.seed_everything(0, verbose=False)
    options_of_data = {**DATA, **dict(data)}
    env_steps = 500 + updates * options_of_data["num_envs"] // options_of_data["updates_per_iteration"]
    # nothing is forgotten
    side = DQNDataModule(
        env_id="Chain-v0",
        gamma=chain.GAMMA,
        epoch_env_steps=env_steps,
        memory_capacity=2 * env_steps,
        eval_episodes=1,
        **options_of_data,
    )

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=lr)

    # values settle while the rate falls to a hundredth
    def falling(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / updates))

    spaces = side.observation_space, side.action_space
    model = make(*spaces, network=network, optimizer=adam, lr_scheduler=falling, compile=False, **options)
    schedules = [SoftTargetUpdate(tau=tau), EpsilonDecay(start=1.0, end=1.0), PriorityUpdate()]
    trainer = quiet_trainer(callbacks=schedules, limit_val_batches=0)
    trainer.fit(model, side)
    assert abs(trainer.global_step - updates) <= updates // 10
    model.eval()
    with torch.no_grad():
        return model(STATES).numpy()


def hidden(space, outputs):
    """Two layers: an embedding of levels whose few ReLUs may all be off is nothing to tell six states apart by."""
    return MLP(space, outputs, hidden_sizes=[32, 32])


ATOMS = {"num_atoms": 31, "v_min": -0.5, "v_max": 1.5}
COSINES = {"num_cosines": 16, "network": hidden, "lr": 0.005}
BEST = chain.best_values()
# the value of an action that is hardly ever chosen comes to rest late: a tenth of the way a sweep
SOFT = {"munchausen": True, "munchausen_temperature": 0.1, "updates": 1600}
SOFT_VALUES = chain.munchausen_values(0.1)
# (learner, its options, where it must arrive, how near)
FAMILY = {
    "dqn": (DQN, {}, BEST, 0.01),
    "mse": (DQN, {"loss": "mse"}, BEST, 0.01),
    "double": (DQN, {"double": True}, BEST, 0.01),
    "munchausen": (DQN, SOFT, SOFT_VALUES, 0.01),
    "dueling": (DQN, {"network": lambda s, n: MLP(s, n, hidden_sizes=[], dueling=True)}, BEST, 0.01),
    "layer-norm": (DQN, {"network": lambda s, n: MLP(s, n, hidden_sizes=[32], layer_norm=True)}, BEST, 0.03),
    "noisy": (DQN, {"network": lambda s, n: MLP(s, n, hidden_sizes=[], noisy=True), "updates": 2000}, BEST, 0.05),
    "boltzmann": (DQN, {"boltzmann_temperature": 1.0}, BEST, 0.01),
    "prioritised": (DQN, {"data": {"sampler": PrioritizedSampler}}, BEST, 0.01),
    "three-step": (DQN, {"data": {"n_step": 3, "num_envs": 40}}, chain.n_step_values(3), 0.05),
    "c51": (C51, {**ATOMS, "lr": 0.1}, BEST, 0.02),
    "c51-double": (C51, {**ATOMS, "lr": 0.1, "double": True}, BEST, 0.02),
    "qrdqn": (QRDQN, {"num_quantiles": 8}, BEST, 0.02),
    "qrdqn-munchausen": (QRDQN, {"num_quantiles": 8, **SOFT}, SOFT_VALUES, 0.02),
    "iqn": (IQN, {**COSINES}, BEST, 0.03),
    "iqn-munchausen": (IQN, {**COSINES, **SOFT, "updates": 3000}, SOFT_VALUES, 0.03),
}
# nearly covered by others
SELDOM = {"mse", "layer-norm", "boltzmann", "c51", "qrdqn", "iqn-munchausen", "iqn", "noisy", "qrdqn-munchausen"}


def test_the_values_of_the_chain_are_what_one_works_out_by_hand():
    # from state 5 to the right: 1; from 4: -.05 + .9; from 3: -.05 + .9 * .85
    assert BEST[[5, 4, 3], chain.RIGHT].tolist() == pytest.approx([1.0, 0.85, 0.715])
    # from 0 to the left: .3; from 1 to the left: .9 V(0), and V(0) = -.05 + .9 V(1)
    assert BEST[0, chain.LEFT] == pytest.approx(0.3)
    assert BEST[1, chain.LEFT] == pytest.approx(0.9 * BEST[0].max())
    # one step looks at no other; with chance alone on the way less is left
    assert chain.n_step_values(1) == pytest.approx(BEST)
    assert (chain.n_step_values(3) <= BEST + 1e-9).all()
    # without temperature soft values are the best ones
    assert chain.munchausen_values(1e-4, alpha=0.0) == pytest.approx(BEST, abs=1e-3)


@pytest.mark.parametrize(
    ("make", "options", "values", "tolerance"),
    [pytest.param(*case, id=name, marks=[pytest.mark.learning] * (name in SELDOM)) for name, case in FAMILY.items()],
)
@pytest.mark.integration
def test_a_fit_arrives_at_the_known_values(make, options, values, tolerance):
    found = learnt(make, **options)
    assert np.abs(found - values).max() < tolerance, np.round(found - values, 3)
