"""Epsilon and target net over time."""

import math

import lightning.pytorch as pl
import pytest
import torch
from conftest import quiet_trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_dqn import DQN, DQNDataModule, EpsilonDecay, PrioritizedSampler, PriorityUpdate, SoftTargetUpdate
from lightning_dqn.callbacks import EpsilonSchedule, UpdateCallback


def test_exponential_epsilon_at_start_middle_and_end():
    decay = EpsilonDecay(start=0.9, end=0.05, decay_env_steps=1000)
    assert decay.epsilon_at(0) == pytest.approx(0.9)
    assert decay.epsilon_at(1000) == pytest.approx(0.05 + 0.85 / math.e)
    assert decay.epsilon_at(10**6) == pytest.approx(0.05)


def test_linear_epsilon_at_start_middle_and_end():
    decay = EpsilonDecay(start=1.0, end=0.1, decay_env_steps=100, schedule="linear")
    assert [decay.epsilon_at(t) for t in (0, 50, 100, 1000)] == pytest.approx([1.0, 0.55, 0.1, 0.1])


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (EpsilonDecay, {"start": 1.1}, "start=1.1"),
        (EpsilonDecay, {"end": -0.1}, "end=-0.1"),
        (EpsilonDecay, {"decay_env_steps": 0}, "decay_env_steps=0"),
        (EpsilonDecay, {"schedule": "cosine"}, "schedule=cosine"),
        (PriorityUpdate, {"beta_start": 1.1}, "beta_start=1.1"),
        (PriorityUpdate, {"beta_end": -0.1}, "beta_end=-0.1"),
        (PriorityUpdate, {"anneal_env_steps": 0}, "anneal_env_steps=0"),
        (SoftTargetUpdate, {"tau": 0.0}, "tau=0.0"),
        (SoftTargetUpdate, {"tau": 1.5}, "tau=1.5"),
        (SoftTargetUpdate, {"every_n_updates": 0}, "every_n_updates=0"),
        (SoftTargetUpdate, {"every_n_env_steps": 0}, "every_n_env_steps=0: must be at least 1, or None"),
        (SoftTargetUpdate, {"every_n_env_steps": 5, "every_n_updates": 2}, "every_n_updates=2, every_n_env_steps=5"),
    ],
)
def test_options_out_of_range_are_rejected_by_name_and_value(cls, options, words):
    with pytest.raises(ValueError, match=words):
        cls(**options)


class Watch(pl.Callback):
    """Notes what each env step was played with, and how the nets stood after each iteration."""

    def __init__(self):
        self.played = []
        self.distances = []

    def on_train_start(self, trainer, pl_module):
        def noted(*inputs):
            self.played.append((trainer.datamodule.env_steps, pl_module.epsilon.item()))
            return pl_module.policy(*inputs)

        trainer.datamodule.train_dataset.collector.policy = noted

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        gap = sum(
            (p - t).abs().sum().item()
            for p, t in zip(pl_module.policy_net.parameters(), pl_module.target_net.parameters(), strict=True)
        )
        self.distances.append((trainer.global_step, gap))


def watched_run(*callbacks, **options):
    pl.seed_everything(0)
    sizes = {"epoch_env_steps": 300, "warmup_env_steps": 100, "eval_episodes": 1, "iterations_per_chunk": 1}
    data = DQNDataModule(**sizes, **options)
    watch = Watch()
    trainer = quiet_trainer(callbacks=[*callbacks, watch])
    trainer.fit(DQN(data.observation_space, data.action_space), data)
    return watch


def test_every_env_step_is_played_with_the_epsilon_of_its_own_time():
    decay = EpsilonDecay(decay_env_steps=200)
    played = watched_run(decay, SoftTargetUpdate()).played
    assert [epsilon for _, epsilon in played] == pytest.approx([decay.epsilon_at(t) for t, _ in played])
    assert played[0] == (0, pytest.approx(0.9))


def test_vector_environments_share_the_clock_of_epsilon():
    decay = EpsilonDecay(decay_env_steps=200)
    played = watched_run(decay, SoftTargetUpdate(), num_envs=4).played
    # an iteration that makes up for resets plays twice with the epsilon of its start, at most 4 env steps ago
    assert all(decay.epsilon_at(t) - 1e-6 <= epsilon <= decay.epsilon_at(t - 4) + 1e-6 for t, epsilon in played)
    assert [t for t, _ in played[:3]] == [0, 4, 8]


def test_a_hard_update_copies_every_k_updates_and_never_between():
    watch = watched_run(EpsilonDecay(), SoftTargetUpdate(tau=1.0, every_n_updates=10))
    after_first = [(updates, gap) for updates, gap in watch.distances if updates > 0]
    assert [gap == 0 for _, gap in after_first] == [updates % 10 == 0 for updates, _ in after_first]


def test_target_net_moves_tau_of_the_way_after_each_update():
    class Reference(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.mean = [p.detach().clone() for p in pl_module.policy_net.parameters()]

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if outputs:
                for mean, p in zip(self.mean, pl_module.policy_net.parameters(), strict=True):
                    mean.copy_(0.9 * mean + 0.1 * p.detach())
            self.target = [p.detach().clone() for p in pl_module.target_net.parameters()]

    reference = Reference()
    watched_run(EpsilonDecay(), SoftTargetUpdate(tau=0.1), reference)
    for target, mean in zip(reference.target, reference.mean, strict=True):
        torch.testing.assert_close(target, mean, atol=1e-6, rtol=1e-5)


class HalfEpsilon(EpsilonSchedule):
    """A schedule of one's own."""

    def epsilon_at(self, env_steps):
        return 0.5


class CountedUpdates(UpdateCallback):
    """Counts updates, and leaves the target net alone."""

    def __init__(self):
        self.count = 0

    def on_update_end(self, trainer, pl_module):
        self.count += 1


def fitted(*callbacks, **data_options):
    """The trainer of 4 updates on CartPole, and its module."""
    data = DQNDataModule(warmup_env_steps=8, batch_size=8, **data_options)
    model = DQN(data.observation_space, data.action_space, compile=False)
    trainer = quiet_trainer(callbacks=list(callbacks), max_epochs=None, max_steps=4, limit_val_batches=0)
    trainer.fit(model, data)
    return trainer, model


def test_a_trainer_without_callbacks_gets_the_target_update_and_the_epsilon_schedule():
    trainer, model = fitted()
    assert [type(each) for each in trainer.callbacks] == [SoftTargetUpdate, EpsilonDecay]
    assert model.epsilon.item() == pytest.approx(EpsilonDecay().epsilon_at(trainer.datamodule.env_steps))


def test_a_prioritized_sampler_gets_a_priority_update():
    trainer, _ = fitted(sampler=PrioritizedSampler)
    assert PriorityUpdate in [type(each) for each in trainer.callbacks]
    assert trainer.datamodule.train_dataset.memory.sampler.beta == pytest.approx(0.4, abs=0.01)


def test_given_callbacks_are_kept_and_only_what_is_missing_is_added():
    target, counter = SoftTargetUpdate(tau=1.0), CountedUpdates()
    trainer, model = fitted(target, HalfEpsilon(), counter)
    assert [type(each) for each in trainer.callbacks] == [SoftTargetUpdate, HalfEpsilon, CountedUpdates]
    assert trainer.callbacks[0] is target
    assert (model.epsilon.item(), counter.count) == (0.5, 4)


def test_a_callback_of_updates_alone_does_not_replace_the_target_update():
    trainer, _ = fitted(CountedUpdates(), HalfEpsilon())
    assert [type(each) for each in trainer.callbacks] == [SoftTargetUpdate, CountedUpdates, HalfEpsilon]


def test_two_epsilon_schedules_are_an_error_that_names_both():
    with pytest.raises(MisconfigurationException, match=r"EpsilonDecay.*HalfEpsilon"):
        fitted(EpsilonDecay(), HalfEpsilon())
