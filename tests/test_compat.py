"""One test for each function of `lightning_dqn/_compat`, named after it: what fails here is what a release changed.

Those of jsonargparse are in `test_compat_jsonargparse.py`.
"""

import inspect
import logging
import os
import pickle
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import gymnasium as gym
import lightning.pytorch as pl
import pytest
import torch
import torch._inductor.config
import wandb
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loops import fit_loop, training_epoch_loop
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.connectors import checkpoint_connector
from lightning.pytorch.trainer.connectors.logger_connector import logger_connector, result
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils import _pytree

import lightning_dqn._compat.gymnasium as gymnasium_compat
import lightning_dqn._compat.lightning as lightning_compat
import lightning_dqn._compat.torch as torch_compat
import lightning_dqn._compat.wandb as wandb_compat


class Manual(BoringModel):
    """A linear layer under manual optimization, as `DQN` is; `step` makes the step of a batch."""

    def __init__(self, step=None):
        super().__init__()
        self.automatic_optimization = False
        self.make_step = step or (lambda module: module.optimizers().step())

    def training_step(self, batch, batch_idx):
        self.make_step(self)


def fit(module, tmp_path, ckpt_path=None, **arguments):
    """A fit of 3 batches an epoch, each epoch followed by an evaluation of 2."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(
        **{"default_root_dir": tmp_path, "max_epochs": 1, "limit_val_batches": 2, "num_sanity_val_steps": 0}
        | {"limit_train_batches": 3, "enable_checkpointing": False, **quiet, **arguments}
    )
    trainer.fit(module, BoringDataModule(), ckpt_path=ckpt_path)
    return trainer


def test_counted_step(tmp_path):
    steps = []
    trainer = fit(
        Manual(lambda module: lightning_compat.counted_step(module.optimizers(), lambda: steps.append(1))), tmp_path
    )
    assert len(steps) == trainer.global_step == 3


@pytest.mark.parametrize("hook", lightning_compat.UPDATE_HOOKS)
def test_overrides_update_hook(hook, tmp_path):
    module = BoringModel()
    trainer = pl.Trainer(logger=False, callbacks=[pl.Callback()], enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(module)
    assert not lightning_compat.overrides_update_hook(trainer)
    for owner in (module, *trainer.callbacks):
        if hasattr(owner, hook):
            setattr(owner, hook, lambda *args, **kwargs: None)
            assert lightning_compat.overrides_update_hook(trainer)
            delattr(owner, hook)


def test_update_hooks_are_all_that_an_update_calls():
    of_updates = re.compile(r"backward|optimizer_step|zero_grad|configure_gradient_clipping")
    named = {name for owner in (pl.LightningModule, pl.Callback) for name in vars(owner) if of_updates.search(name)}
    named |= {name for name in dir(pl.core.hooks.ModelHooks) if of_updates.search(name)}
    others = {"manual_backward", "on_validation_model_zero_grad"}
    assert named == set(lightning_compat.UPDATE_HOOKS) | others


def test_is_plain_allreduce():
    assert lightning_compat.is_plain_allreduce(SingleDeviceStrategy())
    assert lightning_compat.is_plain_allreduce(DDPStrategy())
    assert not lightning_compat.is_plain_allreduce(DDPStrategy(ddp_comm_hook=lambda state, bucket: None))
    assert not lightning_compat.is_plain_allreduce(DDPStrategy(ddp_comm_state=1))


def test_attached_trainer():
    module = BoringModel()
    assert lightning_compat.attached_trainer(module) is None
    module.trainer = trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    assert lightning_compat.attached_trainer(module) is trainer


def test_collective_timeout():
    assert lightning_compat.collective_timeout(DDPStrategy(timeout=timedelta(seconds=7))) == timedelta(seconds=7)
    assert lightning_compat.collective_timeout(SingleDeviceStrategy()) is None


def test_broadcast_root_dir(tmp_path, monkeypatch):
    trainer = pl.Trainer(logger=False, default_root_dir="here", enable_checkpointing=False, accelerator="cpu")
    monkeypatch.setattr(trainer.strategy, "broadcast", lambda path: f"rank_0/{path}")
    lightning_compat.broadcast_root_dir(trainer)
    assert trainer.default_root_dir == "rank_0/here"


def test_wandb_init_args(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(wandb, "init", lambda **kwargs: given.append(kwargs))
    logger = WandbLogger(save_dir=tmp_path, project="ours", mode="online")
    arguments = lightning_compat.wandb_init_args(logger)
    assert arguments["project"] == "ours"
    del arguments["anonymous"]
    arguments["mode"] = "offline"
    _ = logger.experiment
    assert given == [arguments]


def test_remove_callback_argument():
    class WithSummary(LightningCLI):
        def add_arguments_to_parser(self, parser):
            parser.add_lightning_class_args(pl.callbacks.ModelSummary, "summary")

        def instantiate_classes(self):
            lightning_compat.remove_callback_argument(self, "fit", "summary")
            super().instantiate_classes()

        def _run_subcommand(self, subcommand):
            pass

    options = [f"--trainer.{name}=false" for name in ("logger", "enable_checkpointing", "enable_model_summary")]
    cli = WithSummary(BoringModel, BoringDataModule, save_config_callback=None, args=["fit", *options])
    assert not any(isinstance(callback, pl.callbacks.ModelSummary) for callback in cli.trainer.callbacks)


def test_silence_tips():
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = list(logger.filters)
    try:
        lightning_compat.silence_tips()
        records = [logger.makeRecord("", 20, "", 0, text, (), None) for text in ("💡 Tip: For more", "GPU: no")]
        assert [bool(logger.filter(record)) for record in records] == [False, True]
    finally:
        logger.filters[:] = before
    assert "💡 Tip" in inspect.getsource(logger_connector)


@pytest.mark.parametrize(
    ("text", "module"),
    [
        ("is smaller than the logging interval", fit_loop),
        ("sync_dist=True", result),
        ("You're resuming from a checkpoint that ended before the epoch ended", training_epoch_loop),
    ],
)
def test_ignore_intended_warnings(text, module):
    assert text in inspect.getsource(module)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        lightning_compat.ignore_intended_warnings()
        warnings.warn(f"The number of training batches (7) {text}" if text.startswith("is") else text, stacklevel=1)
    assert not shown


def test_ignore_pytree_deprecation():
    text = "`isinstance(treespec, LeafSpec)` is deprecated"
    assert text in inspect.getsource(_pytree)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        lightning_compat.ignore_pytree_deprecation()
        warnings.warn(text, FutureWarning, stacklevel=1)
    assert not shown


def test_ignore_checkpoint_folder_warning(tmp_path):
    (tmp_path / "last.ckpt").touch()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        fit(Manual(), tmp_path, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
        count = len([each for each in shown if "is not empty" in str(each.message)])
        lightning_compat.ignore_checkpoint_folder_warning()
        fit(Manual(), tmp_path, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True)
    assert count == len([each for each in shown if "is not empty" in str(each.message)]) == 1


def test_slurm_checkpoints():
    path = checkpoint_connector._CheckpointConnector.hpc_save_path
    source = inspect.getsource(checkpoint_connector)
    assert callable(path)
    assert "hpc_ckpt_{ckpt_number}.ckpt" in source
    assert Path("hpc_ckpt_3.ckpt").match(lightning_compat.SLURM_CHECKPOINTS)


class SavesProgress(pl.Callback):
    """Keeps the state of the fit loop after the first batch, after the last one, and after the fit."""

    def __init__(self):
        self.first = self.last = None

    def on_train_batch_end(self, trainer, *args):
        self.first, self.last = self.first or trainer.fit_loop.state_dict(), trainer.fit_loop.state_dict()


def test_optimizer_steps(tmp_path):
    trainer = fit(Manual(), tmp_path)
    assert lightning_compat.optimizer_steps(trainer.fit_loop.state_dict()) == 3


def resumed_batches(fit_loop, tmp_path):
    """Batches and evaluations of the first epoch that a fit makes when it resumes from a state of the fit loop."""
    counts = {"batches": 0, "evaluations": 0}

    class Resumes(pl.Callback):
        def on_train_batch_start(self, *args):
            counts["batches"] += 1

        def on_validation_end(self, *args):
            counts["evaluations"] += 1

    module = Manual()
    checkpoint = tmp_path / "saved.ckpt"
    trainer = fit(module, tmp_path, max_steps=0)
    trainer.save_checkpoint(checkpoint)
    content = torch.load(checkpoint, weights_only=True)
    content["loops"]["fit_loop"] = fit_loop
    content["epoch"], content["global_step"] = 0, lightning_compat.optimizer_steps(fit_loop)
    torch.save(content, checkpoint)
    resumed = fit(module, tmp_path, checkpoint, callbacks=[Resumes()])
    assert resumed.global_step == 3
    return counts


def test_repair_loop_progress(tmp_path):
    ended_early = fit(Manual(), tmp_path, max_steps=1).fit_loop.state_dict()
    lightning_compat.repair_loop_progress(ended_early)
    assert resumed_batches(ended_early, tmp_path) == {"batches": 2, "evaluations": 1}


def test_count_chunks(tmp_path):
    saves = SavesProgress()
    fit(Manual(), tmp_path, callbacks=[saves])
    # the chunk that was saved behind is not complete: it is run again
    lightning_compat.count_chunks(saves.first, 0, epoch_is_over=False)
    assert saves.first["epoch_loop.batch_progress"]["current"]["processed"] == 0
    lightning_compat.count_chunks(saves.last, 6, epoch_is_over=True)
    assert saves.last["epoch_loop.batch_progress"]["current"]["processed"] == 6
    assert saves.last["epoch_loop.batch_progress"]["is_last_batch"]


@pytest.mark.parametrize("copied", [True, False])
def test_relocate_checkpoints(copied, tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    saves = ModelCheckpoint(before, "best", monitor="loss")
    saves.best_model_path = saves.kth_best_model_path = str(before / "best.ckpt")
    saves.best_k_models, saves.best_model_score = {str(before / "best.ckpt"): torch.tensor(1.0)}, torch.tensor(1.0)
    after.mkdir()
    if copied:
        (after / "best.ckpt").touch()
    state = saves.state_dict()
    lightning_compat.relocate_checkpoints(state, str(after), monitored=True)
    resumed = ModelCheckpoint(after, "best", monitor="loss")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(state)
    path = str(after / "best.ckpt") if copied else ""
    assert (resumed.best_model_path, resumed.best_model_score) == (path, 1.0 if copied else None)
    assert list(resumed.best_k_models) == ([path] if copied else [])
    assert state.keys() == saves.state_dict().keys()


class Failing(gym.Env):
    """An environment that raises in its second step, if it was told to."""

    observation_space, action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)

    def __init__(self, fails):
        self.fails, self.steps = fails, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 0, {}

    def step(self, action):
        self.steps += 1
        if self.fails and self.steps == 2:
            raise OSError("gone")
        return 0, 0.0, False, False, {}


@pytest.mark.parametrize("make", [gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv])
def test_failed_env_index(make):
    envs = make([lambda index=index: Failing(index == 1) for index in range(3)])
    envs.reset()
    envs.step([0, 0, 0])
    with pytest.raises(OSError, match="gone") as raised:
        envs.step([0, 0, 0])
    envs.close()
    assert gymnasium_compat.failed_env_index(raised.value) == 1
    assert gymnasium_compat.failed_env_index(OSError()) is None


def test_latest_run_id(tmp_path):
    assert wandb_compat.latest_run_id(str(tmp_path)) is None
    for number, mode in enumerate(("online", "offline")):
        folder = Path(wandb.Settings(root_dir=str(tmp_path), run_id=f"run{number}", mode=mode).sync_dir)
        folder.mkdir(parents=True)
        os.utime(folder, (number, number))
        assert wandb_compat.latest_run_id(str(tmp_path)) == f"run{number}"


def test_factory_calls():
    sizes = []
    with torch_compat.FactoryCalls(lambda size: sizes.append(list(size))):
        torch.nn.Linear(3, 2)
        torch.zeros(4).new_empty(5)
    assert sizes[:3] == [[2, 3], [2], [4]]


def test_compile_function(monkeypatch):
    real, found = torch._inductor.compile, {}

    def compile_nothing(traced, example):
        inspect.signature(real).bind(traced, example)
        cpp = torch._inductor.config.cpp
        found.update(isa_ok=cpp.vec_isa_ok, width=cpp.simdlen, wrapper=torch._inductor.config.cpp_wrapper)
        return traced

    monkeypatch.setattr(torch._inductor, "compile", compile_nothing)
    example = [torch.tensor([1.0, 2.0, 3.0])]
    compiled = torch_compat.compile_function(lambda a: (2 * a,), example, decompositions={}, simd_width=256)
    assert found == {"isa_ok": True, "width": 256, "wrapper": True}
    assert compiled(*example)[0].tolist() == [2.0, 4.0, 6.0]


@pytest.mark.integration
def test_compile_function_by_a_compiler():
    example = [torch.ones(3), torch.tensor([1.0, 2.0, 3.0])]
    state = torch.get_rng_state()
    compiled = torch_compat.compile_function(
        lambda a, b: (a + 2 * b, torch.rand(2)), example, decompositions={}, simd_width=None
    )
    assert torch.equal(state, torch.get_rng_state())
    total, drawn = compiled(*example)
    torch.set_rng_state(state)
    assert total.tolist() == [3.0, 5.0, 7.0]
    assert torch.equal(drawn, torch.rand(2))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_fused_adam_kernel(kind):
    vectors = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    for vector in vectors:
        vector.grad = torch.tensor([1.0, -2.0, 3.0])
    optimizer = kind(vectors[:1], lr=0.1, weight_decay=0.5, fused=True)
    optimizer.step()
    torch_compat.fused_adam_kernel(optimizer.param_groups[0]["decoupled_weight_decay"])(
        [vectors[1].data],
        [vectors[1].grad],
        [torch.zeros(3)],
        [torch.zeros(3)],
        [],
        [torch.tensor(1.0)],
        amsgrad=False,
        lr=0.1,
        beta1=0.9,
        beta2=0.999,
        weight_decay=0.5,
        eps=1e-8,
        maximize=False,
    )
    assert torch.equal(*vectors)
    assert set(optimizer.state[vectors[0]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_has_step_hooks():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    assert not torch_compat.has_step_hooks(optimizer)
    for register in (
        optimizer.register_step_pre_hook,
        optimizer.register_step_post_hook,
        register_optimizer_step_pre_hook,
        register_optimizer_step_post_hook,
    ):
        handle = register(lambda *_: None)
        assert torch_compat.has_step_hooks(optimizer)
        handle.remove()
    assert not torch_compat.has_step_hooks(optimizer)


def test_is_gloo_error(tmp_path):
    def make_group(rank):
        store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
        return torch.distributed.ProcessGroupGloo(store, rank, 2, timedelta(seconds=30))

    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(make_group, range(2)))
    # the peer exits
    del groups[1]
    with pytest.raises(RuntimeError) as raised:
        groups[0].allreduce([torch.ones(1)]).wait()
    assert torch_compat.is_gloo_error(raised.value)
    assert not torch_compat.is_gloo_error(RuntimeError("size mismatch"))


def test_rejected_type(tmp_path):
    torch.save({"value": Path("x")}, tmp_path / "x.pt")
    with pytest.raises(pickle.UnpicklingError) as raised:
        torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch_compat.rejected_type(raised.value) == f"{type(Path('x')).__module__}.{type(Path('x')).__name__}"
    assert torch_compat.rejected_type(OSError()) is None
