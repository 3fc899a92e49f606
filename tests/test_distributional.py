"""C51, QR-DQN and IQN: what one update minimises, on two rows worked by hand, and the arguments they reject.

The networks are linear and the observations one-hot, so that row i of a weight is what action i (or its atom) is worth.
"""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_networks import fill

from lightning_dqn import C51, DQN, IQN, MLP, QRDQN
from lightning_dqn.replay import Transition

BOX = spaces.Box(0, 1, (2,))
STATES = np.eye(2, dtype=np.float32)


def linear(space, outputs):
    """A matrix."""
    return MLP(space, outputs, hidden_sizes=[])


def two_rows(*, action_start=0, weight=(1.0, 1.0)):
    """In state 0 action 0 pays 1 and leads to state 1, half of whose value counts; in state 1 action 1 pays 2 and ends
    the episode."""
    return Transition(
        observation=torch.eye(2),
        action=torch.tensor([0, 1]) + action_start,
        reward=torch.tensor([1.0, 2.0]),
        discount=torch.tensor([0.5, 0.0]),
        next_observation=torch.eye(2).flip(0),
        weight=torch.tensor(weight),
        index=torch.tensor([0, 1]),
    )


def loss_of(model, batch):
    """What an update minimises, for the two nets of a model."""
    return model.td_loss(batch, model.policy_net, model.target_net)


def logits(*rows):
    """Weights of the chances of 3 atoms, action after action, one row a state; as columns of a linear network."""
    return torch.tensor(rows).log().T.tolist()


def make_c51(policy, target, *, start=0, **options):
    """C51 with the atoms 0, 1, 2 and 2 actions, of given chances."""
    space = spaces.Discrete(2, start=start)
    model = C51(BOX, space, network=linear, num_atoms=3, v_min=0.0, v_max=2.0, **options)
    fill(model.policy_net.output, logits(*policy))
    fill(model.target_net.output, logits(*target))
    return model


# chances of the atoms 0, 1, 2 for action 0 and then for action 1, in state 0 and in state 1
C51_POLICY = [
    [0.25, 0.25, 0.5, 0.2, 0.6, 0.2],  # means 1.25 and 1
    [0.1, 0.1, 0.8, 0.5, 0.25, 0.25],  # means 1.7 and .75
]
C51_TARGET = [
    [0.1, 0.2, 0.7, 0.1, 0.2, 0.7],
    [0.4, 0.4, 0.2, 0.2, 0.2, 0.6],  # means .8 and 1.4
]


def test_c51_acts_by_the_means_of_its_distributions():
    model = make_c51(C51_POLICY, C51_TARGET)
    assert model(torch.eye(2)).flatten().tolist() == pytest.approx([1.25, 1.0, 1.7, 0.75])
    assert model.act(STATES).tolist() == [0, 0]
    assert model.action_values(model.target_net, torch.eye(2)[1:]).tolist()[0] == pytest.approx([0.8, 1.4])


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize(("double", "projected"), [(False, [0.0, 0.3, 0.7]), (True, [0.0, 0.6, 0.4])])
def test_c51_loss_is_the_cross_entropy_to_the_projected_target(double, projected, start):
    model = make_c51(C51_POLICY, C51_TARGET, double=double, start=start)
    result = loss_of(model, two_rows(action_start=start, weight=(1.0, 0.1)))
    # row 1: atoms 1 + .5 (0, 1, 2) = 1, 1.5, 2. The target net's best action in state 1 is 1, with chances .2, .2, .6:
    # m = (0, .2 + .1, .1 + .6); the policy net's is 0, with .4, .4, .2: m = (0, .4 + .2, .2 + .2)
    # row 2: all at 2: m = (0, 0, 1)
    rows = [-projected[1] * math.log(0.25) - projected[2] * math.log(0.5), -math.log(0.25)]
    assert result.loss.item() == pytest.approx((rows[0] + 0.1 * rows[1]) / 2, rel=1e-5)
    # means of what was chosen, 1.25 and .75, less those of m, m_1 + 2 m_2 and 2
    assert result.q_value.tolist() == pytest.approx([1.25, 0.75])
    assert result.td_error.tolist() == pytest.approx([1.25 - projected[1] - 2 * projected[2], -1.25])
    # divergence: without the entropy of m, which is 0 in row 2; no weight
    entropy = -sum(m * math.log(m) for m in projected if m)
    assert result.priority.tolist() == pytest.approx([rows[0] - entropy, rows[1]], rel=1e-5)


def test_c51_gradient_is_the_difference_of_the_distributions():
    model = make_c51(C51_POLICY, C51_TARGET)
    loss_of(model, two_rows()).loss.backward()
    gradient = model.policy_net.output.weight.grad.T
    # d/d logits of -sum m ln p is p - m, over 2 rows; other actions get none
    assert gradient[0].tolist() == pytest.approx([0.125, (0.25 - 0.3) / 2, (0.5 - 0.7) / 2, 0, 0, 0], abs=1e-6)
    assert gradient[1].tolist() == pytest.approx([0, 0, 0, 0.25, 0.125, (0.25 - 1) / 2], abs=1e-6)


# quantiles at the levels 1/4 and 3/4 for action 0 and then for action 1, in state 0 and in state 1
QR_POLICY = [[0.0, 3.0, 9.0, 9.0], [4.0, 4.0, 1.0, 2.0]]  # means 1.5 and 9; 4 and 1.5
QR_TARGET = [[1.0, 2.0, 0.0, 2.0], [0.0, 2.0, 2.0, 4.0]]  # means 1.5 and 1; 1 and 3


def make_qrdqn(policy=QR_POLICY, target=QR_TARGET, *, start=0, **options):
    """QR-DQN with 2 quantiles and 2 actions, of given values."""
    model = QRDQN(BOX, spaces.Discrete(2, start=start), network=linear, num_quantiles=2, **options)
    fill(model.policy_net.output, np.transpose(policy).tolist())
    fill(model.target_net.output, np.transpose(target).tolist())
    return model


def test_qrdqn_acts_by_the_means_of_its_quantiles():
    model = make_qrdqn()
    assert model(torch.eye(2)).flatten().tolist() == pytest.approx([1.5, 9.0, 4.0, 1.5])
    assert model.act(STATES).tolist() == [1, 0]


@pytest.mark.parametrize("start", [0, 5])
def test_qrdqn_loss_regresses_each_quantile_on_all_of_the_target(start):
    result = loss_of(make_qrdqn(start=start), two_rows(action_start=start, weight=(1.0, 0.1)))
    # row 1: the target net's best in state 1 is action 1, (2, 4): targets 1 + .5 (2, 4) = 2, 3; estimates 0, 3
    # level 1/4: u = 2, 3: 1/4 * (1.5 + 2.5) / 2 = .5;  level 3/4: u = -1, 0: 1/4 * .5 / 2 = .0625
    # row 2: targets 2, 2; estimates 1, 2: level 1/4: u = 1: 1/4 * .5 = .125;  level 3/4: 0
    assert result.priority.tolist() == pytest.approx([0.5625, 0.125])
    assert result.loss.item() == pytest.approx((0.5625 + 0.1 * 0.125) / 2)
    # means 1.5, 1.5 less 2.5, 2
    assert result.q_value.tolist() == pytest.approx([1.5, 1.5])
    assert result.td_error.tolist() == pytest.approx([-1.0, -0.5])


def test_qrdqn_double_takes_the_policy_nets_choice():
    result = loss_of(make_qrdqn(double=True), two_rows())
    # the policy net's best in state 1 is action 0, of which the target net thinks (0, 2): targets 1, 2
    # level 1/4, estimate 0: u = 1, 2: 1/4 * (.5 + 1.5) / 2 = .25;  level 3/4, 3: u = -2, -1: 1/4 * (1.5 + .5) / 2
    assert result.priority.tolist() == pytest.approx([0.5, 0.125])
    assert result.td_error.tolist() == pytest.approx([0.0, -0.5])


def test_qrdqn_kappa_is_where_its_loss_turns_straight():
    result = loss_of(make_qrdqn(kappa=2.0), two_rows())
    # row 1: level 1/4: u = 2, 3: h = 2, 2 * (3 - 1) = 4, over 2: 1/4 * (1 + 2) / 2; level 3/4: 1/4 * .25 / 2
    # row 2: 1/4 * .25
    assert result.priority.tolist() == pytest.approx([0.375 + 0.03125, 0.0625])


def munchausen_targets(batch, q_values, next_q, temperature, *, quantiles=None):
    """r + .9 [T ln pi]_{-1}^0 + gamma sum pi (z - T ln pi), in plain numbers; one list a row."""
    targets = []
    for row in range(2):
        bonus = math.log(sum(math.exp((q - q_values[row][batch.action[row]]) / temperature) for q in q_values[row]))
        reward = batch.reward[row].item() + 0.9 * max(-1.0, -temperature * bonus)
        total = sum(math.exp(q / temperature) for q in next_q[row])
        chances = [math.exp(q / temperature) / total for q in next_q[row]]
        levels = zip(*quantiles[row], strict=True) if quantiles else [next_q[row]]
        values = [
            sum(p * (z - temperature * math.log(p)) for p, z in zip(chances, level, strict=True)) for level in levels
        ]
        targets.append([reward + batch.discount[row].item() * value for value in values])
    return targets


def test_dqn_munchausen_rewards_sure_actions_and_softens_the_value():
    model = DQN(BOX, spaces.Discrete(2), network=linear, munchausen=True, munchausen_temperature=0.5)
    fill(model.policy_net.output, [[1.0, 0.0], [0.0, 2.0]])
    # target values (T ln 3, 0) in state 0 and (0, 0) in state 1
    high = 0.5 * math.log(3)
    fill(model.target_net.output, [[high, 0.0], [0.0, 0.0]])
    result = loss_of(model, two_rows())
    # row 1: 1 + .9 * .5 ln 3/4 + .5 * .5 ln 2;  row 2: 2 + .9 * .5 ln 1/2 + 0
    by_hand = [1 + 0.45 * math.log(0.75) + 0.25 * math.log(2), 2 + 0.45 * math.log(0.5)]
    assert (result.q_value - result.td_error).tolist() == pytest.approx(by_hand)
    [one], [other] = munchausen_targets(two_rows(), [[high, 0], [0, 0]], [[0, 0], [high, 0]], 0.5)
    assert [one, other] == pytest.approx(by_hand), "and the loop that the others are compared with says the same"


def test_qrdqn_munchausen_mixes_quantiles_by_the_policy_of_their_means():
    model = make_qrdqn(munchausen=True, munchausen_temperature=2.0)
    batch = two_rows()
    result = loss_of(model, batch)
    means = [[1.5, 1.0], [1.0, 3.0]]
    quantiles = [[[0.0, 2.0], [2.0, 4.0]], [[1.0, 2.0], [0.0, 2.0]]]
    targets = munchausen_targets(batch, means, means[::-1], 2.0, quantiles=quantiles)
    assert (result.q_value - result.td_error).tolist() == pytest.approx([sum(row) / 2 for row in targets], rel=1e-5)


def make_iqn(**options):
    """IQN whose quantile at level t is its weight times 1 + cos(pi t); 2 drawn levels, 2 to act by."""
    counts = {"num_quantiles": 2, "num_target_quantiles": 2, "num_policy_quantiles": 2, "num_cosines": 2}
    model = IQN(BOX, spaces.Discrete(2), network=linear, **counts, **options)
    for net, weight in ((model.policy_net, [[2.0, 5.0], [0.0, 3.0]]), (model.target_net, [[0.0, 1.0], [2.0, 4.0]])):
        # phi = relu(1 + cos(pi t)), for both features
        fill(net.embedding, [[0.0, 1.0], [0.0, 1.0]], 1.0)
        fill(net.net.output, weight)
    return model


@pytest.fixture
def levels(monkeypatch):
    """Levels 0 and 1/2 for the estimates of both rows, 1/2 and 1 for the targets: factors 2 and 1, and 1 and 0."""
    drawn = [torch.tensor([[0.0, 0.5], [0.0, 0.5]]), torch.tensor([[0.5, 1.0], [0.5, 1.0]])]
    monkeypatch.setattr(torch, "rand", lambda *size, **_: drawn.pop(0).reshape(size))


def test_iqn_acts_by_the_mean_of_evenly_spaced_quantiles():
    model = make_iqn()
    before = torch.get_rng_state()
    # levels 1/4 and 3/4: factors 1 + cos(pi / 4) and 1 - cos(pi / 4), 1 on average: columns of the weights are left
    assert model(torch.eye(2)).flatten().tolist() == pytest.approx([2.0, 0.0, 5.0, 3.0], abs=1e-5)
    assert model.act(STATES).tolist() == [0, 0]
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn to act"


def test_iqn_loss_regresses_drawn_quantiles_on_drawn_quantiles(levels):
    result = loss_of(make_iqn(), two_rows(weight=(1.0, 0.1)))
    # row 1: estimates of action 0 in state 0: 2 * (2, 1) = 4, 2. The target's best in state 1 is action 1, 4 * (1, 0):
    # targets 1 + .5 (4, 0) = 3, 1
    # level 0: u = -1, -3: |0 - 1| (.5 + 2.5) / 2 = 1.5;  level 1/2: u = 1, -1: 1/2 * .5
    # row 2: estimates 3 * (2, 1) = 6, 3, targets 2: level 0: u = -4: 3.5;  level 1/2: u = -1: 1/2 * .5
    assert result.priority.tolist() == pytest.approx([1.75, 3.75])
    assert result.loss.item() == pytest.approx((1.75 + 0.1 * 3.75) / 2)
    assert result.q_value.tolist() == pytest.approx([3.0, 4.5])
    assert result.td_error.tolist() == pytest.approx([1.0, 2.5])


def test_iqn_double_takes_the_policy_nets_choice(levels):
    result = loss_of(make_iqn(double=True), two_rows())
    # the policy net's best in state 1 is action 0, of which the target net thinks 1 * (1, 0): targets 1.5, 1
    assert (result.q_value - result.td_error).tolist() == pytest.approx([1.25, 2.0])


def test_iqn_munchausen_follows_the_target_nets_means(levels):
    batch = two_rows()
    result = loss_of(make_iqn(munchausen=True, munchausen_temperature=2.0), batch)
    means = [[0.0, 2.0], [1.0, 4.0]]
    # factors 1 and 0 of the drawn levels
    quantiles = [[[m, 0.0] for m in row] for row in means[::-1]]
    targets = munchausen_targets(batch, means, means[::-1], 2.0, quantiles=quantiles)
    assert (result.q_value - result.td_error).tolist() == pytest.approx([sum(row) / 2 for row in targets], rel=1e-5)


def test_iqn_draws_other_levels_in_every_update():
    torch.manual_seed(0)
    model = make_iqn()
    assert loss_of(model, two_rows()).loss != loss_of(model, two_rows()).loss


MODELS = [C51, QRDQN, IQN]


@pytest.mark.parametrize(
    ("make", "switches"),
    [
        (make, switch)
        for make in (DQN, *MODELS)
        for switch in ({}, {"double": True}, {"munchausen": True})
        # it has none
        if not (make is C51 and "munchausen" in switch)
    ],
)
def test_no_gradient_flows_through_a_target_and_what_is_reported_has_its_shape(make, switches):
    torch.manual_seed(0)
    model = make(BOX, spaces.Discrete(2), network=lambda s, n: MLP(s, n, hidden_sizes=[8]), **switches)
    model.target_net.requires_grad_(True)
    result = loss_of(model, two_rows())
    result.loss.backward()
    assert all(p.grad is None for p in model.target_net.parameters())
    assert result.loss.shape == ()
    for part in result[1:]:
        assert part.shape == (2,)
    assert result.priority.min() >= 0


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (C51, {"num_atoms": 1}, r"num_atoms=1: must be at least 2"),
        (C51, {"v_min": 3.0, "v_max": 3.0}, r"v_min=3\.0, v_max=3\.0: v_min must be below v_max"),
        (C51, {"clip_grad_norm": 0.0}, r"clip_grad_norm=0\.0: must be positive"),
        (QRDQN, {"num_quantiles": 0}, r"num_quantiles=0: must be positive"),
        (QRDQN, {"kappa": 0.0}, r"kappa=0\.0: must be positive"),
        (IQN, {"num_quantiles": 0}, r"num_quantiles=0"),
        (IQN, {"num_target_quantiles": 0}, r"num_target_quantiles=0"),
        (IQN, {"num_policy_quantiles": -1}, r"num_policy_quantiles=-1"),
        (IQN, {"num_cosines": 0}, r"num_cosines=0"),
        (IQN, {"kappa": -1.0}, r"kappa=-1\.0"),
        (IQN, {"munchausen_temperature": 0.0}, r"munchausen_temperature=0\.0"),
        (QRDQN, {"boltzmann_temperature": -1.0}, r"boltzmann_temperature=-1\.0"),
        (DQN, {"loss": "mae"}, r"loss=mae: must be huber or mse"),
        *[
            (make, {"double": True, "munchausen": True}, r"double=True, munchausen=True: .*choose one")
            for make in (DQN, QRDQN, IQN)
        ],
    ],
)
def test_values_and_switches_that_make_no_sense_are_rejected_by_name_and_value(make, options, words):
    with pytest.raises(ValueError, match=words):
        make(BOX, spaces.Discrete(2), **options)
