"""Networks that see, against their papers and against the same done by hand."""

import warnings

import numpy as np
import pytest
import torch
from conftest import quiet_trainer
from gymnasium import spaces
from test_configs import resolved
from test_module import Batches
from torch import nn
from torch.nn import functional as F

from lightning_dqn import C51, DQN, IQN, MLP, PQN, QRDQN, EpsilonDecay, ImpalaCNN, MinAtarCNN, NatureCNN
from lightning_dqn.callbacks import UpdateCallback
from lightning_dqn.networks import ImageEncoder, NoisyLinear
from lightning_dqn.replay import Transition
from lightning_dqn.variants.rollouts import Rollout

NETWORKS = {"nature": NatureCNN, "impala": ImpalaCNN, "minatar": MinAtarCNN}
# the smallest that Nature's convolutions take
SIZE = 36


def pixels(*shape, high=255):
    """A space of bytes."""
    return spaces.Box(0, high, shape, np.uint8)


def planes(*shape):
    """A space of bools, as MinAtar's."""
    return spaces.Box(np.zeros(shape, np.bool_), np.ones(shape, np.bool_), shape, np.bool_)


def sizes(net):
    """Shapes of the weights by name."""
    return {name: tuple(p.shape) for name, p in net.named_parameters() if p.dim() > 1}


def count(net):
    """Number of parameters."""
    return sum(p.numel() for p in net.parameters())


def test_the_network_of_the_nature_paper():
    net = NatureCNN(pixels(4, 84, 84), 6)
    # 84 pixels, 8 wide every 4: (84 - 8) / 4 + 1 = 20; 4 wide every 2: 9; 3 wide: 7; so 64 * 7 * 7 = 3136 features
    assert net.num_features == 64 * 7 * 7
    assert sizes(net) == {
        "features.layers.0.weight": (32, 4, 8, 8),
        "features.layers.2.weight": (64, 32, 4, 4),
        "features.layers.4.weight": (64, 64, 3, 3),
        "head.hidden.0.weight": (512, 3136),
        "head.output.weight": (6, 512),
    }
    assert [layer.stride for layer in net.modules() if isinstance(layer, nn.Conv2d)] == [(4, 4), (2, 2), (1, 1)]
    # 4*32*64 + 32 = 8,224; 32*64*16 + 64 = 32,832; 64*64*9 + 64 = 36,928; 3136*512 + 512 = 1,606,144;
    # 512*6 + 6 = 3,078
    assert count(net) == 8_224 + 32_832 + 36_928 + 1_606_144 + 3_078 == 1_687_206


def test_the_network_of_the_impala_paper():
    net = ImpalaCNN(pixels(4, 84, 84), 6)
    # halved three times, rounded up: 42, 21, 11
    assert net.num_features == 32 * 11 * 11
    # a stack from c to d channels has 9 c d + d and four times 9 d d + d
    stacks = [(9 * c + 1 + 4 * (9 * d + 1)) * d for c, d in ((4, 16), (16, 32), (32, 32))]
    # 16 and 2 * 9 * ... : 592 + 4 * 2,320; 4,640 + 4 * 9,248; 5 * 9,248
    assert stacks == [9_872, 41_632, 46_240]
    assert count(net) == sum(stacks) + 3872 * 256 + 256 + 256 * 6 + 6
    assert len([layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]) == 15


def test_the_network_of_the_minatar_paper():
    net = MinAtarCNN(planes(10, 10, 7), 6)
    # 8 x 8 pixels are left; 7*16*9 + 16 = 1,024; 1024*128 + 128 = 131,200; 128*6 + 6 = 774
    assert net.num_features == 16 * 8 * 8
    assert count(net) == 1_024 + 131_200 + 774


def test_width_multiplies_the_channels_of_every_stack():
    net = ImpalaCNN(pixels(4, 8, 8), 6, width=2)
    assert [layer.out_channels for layer in net.modules() if isinstance(layer, nn.Conv2d)] == [32] * 5 + [64] * 10
    assert net.num_features == 64
    with pytest.raises(ValueError, match="width=0"):
        ImpalaCNN(pixels(4, 8, 8), 6, width=0)


def picture(num_channels, height, width, rows=2):
    """(B, C, H, W) bytes, all different in their neighbourhood."""
    return torch.from_numpy(
        np.random.default_rng(0).integers(256, size=(rows, num_channels, height, width), dtype=np.uint8)
    )


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((7, 9), (1, 7, 9)),
        ((4, 7, 9), (4, 7, 9)),
        ((7, 9, 3), (3, 7, 9)),
        ((7, 9, 1), (1, 7, 9)),
        ((4, 7, 9, 3), (12, 7, 9)),
        ((4, 3, 7, 9), (12, 7, 9)),
        ((4, 7, 9, 1), (4, 7, 9)),
    ],
    ids=str,
)
def test_the_shape_states_where_the_channels_are(shape, size):
    encode = ImageEncoder(pixels(*shape))
    assert (encode.num_channels, *encode.size) == size
    assert encode(torch.zeros(5, *shape, dtype=torch.uint8), torch.float32).shape == (5, *size)


def test_a_picture_is_the_same_in_every_layout():
    images = picture(12, 7, 9)
    stack = images.unflatten(1, (4, 3))
    expected = images.float() / 255
    for shown, shape in ((images, (12, 7, 9)), (stack, (4, 3, 7, 9)), (stack.movedim(2, 4), (4, 7, 9, 3))):
        encode = ImageEncoder(pixels(*shape), channels="auto" if len(shape) == 4 else "first")
        assert torch.equal(encode(shown, torch.float32), expected)
    last = ImageEncoder(pixels(7, 9, 12), channels="last")
    assert torch.equal(last(images.movedim(1, 3), torch.float32), expected)
    assert torch.equal(ImageEncoder(pixels(7, 9))(images[:, 0], torch.float32), expected[:, :1])


@pytest.mark.parametrize("shape", [(10, 10, 10), (8, 8, 16), (9, 3, 9), (4, 10, 10, 10)], ids=str)
def test_an_ambiguous_shape_is_rejected_until_it_is_given(shape):
    words = r"neither .* give the channel axis .*channels=first or last"
    with pytest.raises(ValueError, match=words) as error:
        MinAtarCNN(pixels(*shape), 2)
    assert str(shape) in str(error.value)
    stack = shape[0] if len(shape) == 4 else 1
    assert ImageEncoder(pixels(*shape), channels="first").num_channels == stack * shape[-3]
    assert ImageEncoder(pixels(*shape), channels="last").num_channels == stack * shape[-1]


def test_a_cube_of_bools_has_its_channels_last_as_seaquest_has():
    assert ImageEncoder(planes(10, 10, 10)).channels_last


@pytest.mark.parametrize("space", [pixels(8), pixels(2, 2, 2, 2, 2), spaces.Discrete(4)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_no_image_is_rejected_by_name(name, space):
    with pytest.raises(TypeError, match=r"convolutions need a Box of 2 axes.*; use MLP") as error:
        NETWORKS[name](space, 2)
    assert str(space) in str(error.value)


@pytest.mark.parametrize(
    ("owner", "shape", "words"),
    [
        (NatureCNN, (10, 10, 4), "10 x 10 pixels, and NatureCNN needs 36 x 36 at least: use MinAtarCNN or ImpalaCNN"),
        (NatureCNN, (3, 40, 35), "40 x 35 pixels, and NatureCNN"),
        (MinAtarCNN, (2, 9), "2 x 9 pixels, and MinAtarCNN needs 3 x 3 at least: enlarge"),
    ],
)
def test_frames_too_small_are_rejected_with_their_shape_and_a_remedy(owner, shape, words):
    with pytest.raises(ValueError, match=words) as error:
        owner(pixels(*shape), 2)
    assert str(shape) in str(error.value)
    assert "ResizeObservation" in str(error.value)


@pytest.mark.parametrize(
    ("space", "value", "seen"),
    [
        (pixels(5, 5), 51, 0.2),
        (pixels(5, 5, high=4), 3, 3.0),
        (planes(5, 5), True, 1.0),
        (spaces.Box(0, 255, (5, 5), np.float32), 51.0, 51.0),
        (spaces.Box(0, 255, (5, 5), np.int64), 51, 51.0),
        (spaces.Box(-1, 1, (5, 5), np.float64), 0.5, 0.5),
    ],
    ids=lambda each: str(getattr(each, "dtype", each)),
)
def test_bytes_up_to_255_are_scaled_once_and_nothing_else_is(space, value, seen):
    observation = torch.from_numpy(np.full((1, 5, 5), value, space.dtype))
    images = ImageEncoder(space)(observation, torch.float32)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, torch.full((1, 1, 5, 5), seen))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_in_the_type_of_its_weights(name):
    net = NETWORKS[name](pixels(SIZE, SIZE), 2, hidden_sizes=[8]).double()
    assert net(torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)).dtype == torch.float64


def test_a_convolution_worked_by_hand():
    net = MinAtarCNN(pixels(3, 4, high=9), 2, hidden_sizes=[])
    convolution = net.features.layers[0]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        # filter 0: the upper left pixel less the lower right one; filter 1: half of the middle one
        convolution.weight[0, 0, 0, 0], convolution.weight[0, 0, 2, 2], convolution.weight[1, 0, 1, 1] = 1, -1, 0.5
        convolution.bias[1] = 1
        # features are filter by filter, 1 x 2 pixels each
        net.head.output.weight[0, :4] = torch.tensor([1.0, 10.0, 100.0, 1000.0])
        net.head.output.weight[1, 3] = -1
    image = torch.tensor([[[5, 1, 0, 0], [0, 4, 2, 0], [0, 0, 3, 6]]], dtype=torch.uint8)
    # filter 0: 5 - 3 = 2, relu(1 - 6) = 0; filter 1: 4 / 2 + 1 = 3, 2 / 2 + 1 = 2
    # 2 + 0 + 300 + 2000; -2
    assert net(image).tolist() == [[2302.0, -2.0]]


def nature_by_hand(net, images):
    """(B, C, H, W) floats in [0, 1] to values, by functions."""
    weights = list(net.parameters())
    for (weight, bias), stride in zip(zip(weights[0:6:2], weights[1:6:2], strict=True), (4, 2, 1), strict=True):
        images = F.conv2d(images, weight, bias, stride).relu()
    rows = images.reshape(len(images), -1)
    return F.linear(F.linear(rows, *weights[6:8]).relu(), *weights[8:])


def impala_by_hand(net, images):
    """(B, C, H, W) floats in [0, 1] to values, by functions."""
    weights = iter(net.parameters())

    def convolution(images):
        return F.conv2d(images, next(weights), next(weights), padding=1)

    for _ in range(3):
        images = F.max_pool2d(convolution(images), 3, 2, padding=1)
        for _ in range(2):
            images = images + convolution(convolution(images.relu()).relu())
    rows = images.relu().reshape(len(images), -1)
    return F.linear(F.linear(rows, next(weights), next(weights)).relu(), next(weights), next(weights))


@pytest.mark.parametrize(("owner", "by_hand"), [(NatureCNN, nature_by_hand), (ImpalaCNN, impala_by_hand)])
@pytest.mark.parametrize("layout", ["first", "last", "stack"])
def test_values_are_those_of_plain_functions_in_every_layout(owner, by_hand, layout):
    images = picture(6, SIZE, SIZE + 4)
    if layout == "last":
        shown = images.movedim(1, 3)
    else:
        shown = images.unflatten(1, (2, 3)).movedim(2, 4) if layout == "stack" else images
    torch.manual_seed(0)
    net = owner(pixels(*shown.shape[1:]), 3, hidden_sizes=[16])
    torch.testing.assert_close(net(shown), by_hand(net, images.float() / 255), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_layer_norm_stands_behind_every_convolution_and_goes_over_the_channels_of_a_pixel(name):
    net = NETWORKS[name](pixels(SIZE, SIZE), 2, hidden_sizes=[8], layer_norm=True)
    norms = {layer: [] for layer in net.features.modules() if isinstance(layer, nn.LayerNorm)}
    for layer, seen in norms.items():
        layer.register_forward_hook(lambda _, given, made, seen=seen: seen.extend((given[0], made)))
    net(picture(1, SIZE, SIZE)[:, 0])
    convolutions = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.normalized_shape for layer in norms] == [(layer.out_channels,) for layer in convolutions]
    for given, made in norms.values():
        spread = (given.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(made, (given - given.mean(1, keepdim=True)) / spread, rtol=1e-3, atol=1e-4)
    assert isinstance(net.head.hidden[1], nn.LayerNorm)


@pytest.mark.parametrize("outputs", [3, (3, 5)], ids=str)
@pytest.mark.parametrize("switch", ["dueling", "noisy", "layer_norm"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_form_gives_its_shape_and_learns_in_all_its_parameters(name, switch, outputs):
    torch.manual_seed(0)
    net = NETWORKS[name](pixels(SIZE, SIZE), outputs, hidden_sizes=[32], **{switch: True})
    values = net(picture(1, SIZE, SIZE, rows=4)[:, 0])
    assert values.shape == (4, *(outputs if isinstance(outputs, tuple) else (outputs,)))
    (values * torch.randn(values.shape)).sum().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    linear = {type(layer) for layer in net.modules() if isinstance(layer, nn.Linear)}
    assert linear == {NoisyLinear if switch == "noisy" else nn.Linear}
    assert hasattr(net.head, "advantage") is (switch == "dueling")


def batch_of_images(space, rows=4):
    """A minibatch of random images, with a leading axis for its one update."""
    rng = np.random.default_rng(0)
    first, second = (
        torch.from_numpy(rng.integers(int(space.high.max()) + 1, size=(1, rows, *space.shape)).astype(space.dtype))
        for _ in range(2)
    )
    action, reward = torch.arange(rows)[None] % 3, torch.linspace(-1, 1, rows)[None]
    some = torch.ones(1, rows)
    return Transition(first, action, reward, 0.9 * some, second, some, torch.arange(rows)[None])


MODELS = {
    "dqn": (DQN, {"double": True}),
    "c51": (C51, {"num_atoms": 5, "v_min": -1.0, "v_max": 1.0}),
    "qrdqn": (QRDQN, {"num_quantiles": 4}),
    "iqn": (IQN, {"num_quantiles": 4, "num_target_quantiles": 3, "num_policy_quantiles": 2, "num_cosines": 8}),
    "pqn": (PQN, {}),
}


class Losses(EpsilonDecay, UpdateCallback):
    """Records the losses, and updates the target net."""

    updates_target = True

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen += outputs["loss"].tolist()

    def on_update_end(self, trainer, module):
        module.update_target(0.5)


def updated(model, owner, *, updates=1, precision="32-true", **switches):
    """A learner after some updates from the same start and draws, and their losses."""
    space = planes(10, 10, 4) if owner is MinAtarCNN else pixels(2, SIZE, SIZE)
    torch.manual_seed(0)
    make, options = MODELS[model]
    compile = switches.pop("compile", False)
    learner = make(
        space,
        spaces.Discrete(3),
        network=lambda space, outputs: owner(space, outputs, hidden_sizes=[16], **switches),
        compile=compile,
        **options,
    )
    start = {name: p.clone() for name, p in learner.policy_net.named_parameters()}
    batch = batch_of_images(space)
    if model == "pqn":
        # 4 steps and what came behind them, in one environment
        seen = torch.cat([batch.observation[0], batch.next_observation[0, -1:]]).unsqueeze(1)
        ended = torch.zeros(4, 1, dtype=torch.bool)
        parts = (part[0].unsqueeze(1) for part in (batch.action, batch.reward, batch.discount))
        batch = Rollout(seen, *parts, ended, torch.ones(5, 1, 0, dtype=torch.bool), torch.arange(4)[None])
    losses = Losses()
    trainer = quiet_trainer(callbacks=[losses], max_steps=updates, precision=precision)
    trainer.fit(learner, datamodule=Batches([batch] * updates))
    assert (learner.update_mode == "compiled") is compile
    return learner, start, losses.seen


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("model", MODELS)
def test_every_learner_makes_an_update_with_every_network(model, name):
    learner, start, losses = updated(model, NETWORKS[name], layer_norm=model == "pqn")
    assert len(losses) == 1
    assert np.isfinite(losses).all()
    still = [key for key, p in learner.policy_net.named_parameters() if torch.equal(p, start[key])]
    assert still == []


@pytest.mark.parametrize(
    ("model", "name", "switches"),
    [
        pytest.param(model, name, switches, id=f"{model}-{name}-{next(iter(switches), 'plain')}", marks=marks)
        for model, name, switches, marks in [
            ("dqn", "minatar", {"noisy": True, "layer_norm": True}, pytest.mark.learning),
            *((model, name, {}, pytest.mark.learning) for model in MODELS for name in NETWORKS),
            *(("c51", name, {"noisy": True, "dueling": True}, pytest.mark.learning) for name in NETWORKS),
            *(("pqn", name, {"layer_norm": True}, pytest.mark.learning) for name in NETWORKS),
        ]
    ],
)
def test_plain_and_compiled_updates_give_the_same_weights_from_the_same_draws(model, name, switches):
    plain, start, plain_losses = updated(model, NETWORKS[name], updates=3, **switches)
    compiled, _, losses = updated(model, NETWORKS[name], updates=3, compile=True, **switches)
    assert losses == pytest.approx(plain_losses, rel=1e-5, abs=1e-6)
    for key, value in plain.policy_net.state_dict().items():
        torch.testing.assert_close(compiled.policy_net.state_dict()[key], value, rtol=1e-5, atol=2e-6)
        assert not torch.equal(start[key], value)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("model", ["dqn", "iqn"])
def test_an_update_in_mixed_precision_is_near_the_one_in_floats(model, name):
    [exact] = updated(model, NETWORKS[name])[2]
    learner, start, [mixed] = updated(model, NETWORKS[name], precision="bf16-mixed")
    # 8 bits of each product
    assert mixed == pytest.approx(exact, rel=0.02)
    assert mixed != exact, "products were no floats"
    for key, p in learner.policy_net.named_parameters():
        assert p.dtype == torch.float32
        assert not torch.equal(p, start[key]), key


@pytest.mark.parametrize(
    "spoil",
    [
        lambda images: images,
        lambda images: np.moveaxis(np.moveaxis(images, 1, 3).copy(), 3, 1),
        lambda images: images[:, :, ::-1, ::-1].copy()[:, :, ::-1, ::-1],
        lambda images: images.setflags(write=False) or images,
    ],
    ids=["plain", "transposed", "backwards", "read-only"],
)
def test_bytes_reach_the_network_as_they_are_in_every_memory_layout(spoil):
    images = spoil(picture(2, SIZE, SIZE).numpy().copy())
    torch.manual_seed(0)
    learner = DQN(pixels(2, SIZE, SIZE), spaces.Discrete(3), network=NatureCNN)
    seen = []
    learner.policy_net.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    learner.set_epsilon(0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        action = learner.act(images, np.random.default_rng(0))
    assert seen[0].dtype == torch.uint8
    assert torch.equal(seen[0], picture(2, SIZE, SIZE))
    assert action.tolist() == learner(picture(2, SIZE, SIZE)).argmax(1).tolist()


def test_an_mlp_that_is_given_bytes_of_an_image_names_the_networks_for_images():
    with pytest.raises(TypeError, match=r"is an image, .*: use NatureCNN, or MinAtarCNN"):
        MLP(pixels(4, 84, 84), 2)


@pytest.mark.parametrize(
    ("words", "hidden_sizes", "layer_norm"),
    [
        ("--model.network NatureCNN", [512], False),
        ("--model PQN --model.network MinAtarCNN", [128], True),
        ("--model.network.hidden_sizes [64] --model.network lightning_dqn.ImpalaCNN", [64], False),
    ],
)
def test_another_network_has_its_own_layers_and_what_was_asked_for(words, hidden_sizes, layer_norm, capsys):
    network = resolved(capsys, *words.split())["model"]["init_args"]["network"]
    assert network["class_path"] == f"lightning_dqn.{words.split()[-1].removeprefix('lightning_dqn.')}"
    # MLP, of the default model, has 128 and 128; PQN asks for layer norm
    assert network["init_args"]["hidden_sizes"] == hidden_sizes
    assert network["init_args"]["layer_norm"] is layer_norm
