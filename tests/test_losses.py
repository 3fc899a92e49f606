"""The equations, on two rows worked by hand."""

import pytest
import torch

from lightning_dqn.losses import chosen, double_q_target, move_towards, q_target, weighted_huber


def test_chosen_pick_the_taken_action_of_each_row():
    q_values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert chosen(q_values, torch.tensor([2, 0])).tolist() == [3.0, 4.0]


def test_q_target_adds_the_discounted_best_target_value():
    reward, discount = torch.tensor([1.0, 2.0]), torch.tensor([0.9, 0.0])  # the second row has terminated
    next_target_q = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    # 1 + .9 * max(10, 20) = 19;  2 + 0 * max(30, 40) = 2
    assert q_target(reward, discount, next_target_q).tolist() == pytest.approx([19.0, 2.0])


def test_double_q_target_lets_the_policy_net_pick_and_the_target_net_judge():
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


def test_move_towards_goes_the_share_tau_of_the_way():
    target, source = [torch.tensor([0.0, 10.0])], [torch.tensor([4.0, 20.0])]
    move_towards(target, source, 0.25)
    # 0 + .25 * 4 = 1;  10 + .25 * 10 = 12.5
    assert target[0].tolist() == [1.0, 12.5]
    move_towards(target, source, 1.0)
    assert target[0].tolist() == [4.0, 20.0]
