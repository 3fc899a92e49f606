"""What networks make of observations."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from lightning_dqn.networks import MLP, ObservationEncoder


def test_boxes_are_flattened():
    encoded = ObservationEncoder(spaces.Box(-1, 1, (2, 3)))(torch.arange(12.0).reshape(2, 2, 3))
    assert encoded.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_discrete_observations_become_one_hot_counted_from_their_start():
    encoded = ObservationEncoder(spaces.Discrete(3, start=5))(torch.tensor([5, 7]))
    assert encoded.tolist() == [[1, 0, 0], [0, 0, 1]]


def test_multi_discrete_observations_become_one_hot_blocks():
    encoded = ObservationEncoder(spaces.MultiDiscrete([2, 3], start=[0, 1]))(torch.tensor([[1, 1], [0, 3]]))
    assert encoded.tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (spaces.Box(0, 255, (8, 8, 3), np.uint8), "image"),
        (spaces.Text(5), "not supported"),
        (spaces.Dict({"a": spaces.Discrete(2)}), "not supported"),
    ],
)
def test_case_16_spaces_that_cannot_be_encoded_are_refused_by_name(space, words):
    with pytest.raises(TypeError, match=words) as error:
        ObservationEncoder(space)
    assert str(space) in str(error.value)


def test_mlp_is_linear_relu_linear():
    net = MLP(spaces.Box(-1, 1, (2,)), 1, hidden_sizes=[2])
    with torch.no_grad():
        net.hidden[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        net.hidden[0].bias.zero_()
        net.output.weight.copy_(torch.tensor([[2.0, 3.0]]))
        net.output.bias.fill_(1.0)
    # relu(4, -5) = (4, 0): 2 * 4 + 1 = 9;  relu(-1, 2) = (0, 2): 3 * 2 + 1 = 7
    assert net(torch.tensor([[4.0, 5.0], [-1.0, -2.0]])).flatten().tolist() == [9.0, 7.0]


def test_mlp_has_the_layers_it_was_given():
    shapes = [tuple(p.shape) for p in MLP(spaces.Box(-1, 1, (4,)), 2, hidden_sizes=[128, 128]).parameters()]
    assert shapes == [(128, 4), (128,), (128, 128), (128,), (2, 128), (2,)]
    assert [tuple(p.shape) for p in MLP(spaces.Discrete(6), 3, hidden_sizes=[]).parameters()] == [(3, 6), (3,)]


def test_mlp_computes_in_the_type_of_its_weights():
    net = MLP(spaces.Discrete(4), 2, hidden_sizes=[3]).double()
    assert net(torch.tensor([1, 2])).dtype == torch.float64


def test_layers_without_units_are_refused():
    with pytest.raises(ValueError, match=r"hidden_sizes=\[8, 0\]"):
        MLP(spaces.Discrete(4), 2, hidden_sizes=[8, 0])
