"""The hot path against the simple form."""

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import quiet_trainer
from gymnasium import spaces

from lightning_dqn import DQN, MLP, DQNDataModule, EpsilonDecay, SoftTargetUpdate
from lightning_dqn.callbacks import UpdateCallback
from lightning_dqn.speed.compiled import should_compile
from lightning_dqn.speed.flat import FlatParameters
from lightning_dqn.speed.optimizers import can_be_flat, fused_step, prefer_fused
from lightning_dqn.speed.updater import denormals_are_flushed

BOX = spaces.Box(-1, 1, (3,))


def trained(num_updates, callbacks=(), owner=DQN, **options):
    """A module and its trainer after so many updates on CartPole, from seed 0."""
    pl.seed_everything(0)
    data = DQNDataModule(num_envs=4, updates_per_iteration=4)
    model = owner(data.observation_space, data.action_space, **options)
    schedules = [SoftTargetUpdate(), EpsilonDecay()]
    trainer = quiet_trainer(
        max_epochs=None, max_steps=num_updates, limit_val_batches=0, callbacks=[*schedules, *callbacks]
    )
    trainer.fit(model, data)
    assert trainer.global_step == num_updates
    return model, trainer


@pytest.mark.parametrize("double", [False, True])
def test_plain_and_compiled_paths_give_the_same_weights_from_the_same_draws(double):
    plain, _ = trained(100, compile=False, double=double)
    compiled, _ = trained(100, compile=True, double=double)
    assert plain.update_mode != "compiled"
    assert compiled.update_mode == "compiled"
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    # and they did learn something
    assert not torch.allclose(plain.policy_net.output.bias, DQN(BOX, spaces.Discrete(2)).policy_net.output.bias)


@pytest.mark.integration
def test_compiled_gradients_are_clipped_by_value():
    free, _ = trained(8, compile=True, clip_grad_value=None, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    still, _ = trained(8, compile=True, clip_grad_value=1e-9, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    pl.seed_everything(0)
    start = DQN(spaces.Box(-1, 1, (4,)), spaces.Discrete(2))
    moved = (free.policy_net.output.bias - start.policy_net.output.bias).abs().max()
    # at most 8 steps of lr * clip
    assert (still.policy_net.output.bias - start.policy_net.output.bias).abs().max() <= 1.1 * 8 * 1e-3 * 1e-9 + 1e-9
    assert moved > 1e-4


def test_the_checkpoint_of_a_compiled_run_resumes_in_a_plain_one(tmp_path):
    model, trainer = trained(40, compile=True)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {name: tuple(v.shape) for name, v in content["state_dict"].items() if "policy" in name} == {
        "policy_net.hidden.0.weight": (128, 4),
        "policy_net.hidden.0.bias": (128,),
        "policy_net.hidden.2.weight": (128, 128),
        "policy_net.hidden.2.bias": (128,),
        "policy_net.output.weight": (2, 128),
        "policy_net.output.bias": (2,),
    }
    [state] = content["optimizer_states"][0]["state"].values()
    assert state["step"].item() == 40
    again = DQN(model.observation_space, model.action_space, compile=False)
    optimizer = again.configure_optimizers()
    again.load_state_dict(content["state_dict"])
    optimizer.load_state_dict(content["optimizer_states"][0])
    assert torch.equal(again.policy_net.output.bias, model.policy_net.output.bias)


@pytest.mark.parametrize(("max_steps", "compiles"), [(9_999, False), (10_000, True)])
def test_auto_compiles_where_a_run_is_long_enough(max_steps, compiles):
    _, trainer = trained(4, compile=False)
    trainer.fit_loop.epoch_loop.max_steps = max_steps + trainer.global_step
    assert should_compile(trainer, 4) is compiles


@pytest.mark.parametrize(("max_epochs", "compiles"), [(39, False), (40, True)])
def test_auto_counts_the_updates_of_all_iterations_of_an_epoch(max_epochs, compiles):
    data = DQNDataModule(epoch_env_steps=256, eval_episodes=1)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(DQN(data.observation_space, data.action_space, compile=False), data)
    assert trainer.num_training_batches == 8, "32 iterations each"
    trainer.fit_loop.max_epochs = max_epochs
    # 40 * 256 = 10,240 updates, of which 129 are made
    assert should_compile(trainer, 1) is compiles


@pytest.mark.integration
def test_without_a_compiler_training_continues_and_is_reported_in_one_line(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    nowhere = torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",), "fx_graph_cache": False})
    # a network of its own shape, whose kernels no cache has
    with nowhere, caplog.at_level(logging.INFO):
        model, _ = trained(8, compile=True, network=lambda s, n: MLP(s, n, hidden_sizes=[13, 17]))
    assert model.update_mode != "compiled"
    lines = [record.getMessage() for record in caplog.records if "not compiled" in record.getMessage()]
    assert len(lines) == 1
    assert "\n" not in lines[0]


class StepCounter(pl.Callback):
    """What people hang into Lightning's update: here they count."""

    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms.append(float(pl_module.policy_net.output.bias.grad.norm()))


def test_lightnings_own_calls_and_the_fused_update_give_the_same_weights_bitwise():
    lean, _ = trained(60, compile=False)
    counter = StepCounter()
    watched, _ = trained(60, callbacks=[counter], compile=False)
    assert len(counter.norms) == 60
    assert all(norm > 0 for norm in counter.norms)
    for name, value in lean.state_dict().items():
        assert torch.equal(watched.state_dict()[name], value), name


def test_a_hook_on_an_update_is_called_even_where_compiling_was_asked_for(caplog):
    counter = StepCounter()
    with caplog.at_level(logging.INFO):
        trained(8, callbacks=[counter], compile=True)
    assert len(counter.norms) == 8
    assert "overrides a hook of the update" in caplog.text


@pytest.mark.parametrize("before", [False, True])
def test_denormals_are_flushed_in_updates_only_even_where_one_fails(before):
    torch.set_flush_denormal(before)
    seen = {"update": [], "iteration": []}

    class Hooked(UpdateCallback):
        def on_update_end(self, trainer, module):
            seen["update"].append(denormals_are_flushed())
            if len(seen["update"]) == 6:
                raise OSError("the sixth update fails")

        def on_train_batch_end(self, trainer, pl_module, *_):
            seen["iteration"].append(denormals_are_flushed())

    with pytest.raises(OSError, match="sixth"):
        trained(8, callbacks=[Hooked()], compile=False)
    assert set(seen["update"]) == {True}
    assert set(seen["iteration"]) == {before}
    assert denormals_are_flushed() == before


@pytest.mark.learning  # a compilation without a cache
def test_a_compiler_older_than_the_cpu_is_good_enough(tmp_path):
    old = tmp_path / "old_g++"
    old.write_text('#!/bin/sh\ncase "$*" in *-mamx-tile*|*-mavx512f*) exit 1;; esac\nexec g++ "$@"\n')
    old.chmod(0o755)
    # in a process and with a cache of its own, since both remember what a compiler knows
    script = (
        "from test_update import trained; model, _ = trained(4, compile=True); assert model.update_mode == 'compiled'"
    )
    environment = {**os.environ, "CXX": str(old), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=Path(__file__).parent, check=True)


def test_an_optimizer_that_needs_matrices_gets_them(caplog):
    def muon(params):
        return torch.optim.Muon([p for p in params if p.ndim == 2], lr=1e-3)

    with caplog.at_level(logging.INFO):
        model, trainer = trained(8, compile=True, optimizer=muon)
    assert "needs separate parameters" in caplog.text
    assert [p.ndim for p in trainer.optimizers[0].param_groups[0]["params"]] == [2, 2, 2]
    # the target net moves nevertheless
    assert not torch.equal(model.target_net.output.weight, model.policy_net.output.weight)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_lean_step_is_the_optimizers_own(make, amsgrad):
    start, rng = torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    results, states = [], []
    slopes = [torch.randn(50, generator=rng) for _ in range(20)]
    for lean in (False, True):
        vector = torch.nn.Parameter(start.clone())
        optimizer = make([vector], lr=0.1, amsgrad=amsgrad, weight_decay=0.1, betas=(0.8, 0.95))
        prefer_fused(optimizer)
        step = fused_step(optimizer) if lean else optimizer.step
        for i, slope in enumerate(slopes):
            vector.grad = slope.clone()
            optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)  # as a schedule would
            step()
        results.append(vector.detach())
        states.append(optimizer.state_dict()["state"][0])
    assert torch.equal(results[0], results[1])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_optimizer_with_hooks_takes_its_own_step():
    vector = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([vector], lr=0.1)
    prefer_fused(optimizer)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    vector.grad = torch.ones(3)
    fused_step(optimizer)()
    assert calls == [1]


def test_fused_kernels_are_taken_only_where_nobody_chose():
    def fused(**kwargs):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))], **kwargs)
        prefer_fused(optimizer)
        return optimizer.param_groups[0]["fused"]

    assert fused() is True
    assert fused(fused=False) is False
    assert not fused(foreach=True)
    assert not fused(capturable=False, differentiable=True)


def test_only_what_is_the_same_in_one_vector_is_laid_into_one():
    net = MLP(BOX, 2, hidden_sizes=[4])
    weights, biases = ([p for p in net.parameters() if p.ndim == n] for n in (2, 1))
    assert can_be_flat(net, torch.optim.RMSprop(net.parameters()))
    # looks at whole matrices; has two rates; leaves some out
    assert not can_be_flat(net, torch.optim.Adafactor(net.parameters()))
    assert not can_be_flat(net, torch.optim.Adam([{"params": weights}, {"params": biases, "lr": 1.0}]))
    assert not can_be_flat(net, torch.optim.Adam(weights))
    # parameters that are held still, or of another type
    net.output.bias.requires_grad_(False)
    assert not can_be_flat(net, torch.optim.RMSprop(net.parameters()))
    net.output.bias.requires_grad_(True)
    net.output.double()
    assert not can_be_flat(net, torch.optim.RMSprop(net.parameters()))


def test_acting_in_numpy_is_acting_in_torch():
    torch.manual_seed(0)
    net = MLP(spaces.Box(-1, 1, (2, 3)), 4)
    observation = np.random.default_rng(0).normal(size=(9, 2, 3)).astype(np.float32)
    with torch.no_grad():
        expected = net(torch.from_numpy(observation)).numpy()
    np.testing.assert_allclose(net.forward_numpy(observation), expected, rtol=1e-5, atol=1e-6)


def test_acting_in_numpy_follows_the_parameters_wherever_they_go():
    net = MLP(spaces.Box(-1, 1, (2,)), 1, hidden_sizes=[])
    observation = np.array([[1.0, 2.0]], np.float32)
    for weight, move in ((3.0, None), (5.0, FlatParameters), (7.0, copy.deepcopy), (9.0, None)):
        if move is copy.deepcopy:
            net = copy.deepcopy(net)
        elif move:
            move(net)
        with torch.no_grad():
            net.output.weight.fill_(weight)
            net.output.bias.fill_(0.5)
        # w * 1 + w * 2 + .5
        assert net.forward_numpy(observation).item() == 3 * weight + 0.5


@pytest.mark.parametrize("watched", [False, True], ids=["fast", "plain"])
def test_parameters_whose_data_is_replaced_continue_learning(watched):
    class Replace(UpdateCallback):
        """Gives the parameters other memory after the second update."""

        def on_update_end(self, trainer, pl_module):
            if trainer.global_step == 2:
                vector = torch.nn.utils.parameters_to_vector(pl_module.policy_net.parameters())
                torch.nn.utils.vector_to_parameters(vector.detach() + 1, pl_module.policy_net.parameters())
                self.replaced = vector.detach() + 1

    replace = Replace()
    model, _ = trained(8, callbacks=[replace, *[StepCounter()] * watched], compile=False)
    assert model.update_mode == ("plain" if watched else "fast")
    vector = torch.nn.utils.parameters_to_vector(model.policy_net.parameters()).detach()
    # updates from the replaced values on
    change = (vector - replace.replaced).abs()
    assert 0 < change.max() < 0.1


def test_an_overridden_update_replaces_the_plain_one():
    class Counting(DQN):
        updates = 0

        def update(self, batch):
            self.updates += 1
            return super().update(batch)

    model, trainer = trained(4, owner=Counting, compile=False)
    assert (model.updates, model.update_mode, trainer.global_step) == (4, "plain", 4)
