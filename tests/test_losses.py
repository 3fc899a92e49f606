"""The equations, on two rows worked by hand; those of distributions also against plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dqn.losses import (
    categorical_projection,
    double_q_target,
    gather_actions,
    lambda_returns,
    munchausen_bonus,
    polyak_update,
    q_target,
    quantile_huber,
    soft_value,
    weighted_huber,
    weighted_mse,
)
from lightning_dqn.variants.quantile import midpoints

QUICK = settings(max_examples=100, deadline=None, derandomize=True)


def test_gather_actions_picks_the_taken_action_of_each_row():
    q_values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert gather_actions(q_values, torch.tensor([2, 0])).tolist() == [3.0, 4.0]


def test_q_target_adds_the_discounted_best_target_value():
    reward, discount = torch.tensor([1.0, 2.0]), torch.tensor([0.9, 0.0])  # the second row has terminated
    next_target_q = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    # 1 + .9 * max(10, 20) = 19;  2 + 0 * max(30, 40) = 2
    assert q_target(reward, discount, next_target_q).tolist() == pytest.approx([19.0, 2.0])


def test_double_q_target_lets_the_policy_net_pick_and_the_target_net_evaluate():
    reward, discount = torch.tensor([1.0, 2.0]), torch.tensor([0.9, 0.5])
    next_target_q = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    next_policy_q = torch.tensor([[7.0, 6.0], [1.0, 2.0]])
    # 1 + .9 * 10 (picked: action 0) = 10;  2 + .5 * 40 (picked: action 1) = 22
    assert double_q_target(reward, discount, next_target_q, next_policy_q).tolist() == pytest.approx([10.0, 22.0])


@pytest.mark.parametrize("target_of", [q_target, lambda r, d, q: double_q_target(r, d, q, q)])
def test_no_gradient_flows_through_a_target(target_of):
    q_values = torch.ones(2, 2, requires_grad=True)
    assert not target_of(torch.ones(2), torch.ones(2), q_values).requires_grad


def test_huber_is_square_inside_one_and_linear_outside():
    q_value, target = torch.tensor([1.5, 5.0]), torch.tensor([1.0, 2.0])
    # errors .5 and 3: .5^2 / 2 = .125;  3 - .5 = 2.5;  mean (.125 + 2.5) / 2 = 1.3125
    assert weighted_huber(q_value, target, torch.ones(2)).item() == pytest.approx(1.3125)


def test_huber_gradient_is_the_error_clipped_to_one():
    q_value = torch.tensor([1.5, -1.0], requires_grad=True)
    weighted_huber(q_value, torch.tensor([1.0, 2.0]), torch.ones(2)).backward()
    # (.5, -3 clipped to -1), each over the 2 rows of the mean
    assert q_value.grad.tolist() == pytest.approx([0.25, -0.5])


def test_weights_multiply_the_loss_before_the_mean():
    q_value, target = torch.tensor([1.5, 5.0]), torch.tensor([1.0, 2.0])
    # (2 * .125 + .1 * 2.5) / 2 = .25: not divided by the sum of the weights
    assert weighted_huber(q_value, target, torch.tensor([2.0, 0.1])).item() == pytest.approx(0.25)


def test_lambda_returns_mix_the_next_value_with_the_next_return_within_an_episode():
    # first environment: one unfinished episode. Second: cut after its first step, terminated at its second
    reward, discount = torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([[0.5, 0.5], [0.5, 0.0]])
    ended = torch.tensor([[False, True], [False, True]])
    next_value = torch.tensor([[10.0, 10.0], [20.0, 20.0]])
    # R_1 = 2 + .5 * 20 = 12;  R_0 = 1 + .5 * (.75 * 10 + .25 * 12) = 6.25
    # R_1 = 2 + 0 * 20 = 2;    R_0 = 1 + .5 * 10 = 6: the cut one bootstraps, and knows nothing of R_1
    returns = lambda_returns(reward, discount, ended, next_value, 0.25)
    assert returns.tolist() == [[6.25, 6.0], [12.0, 2.0]]


@st.composite
def rollouts(draw):
    """Reward, discount, ended and next value of a small rollout, and lambda."""
    steps, envs = draw(st.integers(1, 9)), draw(st.integers(1, 3))

    def table(values):
        row = st.lists(values, min_size=envs, max_size=envs)
        return torch.tensor(draw(st.lists(row, min_size=steps, max_size=steps)))

    numbers = st.floats(-10, 10, width=32)
    terminated, truncated = table(st.booleans()), table(st.booleans())
    return table(numbers), 0.9 * ~terminated, terminated | truncated, table(numbers), draw(st.floats(0, 1))


@settings(deadline=None, max_examples=60)
@given(rollouts())
def test_lambda_returns_are_those_of_the_definition(rollout):
    reward, discount, ended, next_value, td_lambda = rollout
    expected = torch.zeros_like(reward)
    for n in range(reward.shape[1]):
        for t in reversed(range(len(reward))):
            value = following = next_value[t, n]
            if not ended[t, n] and t < len(reward) - 1:
                following = expected[t + 1, n]
            expected[t, n] = reward[t, n] + discount[t, n] * ((1 - td_lambda) * value + td_lambda * following)
    given_back = lambda_returns(reward, discount, ended, next_value.requires_grad_(), td_lambda)
    torch.testing.assert_close(given_back, expected.detach(), rtol=1e-4, atol=1e-4)
    assert not given_back.requires_grad


def test_move_towards_goes_the_share_tau_of_the_way():
    target, source = [torch.tensor([0.0, 10.0])], [torch.tensor([4.0, 20.0])]
    polyak_update(target, source, 0.25)
    # 0 + .25 * 4 = 1;  10 + .25 * 10 = 12.5
    assert target[0].tolist() == [1.0, 12.5]
    polyak_update(target, source, 1.0)
    assert target[0].tolist() == [4.0, 20.0]


def test_gather_actions_picks_the_distribution_of_the_taken_action_of_each_row():
    # 2 rows, 3 actions, 2 atoms
    values = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[7.0, 8.0], [9.0, 10.0], [11.0, 12.0]]])
    assert gather_actions(values, torch.tensor([2, 0])).tolist() == [[5.0, 6.0], [7.0, 8.0]]


# Q / T = (ln 3, 0): chances 3/4 and 1/4
NEARLY_EVEN = [math.log(3), 0.0]


def test_munchausen_bonus_is_a_share_of_the_log_chance_of_the_taken_action():
    q_values = torch.tensor([NEARLY_EVEN, NEARLY_EVEN]) * 0.5
    bonus = munchausen_bonus(q_values, torch.tensor([0, 1]), temperature=0.5, alpha=0.8)
    # .8 * .5 * ln 3/4 = -.1151;  .8 * .5 * ln 1/4 = -.5545
    assert bonus.tolist() == pytest.approx([0.8 * 0.5 * math.log(3 / 4), 0.8 * 0.5 * math.log(1 / 4)])
    assert bonus.tolist() == pytest.approx([-0.1151, -0.5545], abs=1e-4)


def test_munchausen_bonus_is_cut_at_minus_one_before_the_share_is_taken():
    # T ln pi = 2 ln 1/4 = -2.77, cut to -1, times .9;  the sure action: 2 ln 3/4 = -.5754, times .9
    bonus = munchausen_bonus(torch.tensor([NEARLY_EVEN, NEARLY_EVEN]) * 2, torch.tensor([1, 0]), temperature=2.0)
    assert bonus.tolist() == pytest.approx([-0.9, 0.9 * 2 * math.log(3 / 4)])


def test_munchausen_bonus_of_values_far_apart_is_finite():
    bonus = munchausen_bonus(torch.tensor([[1e4, 0.0], [0.0, 0.0]]), torch.tensor([1, 0]), temperature=0.03)
    # ln pi = -1e4 / .03, cut;  .9 * .03 * ln 1/2
    assert bonus.tolist() == pytest.approx([-0.9, 0.9 * 0.03 * math.log(0.5)])


def test_soft_value_is_the_mean_value_of_the_policy_and_its_entropy():
    q_values = torch.tensor([NEARLY_EVEN, [0.0, 0.0]]) * 2
    values = soft_value(q_values, q_values, temperature=2.0)
    # 3/4 (2 ln 3 - 2 ln 3/4) + 1/4 (0 - 2 ln 1/4) = 2 ln 4, which is T ln sum e^(Q / T);  of two zeros 2 ln 2
    assert values.tolist() == pytest.approx([2 * math.log(4), 2 * math.log(2)])


def test_soft_value_of_quantiles_mixes_them_level_by_level():
    next_q = torch.tensor([NEARLY_EVEN, [0.0, 0.0]])
    quantiles = torch.tensor([[[0.0, 4.0], [8.0, 0.0]], [[1.0, 2.0], [3.0, 6.0]]])
    values = soft_value(quantiles, next_q, temperature=1.0)
    # entropy -3/4 ln 3/4 - 1/4 ln 1/4 = .5623: 3/4 * 0 + 1/4 * 8 = 2 and 3/4 * 4 + 1/4 * 0 = 3 more
    # entropy ln 2: (1 + 3) / 2 = 2 and (2 + 6) / 2 = 4 more
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert values.flatten().tolist() == pytest.approx([entropy + 2, entropy + 3, math.log(2) + 2, math.log(2) + 4])


def test_mse_is_half_the_square_weighted_before_the_mean():
    q_value, target = torch.tensor([1.5, 5.0], requires_grad=True), torch.tensor([1.0, 2.0])
    loss = weighted_mse(q_value, target, torch.tensor([2.0, 0.1]))
    # errors .5 and 3: (2 * .125 + .1 * 4.5) / 2 = .35
    assert loss.item() == pytest.approx(0.35)
    loss.backward()
    # weight times error over the 2 rows: 2 * .5 / 2, .1 * 3 / 2
    assert q_value.grad.tolist() == pytest.approx([0.5, 0.15])


SUPPORT = torch.tensor([0.0, 1.0, 2.0])


@pytest.mark.parametrize(
    ("atoms", "probability", "expected"),
    [
        # .5 is halfway: half of .6 each; 1.75: a quarter of .4 to 1, the rest to 2
        ([0.5, 1.75], [0.6, 0.4], [0.3, 0.3 + 0.1, 0.3]),
        # beyond the ends: all to the ends
        ([-7.0, 9.0], [0.6, 0.4], [0.6, 0.0, 0.4]),
        # on the grid: where they lie, the ends as well
        ([1.0, 2.0], [0.6, 0.4], [0.0, 0.6, 0.4]),
        ([0.0, 0.0], [0.6, 0.4], [1.0, 0.0, 0.0]),
    ],
    ids=["between", "beyond", "on-the-grid", "both-on-one"],
)
def test_projection_shares_each_atom_out_to_its_two_neighbours(atoms, probability, expected):
    # the same twice, the second row the other way round
    rows = torch.tensor([atoms, atoms[::-1]]), torch.tensor([probability, probability[::-1]])
    projected = categorical_projection(*rows, SUPPORT)
    for row in projected:
        assert row.tolist() == pytest.approx(expected)


def test_midpoints_halve_equal_parts():
    assert midpoints(2, torch.zeros(1)).tolist() == [0.25, 0.75]
    assert midpoints(4, torch.zeros(1, dtype=torch.float64)).tolist() == [0.125, 0.375, 0.625, 0.875]
    assert midpoints(4, torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def number(low, high):
    """A float that float32 holds exactly."""
    return st.floats(low, high, width=32)


def rows_of(num_rows, size, low, high):
    """Lists of lists of numbers."""
    return st.lists(st.lists(number(low, high), min_size=size, max_size=size), min_size=num_rows, max_size=num_rows)


def normalised(rows):
    """Chances in float64."""
    weights = torch.tensor(rows, dtype=torch.float64) + 1e-3
    return weights / weights.sum(1, keepdim=True)


@st.composite
def distributions(draw):
    """Atoms anywhere with their chances, and a support."""
    count = draw(st.integers(2, 6))
    low, width = draw(number(-10, 10)), draw(number(0.5, 20))
    support = torch.linspace(low, low + width, count, dtype=torch.float64)
    atoms = torch.tensor(draw(rows_of(2, count, -40, 40)), dtype=torch.float64)
    if draw(st.booleans()):
        # where rounding decides which neighbour is meant
        atoms[0] = support.flip(0)
    return atoms, normalised(draw(rows_of(2, count, 0, 1))), support


@QUICK
@given(distributions())
def test_projection_is_the_papers_loop(given_):
    atoms, chance, support = given_
    spacing = (support[-1] - support[0]).item() / (len(support) - 1)
    expected = torch.zeros_like(atoms)
    for row in range(len(atoms)):
        # Algorithm 1 of Bellemare et al. 2017; atoms on the grid have l = u, and keep all of their share
        for atom, share in zip(atoms[row].tolist(), chance[row].tolist(), strict=True):
            b = (min(max(atom, support[0].item()), support[-1].item()) - support[0].item()) / spacing
            b = min(b, len(support) - 1)
            lower, upper = math.floor(b), math.ceil(b)
            expected[row, lower] += share * (upper - b if upper > lower else 1.0)
            expected[row, upper] += share * (b - lower)
    torch.testing.assert_close(categorical_projection(atoms, chance, support), expected, rtol=0, atol=1e-9)


@QUICK
@given(rows_of(2, 3, -5, 5), rows_of(2, 3, 0, 1), rows_of(2, 4, -5, 5), number(0.25, 4))
def test_quantile_huber_is_three_plain_loops(quantiles, levels, target, kappa):
    expected = [0.0, 0.0]
    for row in range(2):
        for theta, level in zip(quantiles[row], levels[row], strict=True):
            for sample in target[row]:
                u = sample - theta
                huber = u * u / 2 if abs(u) <= kappa else kappa * (abs(u) - kappa / 2)
                expected[row] += abs(level - (u < 0)) * huber / kappa / len(target[row])
    as_tensors = (torch.tensor(part, dtype=torch.float64) for part in (quantiles, levels, target))
    assert quantile_huber(*as_tensors, kappa=kappa).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@QUICK
@given(rows_of(2, 3, -5, 5), st.lists(st.integers(0, 2), min_size=2, max_size=2), number(0.125, 4), number(0, 1))
def test_munchausen_bonus_is_a_plain_loop(rows, actions, temperature, alpha):
    expected = []
    for q_values, action in zip(rows, actions, strict=True):
        total = sum(math.exp((q - max(q_values)) / temperature) for q in q_values)
        log_chance = (q_values[action] - max(q_values)) / temperature - math.log(total)
        expected.append(alpha * max(-1.0, min(0.0, temperature * log_chance)))
    q_values = torch.tensor(rows, dtype=torch.float64)
    bonus = munchausen_bonus(q_values, torch.tensor(actions), temperature=temperature, alpha=alpha)
    assert bonus.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
