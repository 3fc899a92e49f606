"""A second `trainer.fit(model, data)`: it continues where the first one ended, or says that it starts over."""

import lightning.pytorch as pl
import pytest
import torch
from conftest import quiet_trainer

from lightning_dqn import DQN, PQN, DQNDataModule, EpsilonDecay, PrioritizedSampler, PriorityUpdate, SoftTargetUpdate

SMALL = {"epoch_env_steps": 300, "eval_episodes": 2, "warmup_env_steps": 50, "batch_size": 16, "memory_capacity": 1000}
SMALL["iterations_per_chunk"] = 1


class Seen(pl.Callback):
    """What holds after each iteration: env steps, transitions, epsilon."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        data = trainer.datamodule
        memory = data.train_dataset.memory or ()
        self.seen.append((data.env_steps, len(memory), float(pl_module.epsilon)))


def make(model=DQN, **options):
    """A module, its data and a callback that watches."""
    pl.seed_everything(0, verbose=False)
    data = DQNDataModule(**{**SMALL, **options})
    return model(data.observation_space, data.action_space, compile=False), data, Seen()


def schedules():
    """Of the exploration and of the target net."""
    return [EpsilonDecay(start=1.0, end=0.0, decay_env_steps=300, schedule="linear"), SoftTargetUpdate()]


def trainer_of(seen, **options):
    """A quiet trainer with the schedules."""
    return quiet_trainer(callbacks=[*schedules(), PriorityUpdate(), seen], **options)


@pytest.mark.parametrize("vectorization", ["auto", "async", "vector_entry_point"])
def test_the_same_trainer_continues_clock_memory_and_epsilon(messages, vectorization):
    module, data, seen = make(vectorization=vectorization, num_envs=1 if vectorization == "auto" else 2)
    trainer = trainer_of(seen)
    trainer.fit(module, data)
    env_steps, transitions, epsilon = seen.seen[-1]
    # to within a step that only resets
    assert 300 - data.num_envs < env_steps <= 300
    assert epsilon == pytest.approx(0.0, abs=0.01)
    updates = trainer.global_step
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data)
    first_again = seen.seen[len(seen.seen) // 2]
    assert env_steps < first_again[0] <= env_steps + data.num_envs
    assert first_again[1] > transitions - data.num_envs
    assert first_again[2] <= epsilon
    assert 600 - data.num_envs < seen.seen[-1][0] == data.env_steps <= 600
    assert trainer.global_step > updates
    (line,) = [line for line in messages if f"continues the last one at {env_steps} env steps" in line]
    assert "optimizer is new" in line


def test_another_trainer_continues_too_and_prioritised_replay_with_it():
    module, data, seen = make(sampler=PrioritizedSampler)
    trainer_of(seen).fit(module, data)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    trainer_of(seen).fit(module, data)
    assert seen.seen[-1][0] == 600
    assert not torch.equal(weights["policy_net.output.weight"], module.state_dict()["policy_net.output.weight"])


def test_an_episode_under_way_continues_with_its_next_step():
    module, data, seen = make()
    trainer_of(seen).fit(module, data)
    lengths, under_way = list(data.episodes.lengths), int(data.train_dataset.collector._lengths[0])
    assert sum(lengths) + under_way == 300
    trainer_of(seen).fit(module, data)
    # nothing was cut: each env step belongs to an episode that ended, or to the last one
    assert sum(data.episodes.lengths) + int(data.train_dataset.collector._lengths[0]) == 600
    assert data.episodes.lengths[: len(lengths)] == lengths


def test_rollouts_continue_too():
    module, data, seen = make(PQN, num_envs=2, steps_per_iteration=25, batch_size=10)
    trainer_of(seen).fit(module, data)
    trainer_of(seen).fit(module, data)
    assert data.env_steps == 600


def test_a_fit_that_was_interrupted_continues_with_new_episodes():
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.datamodule.env_steps == 100:
                raise RuntimeError("stopped here")

    module, data, seen = make()
    with pytest.raises(RuntimeError, match="stopped here"):
        trainer_of(Interrupt()).fit(module, data)
    transitions = len(data.train_dataset.memory)
    trainer_of(seen).fit(module, data)
    assert seen.seen[0][0] == 101
    assert seen.seen[0][1] >= transitions


def test_another_module_starts_over(messages):
    module, data, seen = make()
    trainer_of(seen).fit(module, data)
    other = DQN(data.observation_space, data.action_space, compile=False)
    trainer_of(seen).fit(other, data)
    assert seen.seen[300][0] == 1
    assert not [line for line in messages if "continues the last one" in line]


def test_a_second_fit_that_has_nothing_to_do_leaves_the_clock_as_it_is():
    module, data, seen = make()
    trainer = trainer_of(seen)
    trainer.fit(module, data)
    trainer.fit(module, data)
    assert (data.env_steps, len(seen.seen)) == (300, 300)
