"""DQN: its policy, its update, and rejected arguments."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import quiet_trainer
from gymnasium import spaces
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_dqn import DQN, MLP, DQNDataModule, EpsilonDecay, SoftTargetUpdate
from lightning_dqn.replay import Transition
from lightning_dqn.resume.content import CheckpointError

BOX = spaces.Box(-1, 1, (2,))


def linear_dqn(weight, action_space=None, **kwargs):
    """A DQN whose Q(s, a) is the dot product of s with row a of `weight`."""
    model = DQN(
        spaces.Box(-1, 1, (len(weight[0]),)),
        action_space or spaces.Discrete(len(weight)),
        network=lambda space, n: MLP(space, n, hidden_sizes=[]),
        **kwargs,
    )
    for net in (model.policy_net, model.target_net):
        with torch.no_grad():
            net.output.weight.copy_(torch.tensor(weight))
            net.output.bias.zero_()
    return model


def batch_of(num_updates):
    """The same two transitions for every update: one within an episode, one terminated."""
    rows = Transition(
        observation=torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        action=torch.tensor([0, 1]),
        reward=torch.tensor([1.0, 2.0]),
        discount=torch.tensor([0.5, 0.0]),
        next_observation=torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
        weight=torch.ones(2),
        index=torch.tensor([0, 1]),
    )
    return Transition(*(part.expand(num_updates, *part.shape) for part in rows))


class Batches(pl.LightningDataModule):
    """Yields given batches, without any environment."""

    env_steps = 0

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.batches, batch_size=None, collate_fn=lambda batch: batch)


def test_both_nets_start_equal_and_only_the_policy_net_has_gradients():
    model = DQN(BOX, spaces.Discrete(2))
    for policy, target in zip(model.policy_net.parameters(), model.target_net.parameters(), strict=True):
        assert torch.equal(policy, target)
        assert policy.requires_grad
        assert not target.requires_grad


def test_greedy_action_is_the_best_one_counted_from_the_start_of_the_space():
    model = linear_dqn([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], spaces.Discrete(3, start=-1))
    observations = np.array([[3, 2], [2, 3], [-1, -1]], np.float32)
    # values (3, 2, -5), (2, 3, -5), (-1, -1, 2): best 0, 1, 2; the space counts from -1
    assert model.act(observations).tolist() == [-1, 0, 1]


def test_exploration_happens_with_chance_epsilon_and_takes_every_action():
    model = linear_dqn([[1.0], [0.0], [0.0], [0.0]])
    model.set_epsilon(0.4)
    actions = model.act(np.ones((20_000, 1), np.float32), np.random.default_rng(0))
    counts = np.bincount(actions, minlength=4) / 20_000
    # greedy .6 and a quarter of .4 each; four standard deviations are about .014
    assert counts == pytest.approx([0.7, 0.1, 0.1, 0.1], abs=0.014)


def test_acting_needs_no_network_while_every_action_is_random():
    model = linear_dqn([[1.0], [0.0]])
    model.set_epsilon(1.0)
    model.policy_net = None
    assert set(model.act(np.ones((50, 1), np.float32), np.random.default_rng(0))) == {0, 1}


def test_one_update_moves_both_nets_as_worked_by_hand():
    model = linear_dqn([[0.5, 1.0], [2.0, 1.0]], optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    trainer = quiet_trainer(callbacks=[SoftTargetUpdate(tau=0.5), EpsilonDecay()])
    trainer.fit(model, datamodule=Batches([batch_of(1)]))
    # row 1: Q = .5, y = 1 + .5 * max(1, 1) = 1.5, error -1;  row 2: Q = 1, y = 2 + 0, error -1
    # Huber gradient -1 / 2 rows, so each touched weight and bias rises by .1 * .5 = .05
    assert model.policy_net.output.weight.flatten().tolist() == pytest.approx([0.55, 1.0, 2.0, 1.05])
    assert model.policy_net.output.bias.tolist() == pytest.approx([0.05, 0.05])
    # the target net went half the way
    assert model.target_net.output.weight.flatten().tolist() == pytest.approx([0.525, 1.0, 2.0, 1.025])


@pytest.mark.parametrize(("reward", "step"), [([1.0, 2.0], 0.02), ([-2.0, -2.0], -0.02)])
def test_gradient_entries_are_clipped_by_value(reward, step):
    model = linear_dqn(
        [[0.5, 1.0], [2.0, 1.0]], optimizer=lambda params: torch.optim.SGD(params, lr=0.1), clip_grad_value=0.2
    )
    quiet_trainer().fit(model, datamodule=Batches([batch_of(1)._replace(reward=torch.tensor([reward]))]))
    # gradients of -.5 (above), or .5 where the values are too high, become -.2 or .2: weights move by .1 * .2
    weight = model.policy_net.output.weight.flatten().tolist()
    assert weight == pytest.approx([0.5 + step, 1.0, 2.0, 1.0 + step])


def test_several_updates_in_one_iteration_equal_as_many_iterations_of_one():
    together, apart = linear_dqn([[0.5, 1.0], [2.0, 1.0]]), linear_dqn([[0.5, 1.0], [2.0, 1.0]])
    trainer = quiet_trainer()
    trainer.fit(together, datamodule=Batches([batch_of(5)]))
    quiet_trainer().fit(apart, datamodule=Batches([batch_of(1)] * 5))
    assert trainer.global_step == 5
    for name, value in together.state_dict().items():
        assert torch.equal(value, apart.state_dict()[name]), name


def test_an_empty_batch_makes_no_update():
    model = linear_dqn([[0.5, 1.0], [2.0, 1.0]])
    before = model.policy_net.output.weight.clone()
    trainer = quiet_trainer()
    trainer.fit(model, datamodule=Batches([batch_of(0)] * 3))
    assert trainer.global_step == 0
    assert torch.equal(model.policy_net.output.weight, before)


def test_double_takes_the_policy_nets_choice():
    targets = {}
    for double in (False, True):
        model = linear_dqn([[0.5, 1.0], [2.0, 0.0]], double=double)
        with torch.no_grad():
            model.target_net.output.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 4.0]]))
        batch = Transition(*(part[0] for part in batch_of(1)))
        result = model.td_loss(batch, model.policy_net, model.target_net)
        targets[double] = (result.q_value - result.td_error).tolist()
    # s' of row 1 is (0, 1): policy (1, 0) picks action 0; target (1, 4): 1 + .5 * 1 or 1 + .5 * 4
    assert targets[True] == pytest.approx([1.5, 2.0])
    assert targets[False] == pytest.approx([3.0, 2.0])


def test_actions_that_are_not_discrete_are_rejected_by_name():
    with pytest.raises(TypeError, match=r"Box\(-2.0, 2.0, \(1,\), float32\)"):
        DQN(BOX, spaces.Box(-2, 2, (1,)))


def test_a_clip_value_that_is_not_positive_is_rejected():
    with pytest.raises(ValueError, match="clip_grad_value=0"):
        DQN(BOX, spaces.Discrete(2), clip_grad_value=0)


@pytest.mark.parametrize("clip_grad_value", [None, 100.0])
def test_any_torch_optimizer_learns(clip_grad_value):
    for optimizer in (torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adam):
        model = linear_dqn(
            [[0.5, 1.0], [2.0, 1.0]],
            optimizer=lambda params, make=optimizer: make(params, lr=0.01),
            clip_grad_value=clip_grad_value,
        )
        quiet_trainer().fit(model, datamodule=Batches([batch_of(1)] * 200))
        # the second row has terminated: Q(s, 1) goes to its reward
        assert model(torch.tensor([[0.0, 1.0]]))[0, 1].item() == pytest.approx(2.0, abs=0.2)


def test_checkpoints_load_as_plain_values_and_give_the_agent_back(tmp_path):
    pl.seed_everything(3)
    data = DQNDataModule(epoch_env_steps=200, eval_episodes=2)
    model = DQN(data.observation_space, data.action_space, network=lambda s, n: MLP(s, n, hidden_sizes=[8]))
    trainer = quiet_trainer()
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["global_step"] == trainer.global_step
    again = DQN.load_from_checkpoint(
        tmp_path / "a.ckpt",
        observation_space=data.observation_space,
        action_space=data.action_space,
        network=lambda s, n: MLP(s, n, hidden_sizes=[8]),
    )
    observations = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    assert again.act(observations).tolist() == model.act(observations).tolist()
    assert again.epsilon.item() == pytest.approx(EpsilonDecay().epsilon_at(200))


@pytest.mark.parametrize(
    ("space", "hidden_sizes", "words"),
    [
        (spaces.Box(-1, 1, (3,)), [8], "observation_space"),
        (BOX, [9], r"has shape \(8, 2\), not \(9, 2\).*hidden_sizes=\[9\] here"),
    ],
)
def test_a_checkpoint_of_another_task_or_network_is_rejected_with_both(tmp_path, space, hidden_sizes, words):
    trainer = quiet_trainer()
    trainer.strategy.connect(DQN(BOX, spaces.Discrete(2), network=lambda s, n: MLP(s, n, hidden_sizes=[8])))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises((MisconfigurationException, CheckpointError), match=words):
        DQN.load_from_checkpoint(
            tmp_path / "a.ckpt",
            observation_space=space,
            action_space=spaces.Discrete(2),
            network=lambda s, n: MLP(s, n, hidden_sizes=hidden_sizes),
        )


def test_two_runs_with_one_seed_give_the_same_losses_bitwise():
    class Losses(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if outputs:
                self.seen += outputs["loss"].tolist()

    runs = []
    for seed in (5, 5, 6):
        pl.seed_everything(seed)
        data = DQNDataModule(num_envs=2, updates_per_iteration=2, epoch_env_steps=400, eval_episodes=2)
        losses = Losses()
        quiet_trainer(callbacks=[SoftTargetUpdate(), EpsilonDecay(), losses]).fit(
            DQN(data.observation_space, data.action_space), data
        )
        runs.append(losses.seen)
    assert len(runs[0]) > 100
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
