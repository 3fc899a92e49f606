"""What networks make of observations."""

import itertools

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from lightning_dqn.networks import MLP, ImplicitQuantiles, NoisyLinear, ObservationEncoder


def test_boxes_are_flattened():
    encoded = ObservationEncoder(spaces.Box(-1, 1, (2, 3)))(torch.arange(12.0).reshape(2, 2, 3))
    assert encoded.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_discrete_observations_become_one_hot_counted_from_their_start():
    encoded = ObservationEncoder(spaces.Discrete(3, start=5))(torch.tensor([5, 7]))
    assert encoded.tolist() == [[1, 0, 0], [0, 0, 1]]


def test_multi_discrete_observations_become_one_hot_blocks():
    encoded = ObservationEncoder(spaces.MultiDiscrete([2, 3], start=[0, 1]))(torch.tensor([[1, 1], [0, 3]]))
    assert encoded.tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]


def test_categories_of_any_integer_type_are_taken_and_those_outside_the_space_are_not():
    encode = ObservationEncoder(spaces.MultiDiscrete([2, 3], dtype=np.int32))
    assert encode(torch.tensor([[1, 2]], dtype=torch.int32)).tolist() == [[0, 1, 0, 0, 1]]
    for outside in ([2, 0], [0, -1]):
        with pytest.raises(RuntimeError, match="out of bounds"):
            encode(torch.tensor([outside]))


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (spaces.Box(0, 255, (8, 8, 3), np.uint8), "image"),
        (spaces.Text(5), "not supported"),
        (spaces.Dict({"a": spaces.Discrete(2)}), "not supported"),
    ],
)
def test_spaces_that_cannot_be_encoded_are_rejected_by_name(space, words):
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


def test_layers_without_units_are_rejected():
    with pytest.raises(ValueError, match=r"hidden_sizes=\[8, 0\]"):
        MLP(spaces.Discrete(4), 2, hidden_sizes=[8, 0])


def fill(layer, weight, bias=0.0):
    """Give a layer its weights."""
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.fill_(bias)


def test_dueling_puts_the_advantages_round_the_state_value():
    net = MLP(spaces.Box(-1, 1, (2,)), 3, hidden_sizes=[], dueling=True)
    fill(net.value[0], [[10.0, 20.0]])
    fill(net.advantage[0], [[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]])
    # s = (1, 0): V = 10, A = (1, 2, 6) less its mean 3;  s = (0, 1): V = 20, A = (0, 0, 3) less its mean 1
    q_values = net(torch.eye(2))
    assert q_values.flatten().tolist() == pytest.approx([8, 9, 13, 19, 19, 22])
    assert q_values.mean(1).tolist() == pytest.approx([10, 20]), "Q is V on average"


def test_dueling_distributions_have_a_state_value_for_each_atom():
    net = MLP(spaces.Box(-1, 1, (2,)), (2, 2), hidden_sizes=[], dueling=True)
    fill(net.value[0], [[10.0, 0.0], [20.0, 0.0]])
    # action 0 at both atoms, then action 1
    fill(net.advantage[0], [[1.0, 0.0], [2.0, 4.0], [3.0, 0.0], [8.0, 0.0]])
    values = net(torch.eye(2))
    # s = (1, 0), atom 0: 10 + (1, 3) - 2; atom 1: 20 + (2, 8) - 5;  s = (0, 1), atom 1: 0 + (4, 0) - 2
    assert values[0].tolist() == [[9.0, 17.0], [11.0, 23.0]]
    assert values[1].tolist() == [[0.0, 2.0], [0.0, -2.0]]


def test_dueling_streams_share_all_but_their_last_hidden_layer():
    net = MLP(spaces.Box(-1, 1, (4,)), (3, 5), hidden_sizes=[16, 8], dueling=True)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "hidden.0.weight": (16, 4),
        "advantage.0.weight": (8, 16),
        "advantage.2.weight": (15, 8),
        "value.0.weight": (8, 16),
        "value.2.weight": (5, 8),
    }
    assert net.num_features == 16


# whatever the switches are

SWITCHES = [
    dict(zip(("dueling", "noisy", "layer_norm"), on, strict=True)) for on in itertools.product((0, 1), repeat=3)
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda on: "-".join(name for name in on if on[name]) or "plain")
@pytest.mark.parametrize("hidden_sizes", [[], [8], [8, 6, 4]], ids=str)
def test_every_form_gives_its_shape_learns_in_all_its_parameters_and_acts_as_it_says(hidden_sizes, switches):
    torch.manual_seed(0)
    observation = np.random.default_rng(0).normal(size=(5, 2, 2)).astype(np.float32)
    rows = torch.from_numpy(observation)
    for outputs, shape in ((3, (5, 3)), ((3, 7), (5, 3, 7))):
        net = MLP(spaces.Box(-1, 1, (2, 2)), outputs, hidden_sizes=hidden_sizes, **switches)
        values = net(rows)
        assert values.shape == shape
        (values * torch.randn(shape)).sum().backward()
        idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
        assert idle == []
        for mode in (True, False):
            net.train(mode)
            by_numpy = net.forward_numpy(observation)
            quick = isinstance(outputs, int) and not switches["dueling"] and not switches["layer_norm"]
            if quick and not (switches["noisy"] and mode):
                np.testing.assert_allclose(by_numpy, net(rows).detach().numpy(), rtol=1e-5, atol=1e-6)
            else:
                assert by_numpy is None, "or something that is not the network's value"


def test_layers_are_normalised_before_their_relu():
    net = MLP(spaces.Box(-9, 9, (2,)), 2, hidden_sizes=[2], layer_norm=True)
    fill(net.hidden[0], [[1.0, 0.0], [0.0, 1.0]])
    fill(net.output, [[1.0, 0.0], [0.0, 1.0]])
    # (3, 7): mean 5, deviation 2, so (-1, 1), and relu (0, 1);  (9, 1): (1, -1), and (1, 0)
    values = net(torch.tensor([[3.0, 7.0], [9.0, 1.0]])).flatten().tolist()
    assert values == pytest.approx([0.0, 1.0, 1.0, 0.0], abs=1e-5)


def test_every_hidden_layer_has_a_norm_of_its_own_and_the_output_none():
    net = MLP(spaces.Box(-1, 1, (4,)), 2, hidden_sizes=[8, 6], layer_norm=True, dueling=True)
    norms = {name: layer.normalized_shape for name, layer in net.named_modules() if isinstance(layer, nn.LayerNorm)}
    assert norms == {"hidden.1": (8,), "advantage.1": (6,), "value.1": (6,)}


def test_a_noisy_layer_adds_the_outer_product_of_two_noises(monkeypatch):
    layer = NoisyLinear(2, 2)
    fill(layer, [[1.0, 2.0], [3.0, 4.0]], 5.0)
    with torch.no_grad():
        layer.weight_sigma.copy_(torch.tensor([[0.1, 0.2], [0.3, 0.4]]))
        layer.bias_sigma.copy_(torch.tensor([1.0, 2.0]))
    # f(e) = sign(e) sqrt(|e|): of the inputs (4, -9) to (2, -3), of the outputs (1, -16) to (1, -4)
    draws = [torch.tensor([4.0, -9.0]), torch.tensor([1.0, -16.0])]
    monkeypatch.setattr(torch, "randn", lambda size, **_: draws.pop(0))
    # weights: 1 + .1 * 1 * 2, 2 + .2 * 1 * -3, 3 + .3 * -4 * 2, 4 + .4 * -4 * -3; biases: 5 + 1 * 1, 5 + 2 * -4
    # on (1, 0): 1.2 + 6, .6 - 3;  on (0, 1): 1.4 + 6, 8.8 - 3
    assert layer(torch.eye(2)).flatten().tolist() == pytest.approx([7.2, -2.4, 7.4, 5.8])


def test_noise_is_new_in_every_call_of_training_one_for_all_rows_and_absent_in_evaluation():
    torch.manual_seed(0)
    net = MLP(spaces.Box(-1, 1, (3,)), 2, hidden_sizes=[4], noisy=True)
    rows = torch.ones(2, 3)
    one, other = net(rows), net(rows)
    assert torch.equal(one[0], one[1])
    assert not torch.equal(one, other)
    net.eval()
    before = torch.get_rng_state()
    assert torch.equal(net(rows), net(rows))
    assert torch.equal(torch.get_rng_state(), before), "no number is drawn"


def test_sigmas_start_at_half_over_the_root_of_the_inputs():
    layer = NoisyLinear(16, 3)
    # .5 / sqrt(16)
    assert set(layer.weight_sigma.flatten().tolist()) == set(layer.bias_sigma.tolist()) == {0.125}
    assert layer.weight.abs().max() <= 1 / 4
    assert NoisyLinear(4, 1, sigma=0.1).bias_sigma.item() == pytest.approx(0.05)


def test_a_noisy_network_has_noise_in_every_layer():
    net = MLP(spaces.Box(-1, 1, (4,)), 2, hidden_sizes=[8, 8], noisy=True, dueling=True)
    assert {type(layer) for layer in net.modules() if isinstance(layer, nn.Linear)} == {NoisyLinear}


def test_implicit_quantiles_multiply_features_and_the_embedding_of_the_level():
    net = ImplicitQuantiles(MLP(spaces.Box(-1, 1, (2,)), 2, hidden_sizes=[]), num_cosines=2)
    fill(net.net.output, [[1.0, 1.0], [10.0, -10.0]])
    fill(net.embedding, [[1.0, 0.0], [2.0, 4.0]])
    # cos(0) = 1 and cos(pi tau): levels 0, 1/2, 1 give (1, 1), (1, 0), (1, -1); phi = relu(1, 2 + 4 cos) =
    # (1, 6), (1, 2), (1, 0)
    levels = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 0.5]])
    quantiles = net(torch.tensor([[1.0, 2.0], [3.0, 1.0]]), levels)
    # row 1: (1, 12), (1, 4), (1, 0): sums 13, 5, 1 and 10 (1 - 12), 10 (1 - 4), 10 (1 - 0)
    # row 2: (3, 0), (3, 0), (3, 2): sums 3, 3, 5 and 30, 30, 10
    assert quantiles.shape == (2, 2, 3)
    expected = [13.0, 5.0, 1.0, -110.0, -30.0, 10.0, 3.0, 3.0, 5.0, 30.0, 30.0, 10.0]
    assert quantiles.flatten().tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda on: "-".join(name for name in on if on[name]) or "plain")
@pytest.mark.parametrize("hidden_sizes", [[], [8], [8, 6]], ids=str)
def test_implicit_quantiles_take_every_form_of_network(hidden_sizes, switches):
    torch.manual_seed(0)
    net = ImplicitQuantiles(MLP(spaces.Discrete(4), 3, hidden_sizes=hidden_sizes, **switches), num_cosines=16).eval()
    with torch.no_grad():
        # past the ReLU of the embedding
        net.embedding.bias.fill_(2.0)
    levels = torch.linspace(0, 1, 7).expand(2, 7)
    quantiles = net(torch.tensor([0, 3]), levels)
    assert quantiles.shape == (2, 3, 7)
    # a row hangs on its own observation and level alone
    for i in range(7):
        torch.testing.assert_close(net(torch.tensor([3, 0]), levels[:, i : i + 1]).flip(0)[:, :, 0], quantiles[:, :, i])
    assert quantiles.diff(dim=2).abs().amax((0, 1)).min() > 1e-4, "each level has its own value"


@pytest.mark.parametrize("missing", ["features", "head", "num_features"])
def test_a_network_that_cannot_be_taken_apart_is_rejected_by_what_it_lacks(missing):
    class Whole(nn.Linear):
        features, head, num_features = None, None, 4

    delattr(Whole, missing)
    with pytest.raises(TypeError, match=rf"network .*Whole has no {missing}: IQN needs"):
        ImplicitQuantiles(Whole(4, 2))
