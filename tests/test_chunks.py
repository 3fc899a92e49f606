"""Chunks: several iterations that Lightning takes for one batch change nothing but when Lightning looks."""

import os
import signal

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from runs import differences, load, make_pair, small_mlp

from lightning_dqn import PQN, EpsilonDecay, PrioritizedSampler, PriorityUpdate, SoftTargetUpdate
from lightning_dqn.callbacks import UpdateCallback
from lightning_dqn.resume.checkpoint_io import AtomicCheckpointIO
from lightning_dqn.resume.stop_on_signal import StopOnSignal

PRIORITIZED = {
    **{"num_envs": 3, "updates_per_iteration": 2, "n_step": 3, "sampler": PrioritizedSampler},
    **{"epoch_env_steps": 240, "memory_capacity": 200},
}
SETTINGS = {
    "textbook": {"epoch_env_steps": 130},
    "prioritized": PRIORITIZED,
    "hard target by env steps": {"epoch_env_steps": 130, "target": {"tau": 1.0, "every_n_env_steps": 30}},
    "PQN": {
        **{"model": PQN, "num_envs": 2, "steps_per_iteration": 8, "updates_per_iteration": 2, "batch_size": 8},
        **{"epoch_env_steps": 240},
    },
}


class Record(UpdateCallback):
    """The clocks, epsilon, beta and the target net at each env step and each draw."""

    def __init__(self):
        self.steps, self.draws, self.chunks = [], [], 0

    def on_train_start(self, trainer, pl_module):
        dataset = trainer.datamodule.train_dataset
        policy = dataset.collector.policy

        def recorded(*inputs):
            target = 0.0 if pl_module.target_net is None else float(next(pl_module.target_net.parameters()).sum())
            self.steps.append((dataset.env_steps, trainer.global_step, pl_module.read_epsilon(), target))
            return policy(*inputs)

        dataset.collector.policy = recorded
        if dataset.memory is not None:
            draw = dataset.memory.sampler.draw

            def recorded_draw(*inputs):
                self.draws.append((dataset.env_steps, dataset.memory.sampler.beta))
                return draw(*inputs)

            dataset.memory.sampler.draw = recorded_draw

    def on_train_batch_end(self, *_):
        self.chunks += 1


class Save(UpdateCallback):
    """Saves a checkpoint when an iteration has brought the clock to a given env step, or sends a signal."""

    def __init__(self, env_steps, path=None, signum=None):
        self.env_steps, self.path, self.signum = env_steps, path, signum

    def on_iteration_end(self, trainer, pl_module, batch, results):
        if trainer.datamodule.env_steps >= self.env_steps:
            self.env_steps = float("inf")
            if self.path:
                trainer.save_checkpoint(self.path)
            else:
                os.kill(os.getpid(), self.signum)


def fit(folder, chunk, *callbacks, seed=3, ckpt_path=None, target=(), limits=None, **options):
    """A fit of 2 epochs that saves at their ends; its trainer and what was recorded."""
    pl.seed_everything(seed, verbose=False)
    os.environ["PL_GLOBAL_SEED"] = "3"
    model, data = make_pair(network=small_mlp, iterations_per_chunk=chunk, **options)
    record = Record()
    saved = ModelCheckpoint(folder, "epoch{epoch}", save_top_k=-1, auto_insert_metric_name=False)
    priorities = PriorityUpdate(anneal_env_steps=300)
    schedules = [SoftTargetUpdate(**dict(target)), EpsilonDecay(decay_env_steps=80), priorities]
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        plugins=[AtomicCheckpointIO()],
        callbacks=[*schedules, record, *callbacks, saved],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **(limits or {"max_epochs": 2}),
    )
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return trainer, record


def state(path):
    """A checkpoint without Lightning's counts of chunks."""
    checkpoint = load(path)
    del checkpoint["loops"]
    return checkpoint


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_env_steps_draws_and_updates_are_the_same_for_every_chunk_length(tmp_path, options):
    runs = {chunk: fit(tmp_path / str(chunk), chunk, **options) for chunk in (1, 2, 50)}
    trainer, single = runs[1]
    iterations = len(trainer.datamodule.train_dataset)
    assert trainer.global_step > 100 or options.get("model") is PQN
    assert len(single.steps) > 2 * iterations - 10
    assert len({epsilon for _, _, epsilon, _ in single.steps}) > 20
    for chunk, (_, record) in runs.items():
        assert record.chunks == 2 * -(-iterations // chunk)
        assert record.steps == single.steps
        assert record.draws == single.draws
        for epoch in ("epoch0.ckpt", "epoch1.ckpt"):
            assert not list(differences(state(tmp_path / "1" / epoch), state(tmp_path / str(chunk) / epoch)))


@pytest.mark.parametrize("options", [SETTINGS["textbook"], SETTINGS["prioritized"]], ids=["textbook", "prioritized"])
@pytest.mark.parametrize(("before", "after"), [(1, 50), (50, 1), (50, 7), (7, 50), (50, 50)])
def test_a_run_resumes_with_any_chunk_length(tmp_path, options, before, after):
    fit(tmp_path / "whole", 1, **options)
    fit(tmp_path / "first", before, Save(90, tmp_path / "middle.ckpt"), **options)
    fit(tmp_path / "rest", after, seed=77, ckpt_path=tmp_path / "middle.ckpt", **options)
    fit(tmp_path / "next", after, seed=77, ckpt_path=tmp_path / "first" / "epoch0.ckpt", **options)
    for epoch in ("epoch0.ckpt", "epoch1.ckpt"):
        assert not list(differences(state(tmp_path / "whole" / epoch), state(tmp_path / "rest" / epoch)))
    assert not list(differences(state(tmp_path / "whole" / "epoch1.ckpt"), state(tmp_path / "next" / "epoch1.ckpt")))
    assert not (tmp_path / "next" / "epoch0.ckpt").exists()


# in the first chunk, in the last chunk of the first epoch, and in its last iteration
@pytest.mark.parametrize("env_steps", [40, 121, 130])
def test_a_signal_ends_the_chunk_after_the_iteration_and_the_run_resumes_exactly(tmp_path, env_steps):
    options = SETTINGS["textbook"]
    fit(tmp_path / "whole", 50, **options)
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", 50, Save(env_steps, signum=signal.SIGTERM), StopOnSignal(), **options)
    (last,) = (tmp_path / "run").glob("**/last.ckpt")
    # the evaluation of an epoch comes before a stop
    assert load(last)["DQNDataModule"]["train"]["all_env_steps"] == env_steps + (env_steps == 130)
    fit(tmp_path / "run", 50, seed=77, ckpt_path=last, **options)
    for epoch in ("epoch0.ckpt", "epoch1.ckpt"):
        assert not list(differences(load(tmp_path / "whole" / epoch), load(tmp_path / "run" / epoch)))


def test_a_trainer_that_counts_updates_sees_every_iteration(tmp_path):
    counted = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=33)
    fit(tmp_path, 50, counted, epoch_env_steps=130)
    # 49 of 260 env steps make no update
    assert {path.stem for path in tmp_path.glob("step*")} == {f"step={n}" for n in range(33, 211, 33)}
    trainer, record = fit(tmp_path, 50, limits={"max_steps": 20}, epoch_env_steps=130)
    assert trainer.global_step == 20
    assert record.chunks == trainer.datamodule.env_steps == 69


def test_a_batch_size_that_lightning_looks_for_plays_no_env_steps(tmp_path):
    class Log(UpdateCallback):
        def on_iteration_end(self, trainer, pl_module, batch, results):
            with pytest.raises(MisconfigurationException, match="batch_size"):
                pl_module.log("mine", 1.0, on_epoch=True)
            pl_module.log("mine", 1.0, on_epoch=True, batch_size=16)

    _, single = fit(tmp_path / "plain", 50, **SETTINGS["textbook"])
    trainer, record = fit(tmp_path / "logged", 50, Log(), **SETTINGS["textbook"])
    assert record.steps == single.steps
    assert trainer.callback_metrics["mine"] == 1


def test_the_default_length_makes_32_updates_or_steps_of_an_environment(tmp_path):
    for options, chunks in [({}, 5), ({"updates_per_iteration": 4}, 17), ({"steps_per_iteration": 130}, 1)]:
        _, record = fit(tmp_path, None, epoch_env_steps=130, limits={"max_epochs": 1}, **options)
        assert record.chunks == chunks


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_has_at_least_one_iteration(chunk):
    with pytest.raises(ValueError, match=f"iterations_per_chunk={chunk}"):
        make_pair(iterations_per_chunk=chunk)
