"""Updates as CUDA graphs equal plain ones; on a CPU by a recorder of operations, on a GPU for real."""

import functools
import logging

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import quiet_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dqn import DQN, IQN, MLP, DQNDataModule, EpsilonDecay, SoftTargetUpdate
from lightning_dqn.callbacks import UpdateCallback
from lightning_dqn.speed.graphs import WARM_UP_CALLS, GraphedCall, record_cuda_graph
from lightning_dqn.speed.updater import FastUpdate

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Recorded(TorchDispatchMode):
    """Does for a CPU what a CUDA graph does: records each operation with the tensors it works on, numbers as they are,
    and repeats them at the same addresses. Unlike a graph it runs them when it records them."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        views = any(r.alias_info is not None for r in func._schema.returns)
        if not views or func._schema.is_mutable:
            self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for place, value in zip(tensors(result), tensors(again), strict=True):
                    place.copy_(value)


def tensors(result):
    return [each for each in (result if isinstance(result, (list, tuple)) else [result]) if torch.is_tensor(each)]


def record_on_cpu(function, arguments):
    """As `record_cuda_graph`, but that it also runs the function; the random state is unchanged."""
    with torch.random.fork_rng(), Recorded() as recorded:
        results = function(*arguments)
    return recorded.replay, results


class StateKept:
    """`record_on_cpu` with the weights and moments put back to what they were before it."""

    def __init__(self, module):
        self.module, self.recordings = module, 0

    def __call__(self, function, arguments):
        self.recordings += 1
        moments = self.module.optimizers().optimizer.state.values()
        kept = [t for state in moments for t in state.values()] + [self.module._flat[0].values]
        copies = [t.clone() for t in kept]
        for argument in arguments:
            # a graph is recorded before its places are written
            argument.zero_()
        recorded = record_on_cpu(function, arguments)
        for tensor, copy in zip(kept, copies, strict=True):
            tensor.copy_(copy)
        return recorded


class Graphed(UpdateCallback):
    """Lets a run's updates be recorded on a CPU."""

    def on_update_end(self, trainer, module):
        update = module._fast_update
        if isinstance(update, FastUpdate) and not hasattr(self, "recorder"):
            self.recorder = StateKept(module)
            module._fast_update = FastUpdate(
                update._gradient,
                module._flat,
                module.optimizers(),
                finish=update._finish,
                compiled=update.compiled,
                end=module.end_update,
                record=self.recorder,
            )


def trained(num_updates, callbacks=(), model=DQN, accelerator="cpu", **options):
    """A module after so many updates on CartPole, from seed 0."""
    pl.seed_everything(0)
    data = DQNDataModule(num_envs=4, updates_per_iteration=4)
    module = model(data.observation_space, data.action_space, **options)
    schedules = [SoftTargetUpdate(tau=0.1, every_n_updates=3), EpsilonDecay()]
    trainer = quiet_trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=None,
        max_steps=num_updates,
        limit_val_batches=0,
        callbacks=[*schedules, *callbacks],
    )
    trainer.fit(module, data)
    assert trainer.global_step == num_updates
    return module


def falling(optimizer):
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=60)


OPTIMIZERS = {
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-3, amsgrad=True),
    "Adam": functools.partial(torch.optim.Adam, lr=1e-3),
    # which a graph takes no part of
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=1e-3, centered=True),
}


NOISY = functools.partial(MLP, noisy=True)
VARIANTS = {name: {"optimizer": optimizer, "lr_scheduler": falling} for name, optimizer in OPTIMIZERS.items()}
# their noise is drawn again in each update
VARIANTS |= {"noisy DQN": {"network": NOISY}, "noisy IQN": {"network": NOISY, "model": IQN}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_updates_end_in_the_weights_of_plain_ones_while_rate_and_target_move(variant):
    options = {"compile": False, "clip_grad_norm": 0.5, **VARIANTS[variant]}
    plain = trained(60, **options)
    graphed = Graphed()
    recorded = trained(60, [graphed], **options)
    assert graphed.recorder.recordings == 1
    for name, value in plain.state_dict().items():
        # the rate has single precision as a tensor
        torch.testing.assert_close(recorded.state_dict()[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_what_a_schedule_changes_beside_the_rate_ends_the_graph_and_is_reported_in_one_line(caplog):
    def cycle(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=80)

    plain = trained(40, compile=False, lr_scheduler=cycle)
    with caplog.at_level(logging.INFO):
        recorded = trained(40, [Graphed()], compile=False, lr_scheduler=cycle)
    assert caplog.text.count("Updates run without a CUDA graph: a recorded number or address has changed") == 1
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(recorded.state_dict()[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_a_recording_that_fails_leaves_the_plain_call_and_a_line(caplog):
    def fail(function, arguments):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    call = GraphedCall(lambda a: (a + 1,), constants=tuple, record=fail)
    with caplog.at_level(logging.INFO):
        results = [call(torch.tensor(float(i)))[0].item() for i in range(8)]
    assert results == [i + 1 for i in range(8)]
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["Updates run without a CUDA graph: RuntimeError: operation not permitted."]


def test_it_is_recorded_once_and_its_results_outlive_the_next_call():
    runs = []

    def function(rows):
        runs.append(1)
        return rows.sum(1), rows * 2

    call = GraphedCall(function, constants=tuple, record=record_on_cpu)
    # rows that share their memory, as two views of the same frames do
    frames = torch.arange(24.0).view(2, 3, 4)
    results = [call(frames[i % 2, :, :3]) for i in range(9)]
    assert len(runs) == WARM_UP_CALLS + 1
    for i, (sums, doubles) in enumerate(results):
        assert torch.equal(sums, frames[i % 2, :, :3].sum(1))
        assert torch.equal(doubles, frames[i % 2, :, :3] * 2)
    assert call._static_inputs[0].stride() == frames[0, :, :3].stride() != (3, 1)


@on_a_gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("model", [DQN, IQN])
def test_updates_on_a_gpu_are_graphs_and_end_in_the_weights_of_plain_ones(optimizer, model, caplog):
    options = {"optimizer": optimizer, "lr_scheduler": falling, "clip_grad_norm": 0.5, "model": model}
    options["accelerator"] = "cuda"
    plain = trained(60, compile=False, **options)
    with caplog.at_level(logging.INFO):
        graph = trained(60, compile=True, **options)
    assert "no CUDA graph" not in caplog.text
    assert graph.update_mode == "compiled"
    assert graph._fast_update._work._replay is not None
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(graph.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


@on_a_gpu
def test_noise_on_a_gpu_is_another_in_each_replay():
    call = GraphedCall(lambda a: (a + torch.randn_like(a),), constants=tuple, record=record_cuda_graph)
    seen = [call(torch.zeros(8, device="cuda"))[0].cpu().numpy() for _ in range(8)]
    assert len(np.unique(seen)) == 64
