"""Observations normalized inside the agent, scaled rewards, and the wrappers that these replace."""

import functools
import itertools

import gymnasium as gym
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import quiet_trainer
from gymnasium import spaces
from gymnasium.wrappers import NormalizeObservation, NormalizeReward, TransformReward
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run
from test_update import StepCounter

from lightning_dqn import C51, DQN, IQN, MLP, PQN, QRDQN, DQNDataModule, EpsilonDecay, SoftTargetUpdate
from lightning_dqn.envs import EnvSettings, make_env, make_vector_env
from lightning_dqn.networks import ObservationNormalizer
from lightning_dqn.resume.content import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")
BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)
NORMALIZED = {"learner": {"normalize_observations": True}}
ROLLOUTS = {"num_envs": 4, "steps_per_iteration": 5, "updates_per_iteration": 4, "batch_size": 10}


class Far(gym.Env):
    """The observation, 1000 or 1001, names the action that pays 1; five steps an episode."""

    def __init__(self, shape=(1,)):
        self.observation_space, self.action_space = spaces.Box(-np.inf, np.inf, shape, np.float32), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.best = 0, int(self.np_random.integers(2))
        return self.show(), {}

    def step(self, action):
        reward, self.steps, self.best = float(action == self.best), self.steps + 1, int(self.np_random.integers(2))
        return self.show(), reward, self.steps >= 5, False, {}

    def show(self):
        return np.full(self.observation_space.shape, 1000 + self.best, np.float32)


@pytest.fixture(autouse=True, scope="module")
def registered():
    gym.register("Far-v0", Far)
    yield
    del gym.registry["Far-v0"]


def trained(num_updates, model=DQN, *, lr=1e-3, tau=0.005, callbacks=(), data=(), **options):
    """A model, its data and its trainer, after so many updates from seed 0."""
    pl.seed_everything(0, verbose=False)
    rollouts = ROLLOUTS if model.on_policy else {}
    data = DQNDataModule(**{"batch_size": 32, "warmup_env_steps": 64, "eval_episodes": 20, **rollouts, **dict(data)})
    spaces_ = data.observation_space, data.action_space
    model = model(*spaces_, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr), **options)
    schedules = [EpsilonDecay(), SoftTargetUpdate(tau=tau), *callbacks]
    trainer = quiet_trainer(max_epochs=None, max_steps=num_updates, limit_val_batches=0, callbacks=schedules)
    trainer.fit(model, data)
    return model, data, trainer


def assert_same_weights(one, other):
    assert one.policy_net.state_dict().keys() == other.policy_net.state_dict().keys()
    for name, value in one.policy_net.state_dict().items():
        assert torch.equal(value, other.policy_net.state_dict()[name]), name


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    offset=st.sampled_from([0.0, 1e3, -1e6]),
    shape=st.sampled_from([(), (3,), (2, 3)]),
    seed=st.integers(0, 100),
)
def test_statistics_of_batches_in_any_order_are_those_of_all_their_rows(sizes, offset, shape, seed):
    rng = np.random.default_rng(seed)
    batches = [(offset + rng.normal(size=(size, *shape))).astype(np.float32) for size in sizes]
    rows = np.concatenate(batches).astype(np.float64)
    for order in itertools.islice(itertools.permutations(batches), 4):
        normalizer = ObservationNormalizer(spaces.Box(-np.inf, np.inf, shape, np.float32))
        for batch in order:
            # of the leading shape (1, B) that batches have
            normalizer.update(torch.from_numpy(batch)[None])
        assert normalizer.count.item() == len(rows)
        np.testing.assert_allclose(normalizer.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(normalizer.variance, rows.var(0), rtol=1e-7, atol=1e-12)


def test_vectors_of_several_ranks_are_merged_in_their_order():
    parts = torch.randn(3, 8, 3) + 100
    expected = ObservationNormalizer(BOX)
    for part in parts:
        expected.update(part)
    sent = []
    for part in parts:
        ObservationNormalizer(BOX).update(part, lambda vector: sent.append(vector) or vector[None])
    merged = ObservationNormalizer(BOX)
    merged.update(parts[0], lambda vector: torch.stack(sent))
    assert merged.count.item() == 24
    for name, value in expected.state_dict().items():
        assert torch.equal(value, merged.state_dict()[name]), name


def test_normalized_observations_are_centred_scaled_and_clipped():
    normalizer = ObservationNormalizer(BOX)
    rows = torch.tensor([[1000.0, 0.0, 5.0], [1001.0, 4.0, 5.0]])
    normalizer.update(rows)
    # means 1000.5, 2, 5; deviations .5, 2, 0
    assert normalizer(rows).flatten().tolist() == pytest.approx([-1.0, -1.0, 0.0, 1.0, 1.0, 0.0])
    assert normalizer(torch.tensor([[0.0, 200.0, 6.0]])).tolist() == [[-10.0, 10.0, 10.0]]
    shown = np.random.default_rng(0).normal(1000, 1, (4, 3)).astype(np.float32)
    assert normalizer(torch.from_numpy(shown)).dtype == torch.float32
    assert np.array_equal(normalizer.forward_numpy(shown), normalizer(torch.from_numpy(shown)).numpy())


def test_before_the_first_update_observations_stay_as_they_are():
    normalizer, rows = ObservationNormalizer(BOX), torch.tensor([[1000.0, -20.0, 0.1]])
    assert torch.equal(normalizer(rows), rows)
    assert np.array_equal(normalizer.forward_numpy(rows.numpy()), rows.numpy())


def test_half_precision_leaves_the_statistics_in_double_precision():
    normalizer = ObservationNormalizer(BOX)
    normalizer.update(torch.randn(100, 3) + 1000)
    before = {name: value.clone() for name, value in normalizer.state_dict().items()}
    normalizer.to(torch.bfloat16)
    for name, value in normalizer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    "space",
    [spaces.Discrete(3), spaces.Box(0, 255, (4, 4), np.uint8), spaces.Box(0, 9, (2,), np.int64)],
    ids=["discrete", "image", "integers"],
)
def test_only_boxes_of_floats_can_be_normalized(space):
    with pytest.raises(ValueError, match="normalize_observations=True"):
        DQN(space, spaces.Discrete(2), network=lambda *_: torch.nn.Linear(1, 2), normalize_observations=True)


@pytest.mark.parametrize("layer_norm", [False, True], ids=["numpy", "torch"])
def test_acting_and_values_take_raw_observations(layer_norm):
    def network(space, outputs):
        # layer norm has no form in numpy
        return MLP(space, outputs, hidden_sizes=[16], layer_norm=layer_norm)

    model = DQN(BOX, spaces.Discrete(4), network=network, normalize_observations=True)
    raw = torch.randn(32, 3) * torch.tensor([1.0, 50.0, 0.01]) + 1000
    model.normalizer.update(raw)
    expected = model.policy_net(model.normalizer(raw))
    torch.testing.assert_close(model(raw), expected)
    assert model.act(raw.numpy()).tolist() == expected.argmax(1).tolist()
    assert len(set(expected.argmax(1).tolist())) > 1


@pytest.mark.parametrize("model", [DQN, C51, QRDQN, IQN, PQN])
def test_losses_see_normalized_observations_and_the_memory_keeps_raw_ones(model):
    seen = []

    class Watched(model):
        def td_loss(self, batch, *nets):
            seen.append((batch.observation.clone(), batch.next_observation.clone()))
            return super().td_loss(batch, *nets)

    module, data, _ = trained(
        60, Watched, normalize_observations=True, compile=False, data={"env_id": "Far-v0", "vectorization": "sync"}
    )
    normalizer = module.normalizer
    assert normalizer.count.item() > 300
    assert normalizer.mean.item() == pytest.approx(1000.5, abs=0.2)
    assert normalizer.variance.item() == pytest.approx(0.25, abs=0.05)
    for part in seen[-1]:
        assert part.abs().max() < 2
    if not model.on_policy:
        observation = data.train_dataset.memory.sample(1, 64).observation
        assert set(observation.flatten().tolist()) == {1000.0, 1001.0}


def test_rollouts_are_normalized_once():
    model, data, trainer = trained(4, PQN, normalize_observations=True, compile=False)
    rollout = next(iter(data.train_dataset))
    model.trainer = trainer
    batch = model.prepare_batch(rollout)
    rows = rollout.observation[:-1].flatten(0, 1)[rollout.index]
    torch.testing.assert_close(batch.observation, model.normalizer(rows))
    # with td_lambda 0 a return is the reward and the discounted value of the next raw observation
    model.td_lambda = 0.0
    model.normalizer.update = lambda *_: None
    batch = model.prepare_batch(rollout)
    value = model(rollout.observation[1:].flatten(0, 1)).amax(1).view_as(rollout.reward)
    expected = (rollout.reward + rollout.discount * value).flatten()[rollout.index]
    torch.testing.assert_close(batch.reward, expected.detach())


@pytest.mark.parametrize("model", [DQN, PQN])
@pytest.mark.integration
def test_far_observations_are_learnt_and_evaluated_as_in_training(model):
    options = {"env_id": "Far-v0", "vectorization": "sync"}
    module, data, trainer = trained(3000, model, normalize_observations=True, data=options)
    before = {name: value.clone() for name, value in module.normalizer.state_dict().items()}
    score = trainer.test(module, data, verbose=False)[0]["test/episode_return"]
    assert score >= 4.5
    played = trainer.predict(module, data)[0]
    assert played["q_values"].argmax(1).tolist() == played["action"].tolist()
    for name, value in module.normalizer.state_dict().items():
        assert torch.equal(value, before[name]), "evaluation updates nothing"


def test_frame_stacks_have_statistics_for_each_entry():
    model, _, _ = trained(20, normalize_observations=True, data={"frame_stack": 3})
    assert model.normalizer.mean.shape == (3, 4)
    # padding of an episode's start makes earlier frames differ
    assert not torch.equal(model.normalizer.variance[0], model.normalizer.variance[2])


@pytest.mark.parametrize("model", [DQN, PQN])
def test_all_paths_of_an_update_give_the_same_weights(model):
    plain, _, _ = trained(100, model, normalize_observations=True, reward_scale=0.5, compile=False)
    watched, _, _ = trained(
        100, model, callbacks=[StepCounter()], normalize_observations=True, reward_scale=0.5, compile=False
    )
    compiled, _, _ = trained(100, model, normalize_observations=True, reward_scale=0.5, compile=True)
    assert_same_weights(plain, watched)
    assert compiled.update_mode == "compiled"
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value"), [("count", -1.0), ("variance", -1e-3), ("variance", float("nan")), ("mean", float("inf"))]
)
def test_statistics_that_no_observations_have_are_rejected(name, value):
    model = DQN(BOX, spaces.Discrete(2), normalize_observations=True)
    state = model.state_dict()
    state[f"normalizer.{name}"] = torch.full_like(state[f"normalizer.{name}"], value)
    with pytest.raises(CheckpointError, match=rf"state_dict\.normalizer\.{name}"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    ("model", "options"),
    [(DQN, {"n_step": 3}), (DQN, {}), (C51, {}), (IQN, {"num_envs": 2}), (PQN, {})],
    ids=["n-step", "DQN", "C51", "IQN", "PQN"],
)
def test_a_reward_scale_learns_as_a_wrapper_that_scales_rewards(model, options):
    options = {"vectorization": "sync", **options}
    scaled, data, _ = trained(80, model, reward_scale=0.25, compile=False, data=options)
    wrap = functools.partial(TransformReward, func=lambda reward: reward * 0.25)
    wrapped, wrapped_data, _ = trained(80, model, compile=False, data={**options, "wrappers": [wrap]})
    assert_same_weights(scaled, wrapped)
    # episodes are logged with the rewards of the environment
    assert [0.25 * total for total in data.episodes.returns] == wrapped_data.episodes.returns
    plain, _, _ = trained(80, model, compile=False, data=options)
    assert not torch.equal(next(plain.policy_net.parameters()), next(scaled.policy_net.parameters()))


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_reward_scale_is_a_positive_finite_number(value):
    with pytest.raises(ValueError, match=f"reward_scale={value}"):
        DQN(BOX, spaces.Discrete(2), reward_scale=value)


class OwnNormalizer(NormalizeObservation):
    """A subclass."""


REJECTED = [
    ((NormalizeObservation,), "normalize_observations=True"),
    ((OwnNormalizer,), "OwnNormalizer.*normalize_observations=True"),
    ((functools.partial(NormalizeReward, gamma=0.9),), r"reward_scale=\.\.\."),
    ((NormalizeObservation, lambda env: TransformReward(env, float)), "normalize_observations=True"),
]


@pytest.mark.parametrize(("wrappers", "remedy"), REJECTED, ids=["observation", "subclass", "reward", "inner"])
def test_wrappers_with_running_statistics_are_rejected(wrappers, remedy):
    for make in (
        lambda: make_env(EnvSettings("CartPole-v1", wrappers=wrappers)),
        lambda: make_vector_env(EnvSettings("CartPole-v1", wrappers=wrappers), 2, "sync"),
        lambda: DQNDataModule(wrappers=list(wrappers)),
    ):
        with pytest.raises(ValueError, match=f"^wrappers: .*{remedy}"):
            make()


def test_wrappers_of_a_registered_environment_are_rejected_too():
    spec = NormalizeReward.wrapper_spec(gamma=0.9, epsilon=1e-8)
    gym.register("FarWrapped-v0", Far, additional_wrappers=(spec,))
    gym.register("FarInside-v0", lambda: NormalizeObservation(Far()))
    try:
        with pytest.raises(ValueError, match=r"wrappers: FarWrapped-v0 .*reward_scale=\.\.\."):
            DQNDataModule(env_id="FarWrapped-v0")
        with pytest.raises(ValueError, match=r"wrappers: FarInside-v0 .*normalize_observations=True"):
            DQNDataModule(env_id="FarInside-v0")
    finally:
        del gym.registry["FarWrapped-v0"], gym.registry["FarInside-v0"]


@pytest.mark.ranks
def test_ranks_keep_the_same_statistics_of_what_all_of_them_draw(tmp_path):
    job = {"num_envs": 2, "updates_per_iteration": 2, "epoch_env_steps": 600, "eval_episodes": 2, **NORMALIZED}
    rollouts = {"model": "PQN", "steps_per_iteration": 10, "batch_size": 10, "updates_per_iteration": 4}
    jobs = [{"name": "DQN", **job}, {"name": "compiled", **job, "compile": True}, {"name": "PQN", **job, **rollouts}]
    both = run(tmp_path, "fits", jobs=jobs)
    for one, other in zip(*both, strict=True):
        assert one["digests"] == other["digests"]
        for name, value in one["normalizer"].items():
            assert torch.equal(value, other["normalizer"][name]), name
        assert one["compiled"] == (one is both[0][1])
    # of each update 16 rows of either rank
    assert both[0][0]["normalizer"]["count"].item() == 2 * 16 * both[0][0]["updates"][-1]
    # of 30 iterations, all steps of either rank, those that only reset an environment included
    assert both[0][2]["normalizer"]["count"].item() >= 1200
