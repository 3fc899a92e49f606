"""Environments that rule out actions: none of them is taken, and none counts in a target."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import quiet_trainer
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from runs import small_mlp
from test_module import batch_of
from toys import stateless

from lightning_dqn import C51, DQN, IQN, MLP, PQN, QRDQN, DQNDataModule
from lightning_dqn.acting import choose_actions
from lightning_dqn.collector import Collector
from lightning_dqn.envs import SingleVectorEnv
from lightning_dqn.envs.errors import BrokenEnvironmentError
from lightning_dqn.losses import mask_actions
from lightning_dqn.replay import MaskedTransition, ReplayMemory

BOX = spaces.Box(-1, 1, (2,))


class Walk(gym.Env):
    """Five cells in a row; from the first nobody goes left (0), from the last nobody stays (2). Ends after 7 steps."""

    observation_space = spaces.Box(0, 4, (1,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, silent_after=None):
        self.silent_after = silent_after
        self.forbidden = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell, self.steps = int(self.np_random.integers(5)), 0
        return self._seen()

    def step(self, action):
        self.forbidden += not self._mask()[action]
        self.cell = min(4, max(0, self.cell + (-1, 1, 0)[action]))
        self.steps += 1
        observation, info = self._seen()
        return observation, 1.0 if self.cell == 4 else 0.0, self.steps == 7, False, info

    def _mask(self):
        return np.array([self.cell > 0, True, self.cell < 4], np.int8)

    def _seen(self):
        silent = self.silent_after is not None and self.steps >= self.silent_after
        return np.array([self.cell], np.float32), {} if silent else {"action_mask": self._mask()}


gym.register("Walk-v0", Walk)


class Mute(Walk):
    """Allows nothing from the third step on."""

    def _mask(self):
        return super()._mask() * (self.steps < 2)


def of(observation):
    """The mask that belongs to an observation of Walk."""
    cell = np.asarray(observation)[..., 0]
    return np.stack([cell > 0, np.ones_like(cell, bool), cell < 4], -1)


def test_forbidden_values_are_low_but_finite():
    values = mask_actions(torch.tensor([[5.0, 1.0], [2.0, 3.0]]), torch.tensor([[False, True], [True, True]]))
    assert values.argmax(1).tolist() == [1, 1]
    # what a terminal row does with its next value: 0 * -1e9 is 0, where 0 * -inf would be no number
    assert (0 * values.amin(1)).tolist() == [0.0, 0.0]
    assert torch.isfinite(mask_actions(values.half(), torch.zeros(2, 2, dtype=torch.bool))).all()


@pytest.mark.parametrize(("epsilon", "temperature"), [(0.0, None), (1.0, None), (0.5, None), (0.0, 2.0)])
def test_no_way_of_choosing_takes_a_forbidden_action_and_each_takes_all_others(epsilon, temperature):
    rng = np.random.default_rng(0)
    mask = np.array([[True, False, True, False]] * 2000)
    # where nothing is random, the values are
    values = rng.normal(size=mask.shape)
    options = {"epsilon": epsilon, "temperature": temperature, "action_mask": mask}
    actions = choose_actions(lambda: values, 2000, 4, **options, rng=rng)
    assert set(actions) == {0, 2}
    # each about half the time: four standard deviations of 2000 are 90
    assert abs((actions == 0).sum() - 1000) < 90


def masked_batch():
    """Two rows: the best next action is forbidden in the first; in the second all are, which has terminated."""
    return MaskedTransition(
        *(part[0] for part in batch_of(1)),
        action_mask=torch.tensor([[True, True], [False, True]]),
        next_action_mask=torch.tensor([[True, False], [False, False]]),
    )


def linear(cls, weight, **options):
    """A learner whose Q(s, a), or every quantile of it, is the dot product of s with row a of `weight`."""
    model = cls(BOX, spaces.Discrete(2), network=lambda space, n: MLP(space, n, hidden_sizes=[]), **options)
    for net in (model.policy_net, model.target_net):
        with torch.no_grad():
            rows = torch.tensor(weight).repeat_interleave(net.output.out_features // 2, 0)
            net.output.weight.copy_(rows)
            net.output.bias.zero_()
    return model


@pytest.mark.parametrize("options", [{}, {"double": True}])
def test_targets_take_the_best_of_the_allowed_actions(options):
    model = linear(DQN, [[0.5, 1.0], [2.0, 4.0]], **options)
    result = model.td_loss(masked_batch(), model.policy_net, model.target_net)
    # s' of row 1 has values (1, 4), of which only the 1 is allowed: 1 + .5 * 1;  row 2: 2 + 0
    assert (result.q_value - result.td_error).tolist() == pytest.approx([1.5, 2.0])


def test_munchausens_policy_gives_forbidden_actions_no_chance_and_no_entropy():
    model = linear(DQN, [[0.5, 1.0], [2.0, 4.0]], munchausen=True, munchausen_temperature=1.0)
    result = model.td_loss(masked_batch(), model.policy_net, model.target_net)
    # row 1: ln pi(0 | s) of values (.5, 2) is -ln(1 + e^1.5) = -1.70, cut at -1: 1 - .9 + .5 * 1, whose one allowed
    # action has no entropy.  row 2: the only allowed action is sure, ln 1 = 0: 2 + 0
    assert (result.q_value - result.td_error).tolist() == pytest.approx([0.6, 2.0], abs=1e-5)


@pytest.mark.parametrize("double", [False, True])
def test_quantiles_of_the_best_allowed_action_are_the_target(double):
    model = linear(QRDQN, [[0.5, 1.0], [2.0, 4.0]], num_quantiles=3, double=double)
    result = model.td_loss(masked_batch(), model.policy_net, model.target_net)
    assert (result.q_value - result.td_error).tolist() == pytest.approx([1.5, 2.0])


@pytest.mark.parametrize("double", [False, True])
def test_the_distribution_of_the_best_allowed_action_is_the_target(double):
    model = C51(
        BOX,
        spaces.Discrete(2),
        network=lambda space, n: MLP(space, n, hidden_sizes=[]),
        num_atoms=2,
        v_min=0,
        v_max=10,
        double=double,
    )
    with torch.no_grad():
        for net in (model.policy_net, model.target_net):
            net.output.weight.zero_()
            # action 0 is worth 10 * 1/4, action 1 as good as 10
            net.output.bias.copy_(torch.tensor([0.0, -np.log(3.0), 0.0, 30.0]))
    result = model.td_loss(masked_batch(), model.policy_net, model.target_net)
    # row 1: 1 + .5 * 2.5 = 2.25, inside the support;  row 2: 2
    assert (result.q_value - result.td_error).tolist() == pytest.approx([2.25, 2.0], abs=1e-5)


@pytest.mark.parametrize(("num_envs", "n_step"), [(1, 1), (3, 1), (2, 3)])
def test_a_memory_gives_each_observation_its_own_mask(num_envs, n_step):
    envs = SyncVectorEnv([Walk] * num_envs)
    rng = np.random.default_rng(0)

    def policy(observation, rng_of_player, mask):
        assert (mask == of(observation)).all()
        return np.array([rng.choice(np.flatnonzero(row)) for row in mask])

    collector = Collector(envs=envs, policy=stateless(policy), seed=0, action_masks=True)
    memory = ReplayMemory(
        capacity=60, num_envs=num_envs, observation_space=Walk.observation_space, gamma=0.9, n_step=n_step, mask_size=3
    )
    memory.begin(collector.start(), collector.action_mask)
    for _ in range(100):
        memory.append(*collector.step())
    batch = memory.sample(2, 500)
    assert batch.action_mask.shape == (2, 500, 3)
    assert (batch.action_mask.numpy() == of(batch.observation)).all()
    assert (batch.next_action_mask.numpy() == of(batch.next_observation)).all()
    assert sum(env.forbidden for env in envs.envs) == 0


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("model", [DQN, C51, QRDQN, IQN, PQN])
def test_whoever_learns_and_acts_never_takes_a_forbidden_action(model, num_envs, monkeypatch):
    taken = []
    step = Walk.step

    def watched(env, action):
        taken.append(bool(env._mask()[action]))
        return step(env, action)

    monkeypatch.setattr(Walk, "step", watched)
    rollout = {"steps_per_iteration": 8} if model is PQN else {}
    data = DQNDataModule(
        env_id="Walk-v0",
        num_envs=num_envs,
        epoch_env_steps=300,
        eval_episodes=2,
        batch_size=8,
        action_masks=True,
        **rollout,
    )
    learner = model(data.observation_space, data.action_space, network=small_mlp)
    trainer = quiet_trainer()
    trainer.fit(learner, data)
    # play and evaluation, but for the steps into which an environment resets
    assert len(taken) >= 300
    assert all(taken)
    assert trainer.global_step > 10


@pytest.mark.parametrize("num_envs", [1, 2])
def test_an_environment_that_gives_no_mask_or_allows_no_action_is_named(num_envs):
    for make, words in ((lambda: Walk(silent_after=3), "there is no info"), (Mute, "allows no action")):
        envs = SyncVectorEnv([make] * num_envs) if num_envs > 1 else SingleVectorEnv(make())

        def policy(observation, rng, mask):
            return mask.argmax(1)

        collector = Collector(envs=envs, policy=stateless(policy), seed=0, action_masks=True)
        collector.start()
        with pytest.raises(BrokenEnvironmentError, match=f"environment 0 of {num_envs}.*{words}"):
            [collector.step() for _ in range(5)]


def test_masks_of_an_environment_that_gives_none_are_rejected_before_the_run():
    with pytest.raises(ValueError, match=r"action_masks=True.*\(\), \(2,\) is needed"):
        DQNDataModule(env_id="CartPole-v1", action_masks=True)
