"""Every learner with every switch: short fits that learn, explore as they say, and come back from their checkpoint."""

import itertools
import math

import chain
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import quiet_trainer
from gymnasium import spaces
from runs import small_mlp
from test_module import Batches, batch_of, linear_dqn
from test_update import StepCounter, trained

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
from lightning_dqn.callbacks import UpdateCallback
from lightning_dqn.losses import TDLoss
from lightning_dqn.resume.serializable import check_serializable

MODELS = {
    "dqn": (DQN, {}),
    "c51": (C51, {"num_atoms": 11, "v_min": -1.0, "v_max": 2.0}),
    "qrdqn": (QRDQN, {"num_quantiles": 4}),
    "iqn": (IQN, {"num_quantiles": 4, "num_target_quantiles": 4, "num_policy_quantiles": 4, "num_cosines": 8}),
}


def network(**switches):
    """Makes small networks of this form."""
    return lambda space, outputs: MLP(space, outputs, hidden_sizes=[16, 16], **switches)


def halving(optimizer):
    """A schedule that halves the rate every 10 updates."""
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5)


# what is given to the learner, to the data side, and to the target's callback
SWITCHES = {
    "nothing": ({}, {}, {}),
    "double": ({"double": True}, {}, {}),
    "munchausen": ({"munchausen": True}, {}, {}),
    "dueling": ({"network": network(dueling=True)}, {}, {}),
    "noisy": ({"network": network(noisy=True)}, {}, {}),
    "layer-norm": ({"network": network(layer_norm=True)}, {}, {}),
    "all-networks": ({"network": network(layer_norm=True, noisy=True, dueling=True), "double": True}, {}, {}),
    "three-step": ({}, {"n_step": 3}, {}),
    "boltzmann": ({"boltzmann_temperature": 0.5}, {}, {}),
    "mse": ({"loss": "mse"}, {}, {}),
    "schedule": ({"lr_scheduler": halving}, {}, {}),
    "clipped-norm": ({"clip_grad_norm": 0.5}, {}, {}),
    "hard-by-env-steps": ({}, {}, {"tau": 1.0, "every_n_env_steps": 40}),
    "four-at-once": ({}, {"num_envs": 4, "updates_per_iteration": 4}, {}),
    "numbered": ({}, {"env_id": "NumberedChain-v0"}, {}),
    "prioritised": ({}, {"sampler": PrioritizedSampler}, {}),
    "masked": ({}, {"env_id": "MaskedChain-v0", "action_masks": True}, {}),
}
# C51 has neither
INVALID = {("c51", "munchausen"), ("c51", "mse"), ("qrdqn", "mse"), ("iqn", "mse")}
# of the other learners these alone are quick enough to be tried before every commit
QUICK = {"nothing", "double", "munchausen", "all-networks"}
PAIRS = [(model, switch) for model in MODELS for switch in SWITCHES if (model, switch) not in INVALID]


class Recorder(pl.Callback):
    """Notes losses, and epsilon at the time of every one."""

    def __init__(self):
        self.losses, self.epsilons = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if outputs:
            assert set(outputs) == set(TDLoss._fields)
            self.losses += outputs["loss"].tolist()
            self.epsilons.append(pl_module.epsilon.item())
            assert all(part.isfinite().all() for part in outputs.values())


def options_of(model, *switches):
    """What is given to the learner, to the data side, and to the target's callback."""
    learner, side, target = ({}, {}, {})
    for switch in switches:
        for whole, part in zip((learner, side, target), SWITCHES[switch], strict=True):
            whole.update(part)
    return {"network": network(), "compile": False, **MODELS[model][1], **learner}, side, target


def make(model, *switches):
    """A learner and its data side."""
    learner, side, _ = options_of(model, *switches)
    pl.seed_everything(0, verbose=False)
    sizes = {"warmup_env_steps": 40, "batch_size": 16, "memory_capacity": 500, "epoch_env_steps": 120}
    data = DQNDataModule(**{"env_id": "Chain-v0", "gamma": chain.GAMMA, "eval_episodes": 2, **sizes, **side})
    return MODELS[model][0](data.observation_space, data.action_space, **learner), data


@pytest.mark.parametrize(
    ("model", "switch"),
    [
        pytest.param(
            model,
            switch,
            id=f"{model}-{switch}",
            marks=[pytest.mark.learning] * (model != "dqn" and switch not in QUICK),
        )
        for model, switch in PAIRS
    ],
)
def test_a_short_fit_learns_explores_and_comes_back_from_its_checkpoint(tmp_path, model, switch):
    look_at_a_short_fit(tmp_path, model, switch)


def pairs_of_switches():
    """Every two switches that say something together, each with one of the models, in turn."""
    models = itertools.cycle(MODELS)
    for one, other in itertools.combinations([name for name in SWITCHES if name != "nothing"], 2):
        # two networks, or two environments, are one too many
        given_twice = any(a.keys() & b.keys() for a, b in zip(SWITCHES[one], SWITCHES[other], strict=True))
        given = {name for switch in (one, other) for part in SWITCHES[switch] for name in part}
        # soft values pick no action, and the bonus belongs to one step
        if given_twice or {"munchausen", "double"} <= given or {"munchausen", "n_step"} <= given:
            continue
        yield next(model for model in models if not {(model, one), (model, other)} & INVALID), one, other


@pytest.mark.learning
@pytest.mark.parametrize(
    ("model", "one", "other"), [pytest.param(*each, id="-".join(each)) for each in pairs_of_switches()]
)
def test_any_two_switches_that_make_sense_work_together(tmp_path, model, one, other):
    look_at_a_short_fit(tmp_path, model, one, other)


def look_at_a_short_fit(tmp_path, model, *switches):
    """What must hold behind a fit of 120 env steps."""
    learner, data = make(model, *switches)
    start = {name: p.clone() for name, p in learner.named_parameters()}
    look, decay = Recorder(), EpsilonDecay()
    given, _, target = options_of(model, *switches)
    callbacks = [SoftTargetUpdate(**target), decay, PriorityUpdate(), look]
    # an episode that goes to and fro ends at last
    data.eval_max_steps = 50
    trainer = quiet_trainer(callbacks=callbacks)
    trainer.fit(learner, data)
    assert len(look.losses) == trainer.global_step > 70
    for name, p in learner.named_parameters():
        assert not torch.equal(p, start[name]), name
    by_itself = bool({"noisy", "all-networks", "boltzmann"} & set(switches))
    assert learner.epsilon.item() == pytest.approx(0.0 if by_itself else decay.epsilon_at(data.env_steps), abs=1e-7)
    assert (max(look.epsilons) == 0) is by_itself
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = MODELS[model][0].load_from_checkpoint(
        tmp_path / "a.ckpt", observation_space=data.observation_space, action_space=data.action_space, **given
    )
    states = torch.arange(chain.STATES) if "numbered" in switches else torch.eye(chain.STATES)
    for net in (learner.eval(), fresh.eval()):
        assert net(states).shape == (chain.STATES, 2)
    assert torch.equal(fresh(states), learner(states))
    assert fresh.act(states.numpy()).tolist() == learner(states).argmax(1).tolist()


def test_a_noisy_network_explores_with_a_generator_and_is_silent_without_one():
    torch.manual_seed(0)
    learner = DQN(spaces.Box(-1, 1, (2,)), spaces.Discrete(4), network=network(noisy=True, dueling=True))
    learner.set_epsilon(0.0)
    observation = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    learner.train()
    explored = {tuple(learner.act(observation, np.random.default_rng(0))) for _ in range(30)}
    silent = {tuple(learner.act(observation)) for _ in range(30)}
    assert len(explored) > 5
    assert len(silent) == 1
    assert learner.policy_net.training, "as it was"
    assert all(layer.training for layer in learner.policy_net.modules())
    # evaluation is silent whoever asks
    learner.eval()
    assert {tuple(learner.act(observation, np.random.default_rng(0))) for _ in range(30)} == silent
    assert not learner.policy_net.training


def test_boltzmann_chances_go_with_the_exponentials_of_the_values():
    # values 1, 0, -1 at temperature .5: weights e^2, 1, e^-2
    learner = linear_dqn([[1.0], [0.0], [-1.0]], spaces.Discrete(3, start=4), boltzmann_temperature=0.5)
    learner.set_epsilon(0.0)
    counts = np.bincount(learner.act(np.ones((20_000, 1), np.float32), np.random.default_rng(0)) - 4, minlength=3)
    weights = np.exp([2.0, 0.0, -2.0])
    expected = 20_000 * weights / weights.sum()
    # chi-square with 2 degrees of freedom: 13.8 is passed once in a thousand
    assert ((counts - expected) ** 2 / expected).sum() < 13.8
    assert (learner.act(np.ones((50, 1), np.float32)) == 4).all(), "without a generator it is greedy"


def rate_of(trainer):
    """What the next update will go by."""
    return trainer.optimizers[0].param_groups[0]["lr"]


class Rates(UpdateCallback):
    """Notes the rate after each update."""

    def __init__(self):
        self.seen = []

    def on_update_end(self, trainer, module):
        self.seen.append(rate_of(module.trainer))


def linear_schedule(optimizer):
    """From half of the rate to all of it in 4 updates."""
    return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=4)


@pytest.mark.parametrize(
    ("path", "kind"),
    [("plain", "fast"), ("watched", "plain"), pytest.param("compiled", "compiled", marks=pytest.mark.learning)],
)
def test_the_rate_goes_a_step_an_update_whatever_makes_the_update(path, kind, recwarn):
    rates = Rates()
    learner, _ = trained(
        8,
        callbacks=[rates, *[StepCounter()] * (path == "watched")],
        compile=path == "compiled",
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lr_scheduler=linear_schedule,
    )
    assert learner.update_mode == kind
    # .1 times .5, .625, .75, .875, 1: after the first update the second stands, and from the fourth on all of it
    assert rates.seen == pytest.approx([0.0625, 0.075, 0.0875, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert [str(w.message) for w in recwarn if "scheduler" in str(w.message)] == []


@pytest.mark.parametrize("path", ["plain", "watched"])
def test_each_update_goes_by_the_rate_of_its_own_time(path):
    learner = linear_dqn(
        [[0.0, 0.0], [0.0, 0.0]],
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lr_scheduler=linear_schedule,
        compile=False,
    )
    callbacks = [SoftTargetUpdate(tau=1e-9), EpsilonDecay(), *[StepCounter()] * (path == "watched")]
    trainer = quiet_trainer(callbacks=callbacks, max_steps=2)
    trainer.fit(learner, datamodule=Batches([batch_of(2)]))
    # row 2 has terminated with reward 2: Huber's slope is 1, half of it in the mean of the rows, at weight and bias:
    # .1 * .5 * .5 = .025 with each, then .1 * .625 * .5 = .03125
    assert learner.policy_net.output.weight[1, 1].item() == pytest.approx(0.05625)
    assert learner.policy_net.output.bias[1].item() == pytest.approx(0.05625)


@pytest.mark.parametrize(
    "make_scheduler",
    [
        linear_schedule,
        halving,
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100),
        lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 8, 12]),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=200),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 1 / (1 + count)),
        lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer, [linear_schedule(optimizer), halving(optimizer)], milestones=[10]
        ),
    ],
    ids=["linear", "step", "cosine", "multi-step", "one-cycle", "lambda", "sequential"],
)
def test_the_state_of_a_schedule_goes_through_a_checkpoint(tmp_path, make_scheduler):
    def run(folder, batches, ckpt_path=None):
        rates = Rates()
        learner = linear_dqn([[0.5, 1.0], [2.0, 1.0]], lr_scheduler=make_scheduler, compile=False)
        trainer = quiet_trainer(callbacks=[SoftTargetUpdate(), EpsilonDecay(), rates], max_epochs=2 if ckpt_path else 1)
        trainer.fit(learner, datamodule=Batches([batch_of(1)] * batches), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / folder)
        content = torch.load(tmp_path / folder, weights_only=True)
        assert content["lr_schedulers"][0]["last_epoch"] == trainer.global_step
        check_serializable(content)
        return rates.seen

    whole = run("whole", 30)
    half = run("half", 15)
    assert half + run("rest", 15, tmp_path / "half") == whole
    assert len(set(whole)) > 2


def test_a_schedule_that_waits_for_a_metric_is_rejected():
    with pytest.raises(ValueError, match="ReduceLROnPlateau: waits for a metric"):
        linear_dqn([[0.5, 1.0], [2.0, 1.0]], lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)


def test_a_schedule_that_cannot_be_made_is_rejected_at_once():
    with pytest.raises(ValueError, match=r"lr_scheduler: .*step_size"):
        linear_dqn([[0.5, 1.0], [2.0, 1.0]], lr_scheduler=torch.optim.lr_scheduler.StepLR)


class Gradients(UpdateCallback):
    """Notes the gradient that each update was made with."""

    def __init__(self):
        self.seen = []

    def on_update_end(self, trainer, module):
        parameters = module.trainer.optimizers[0].param_groups[0]["params"]
        self.seen.append(torch.cat([p.grad.flatten() for p in parameters]))


@pytest.mark.parametrize("path", ["plain", "watched", pytest.param("compiled", marks=pytest.mark.learning)])
@pytest.mark.parametrize(("value", "norm"), [(0.3, 0.4), (None, 0.4), (0.3, None), (0.3, 1e6)])
def test_gradients_are_limited_by_value_and_then_by_norm_as_torch_does_it(path, value, norm):
    def gradients(**limits):
        learner = linear_dqn(
            [[0.5, 1.0], [2.0, 1.0]],
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-9),
            compile=path == "compiled",
            **limits,
        )
        seen = Gradients()
        watchers = [StepCounter()] * (path == "watched")
        trainer = quiet_trainer(callbacks=[SoftTargetUpdate(), EpsilonDecay(), seen, *watchers])
        # the errors of the two rows have different signs
        batch = batch_of(3)._replace(reward=torch.tensor([1.0, -8.0]).expand(3, 2))
        trainer.fit(learner, datamodule=Batches([batch]))
        return seen.seen

    free = gradients(clip_grad_value=None)
    # +-.5 at the weight and the bias of each row's action: norm sqrt(4 * .25) = 1
    assert free[0].tolist() == pytest.approx([-0.5, 0, 0, 0.5, -0.5, 0.5])
    expected = []
    for gradient in free:
        vector = torch.nn.Parameter(torch.zeros(6))
        vector.grad = gradient.clone()
        if value is not None:
            torch.nn.utils.clip_grad_value_([vector], value)
        if norm is not None:
            torch.nn.utils.clip_grad_norm_([vector], norm)
        expected.append(vector.grad)
    torch.testing.assert_close(gradients(clip_grad_value=value, clip_grad_norm=norm), expected, rtol=1e-6, atol=1e-8)
    if value is not None and norm == 0.4:
        # cut to .3, the norm of the 4 is .6, which is made .4: .2 each; the other way round they would be .2 as well
        # only if nothing were cut
        assert expected[0].tolist() == pytest.approx([-0.2, 0, 0, 0.2, -0.2, 0.2], abs=1e-6)


def test_the_value_is_cut_before_the_norm_is_taken():
    learner = linear_dqn(
        [[0.0, 0.0], [0.0, 0.0]],
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        loss="mse",
        clip_grad_value=3.0,
        clip_grad_norm=1.0,
        compile=False,
    )
    batch = batch_of(1)._replace(reward=torch.tensor([[2.0, 8.0]]), discount=torch.zeros(1, 2))
    quiet_trainer().fit(learner, datamodule=Batches([batch]))
    # slopes 2 / 2 = 1 and 8 / 2 = 4, the second cut to 3, each at a weight and a bias: norm sqrt(2 + 18)
    length = math.sqrt(20)
    assert learner.policy_net.output.bias.tolist() == pytest.approx([1 / length, 3 / length], rel=1e-5)


@pytest.mark.parametrize("num_envs", [1, 4])
def test_a_target_by_env_steps_moves_when_the_clock_has_passed_a_multiple_and_never_between(num_envs):
    class Watch(pl.Callback):
        def __init__(self):
            self.clocks, self.moves, self.before = [80], [], None

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            target, policy = (
                torch.cat([p.detach().flatten() for p in net.parameters()])
                for net in (pl_module.target_net, pl_module.policy_net)
            )
            if self.before is not None and not torch.equal(target, self.before):
                assert torch.equal(target, policy)
                self.moves.append(trainer.datamodule.env_steps)
            self.before = target
            self.clocks.append(trainer.datamodule.env_steps)

    pl.seed_everything(0, verbose=False)
    sizes = {"epoch_env_steps": 300, "warmup_env_steps": 80, "batch_size": 8, "eval_episodes": 1}
    data = DQNDataModule(num_envs=num_envs, iterations_per_chunk=1, **sizes)
    watch, target = Watch(), SoftTargetUpdate(tau=1.0, every_n_env_steps=50)
    trainer = quiet_trainer(callbacks=[target, EpsilonDecay(), watch])
    trainer.fit(DQN(data.observation_space, data.action_space, network=small_mlp, compile=False), data)
    # of the iterations with updates, those in which the clock came to 100, 150, ... or went past
    passed = [now for before, now in itertools.pairwise(watch.clocks) if now // 50 > before // 50 and now > 80]
    assert watch.moves == passed
    assert len(passed) >= 4
    if num_envs == 1:
        assert passed == [100, 150, 200, 250, 300]
    assert target.state_dict() == {"periods": data.env_steps // 50}


def test_a_longer_period_takes_effect_when_a_run_resumes():
    target = SoftTargetUpdate(tau=1.0, every_n_env_steps=1000)
    # 60 periods of 50 have passed
    target.load_state_dict({"periods": 60})
    moved = []

    class Module(DQN):
        def update_target(self, tau):
            moved.append(trainer.datamodule.env_steps)

    class Trainer:
        class datamodule:  # noqa: N801
            env_steps = 3000

    trainer = Trainer()
    learner = Module(spaces.Box(-1, 1, (2,)), spaces.Discrete(2))
    for clock in range(3000, 6000, 100):
        trainer.datamodule.env_steps = clock
        target.on_iteration_end(trainer, learner, None, [])
    assert moved[-3:] == [3000, 4000, 5000]


COMPILED = {
    "iqn": (IQN, {"num_cosines": 16}),
    "c51-rainbow": (C51, {"network": network(noisy=True, dueling=True), "double": True}),
    "qrdqn-munchausen": (QRDQN, {"munchausen": True, "num_quantiles": 10, "clip_grad_norm": 5.0}),
    "dqn-munchausen-mse": (DQN, {"munchausen": True, "loss": "mse", "lr_scheduler": halving}),
    "frozen-lake": (DQN, {}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.learning] * (name != "c51-rainbow")) for name in COMPILED]
)
@pytest.mark.integration
def test_plain_and_compiled_updates_give_the_same_weights_from_the_same_draws(name):
    owner, options = COMPILED[name]
    bias = f"policy_net.{'net.' * (owner is IQN)}hidden.0.bias"
    env_id = "FrozenLake-v1" if name == "frozen-lake" else "CartPole-v1"
    weights = []
    for compile in (False, True):
        pl.seed_everything(0, verbose=False)
        data = DQNDataModule(env_id=env_id, num_envs=4, updates_per_iteration=4, batch_size=32, warmup_env_steps=64)
        learner = owner(
            data.observation_space, data.action_space, **{"network": small_mlp, **options, "compile": compile}
        )
        trainer = quiet_trainer(max_epochs=None, max_steps=60, limit_val_batches=0)
        start = learner.state_dict()[bias].clone()
        trainer.fit(learner, data)
        assert (learner.update_mode == "compiled") is compile
        weights.append(learner.state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-5)
    assert not torch.equal(start, weights[0][bias])
