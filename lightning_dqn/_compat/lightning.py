"""Private attributes, loop progress, callback states and message texts of Lightning."""

import logging
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden

if TYPE_CHECKING:
    # takes half a second to import
    from lightning.pytorch.cli import LightningCLI

# hooks that Lightning calls during `zero_grad`, `backward`, `clip_gradients` and `step`
UPDATE_HOOKS = (
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "backward",
    "configure_gradient_clipping",
    "optimizer_step",
    "optimizer_zero_grad",
)
# file name pattern of the checkpoints that Lightning saves before SLURM requeues a job
SLURM_CHECKPOINTS = "hpc_ckpt_*.ckpt"
# warnings that do not apply to this package
IGNORED_WARNINGS = (
    # the statistics are logged by iterations, not by batches
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # metrics are reduced over ranks before they are logged
    ".*sync_dist=True",
    # the data module has the state that the loader lacks
    "You're resuming from a checkpoint that ended before the epoch ended",
)


def counted_step(optimizer: LightningOptimizer, step: Callable[[], Any]) -> None:
    """Run `step` as an optimizer step that Lightning counts in `global_step`, without its closure and its hooks."""
    optimizer._on_before_step()
    step()
    optimizer._on_after_step()


def overrides_update_hook(trainer: Trainer) -> bool:
    """Whether the module or a callback overrides a hook that Lightning calls during an update."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(
        is_overridden(hook, owner, base)
        for hook in UPDATE_HOOKS
        for owner, base in [(trainer.lightning_module, LightningModule), *((each, Callback) for each in callbacks)]
        if hasattr(base, hook)
    )


def is_plain_allreduce(strategy: Strategy) -> bool:
    """Whether a strategy only averages gradients over ranks, if there are several."""
    if isinstance(strategy, DDPStrategy):
        return strategy._ddp_comm_hook is None and strategy._ddp_comm_state is None
    return isinstance(strategy, SingleDeviceStrategy)


def counts_updates(trainer: Trainer) -> bool:
    """Whether a trainer stops or saves after a given number of updates, which it checks after each batch."""
    callbacks = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    return trainer.max_steps >= 0 or any(each._every_n_train_steps > 0 for each in callbacks)


def attached_trainer(module: LightningModule) -> Trainer | None:
    """The trainer of a module; None if `module.trainer` raises RuntimeError."""
    return module._trainer


def collective_timeout(strategy: Strategy) -> timedelta | None:
    """The timeout of a strategy's collective calls; None for strategies without."""
    return getattr(strategy, "_timeout", None)


def broadcast_root_dir(trainer: Trainer) -> None:
    """Set `trainer.default_root_dir` of all ranks to that of rank 0."""
    trainer._default_root_dir = trainer.strategy.broadcast(trainer.default_root_dir)  # type: ignore[attr-defined]


def wandb_init_args(logger: WandbLogger) -> dict[str, Any]:
    """The arguments that a logger will pass to `wandb.init`; changes to the dict take effect."""
    return logger._wandb_init


def remove_callback_argument(cli: "LightningCLI", subcommand: str, key: str) -> None:
    """Exclude a callback that was added by `add_lightning_class_args(..., key)` from the trainer of a subcommand."""
    cli._parser(subcommand).callback_keys.remove(key)


def silence_tips() -> None:
    """Suppress Lightning's tips about other products."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "💡 Tip" not in str(record.msg))


def ignore_intended_warnings() -> None:
    """Ignore the warnings of `IGNORED_WARNINGS` in this process."""
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def ignore_pytree_deprecation() -> None:
    """Ignore the warning about Lightning's use of a deprecated function of torch's pytree."""
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")


def ignore_checkpoint_folder_warning() -> None:
    """Ignore the warning that a checkpoint folder is not empty, as in every resumed run."""
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")


def optimizer_steps(fit_loop: dict[str, Any]) -> int:
    """The number of completed optimizer steps in a fit loop's state, with manual optimization."""
    steps: int = fit_loop["epoch_loop.manual_optimization.optim_step_progress"]["total"]["completed"]
    return steps


def repair_loop_progress(fit_loop: dict[str, Any]) -> None:
    """Correct the progress of an unfinished epoch, so that a resume runs its remaining iterations and its evaluation.

    Lightning counts an epoch that `max_steps` ended as completed, and would skip the rest of its iterations. It would
    also skip the evaluation of an epoch that was saved right after its last iteration.

    Args:
        fit_loop: state of the fit loop in a checkpoint; changed in place.
    """
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
    evaluation = fit_loop["epoch_loop.val_loop.batch_progress"]
    ended = epochs["current"]["processed"] == epochs["current"]["ready"] > 0
    if ended:
        # the last branch below counts it as unfinished
        evaluation["total"]["ready"] = evaluation["total"]["started"] = evaluation["total"]["processed"]
    if ended and not batches["is_last_batch"]:
        # the progress after the last batch
        for progress in (epochs["current"], epochs["total"]):
            progress["completed"] -= progress["completed"] == progress["processed"]
            progress["processed"] -= 1
        for progress in (batches["current"], batches["total"]):
            progress["completed"] -= 1
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    elif not ended and batches["is_last_batch"] and batches["current"]["completed"] < batches["current"]["processed"]:
        # the progress during the first episode of the evaluation, which restarts with that episode
        for progress in (batches["current"], batches["total"]):
            progress["completed"] += 1
        for progress in (evaluation["current"], evaluation["total"]):
            progress["ready"] = progress["started"] = progress["processed"] + 1


def count_chunks(fit_loop: dict[str, Any], complete: int, epoch_is_over: bool) -> None:
    """Recount the chunks of the epoch: a signal may have cut the last one, and their length may have changed.

    Args:
        fit_loop: state of the fit loop in a checkpoint; changed in place.
        complete: number of complete chunks.
        epoch_is_over: whether the epoch has no iterations left.
    """
    batches = fit_loop["epoch_loop.batch_progress"]
    difference = complete - batches["current"]["processed"]
    for progress in (batches["current"], batches["total"]):
        for name in progress:
            progress[name] += difference
        if not complete:
            # an epoch without complete chunks begins like a new one
            progress["completed"] = progress["processed"]
    # Lightning increments it when it resumes after a complete chunk
    begins = not complete and difference < 0
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] += difference + begins
    if difference < 0 and not epoch_is_over:
        batches["is_last_batch"] = False


def relocate_checkpoints(state: dict[str, Any], folder: str, *, monitored: bool) -> None:
    """Replace the folder in the state of a `ModelCheckpoint`.

    Lightning resets the best score if the path of the folder has changed, and would overwrite the best checkpoint.

    Args:
        state: state of the callback in a checkpoint; changed in place.
        folder: current folder of the checkpoints.
        monitored: whether the callback monitors a metric.
    """
    if not monitored and state["dirpath"] != folder:
        # Lightning would remove it after the next save, if it is in a folder below this one
        state["best_model_path"] = ""
    if state["dirpath"] in (None, folder):
        return
    names = ("best_model_path", "kth_best_model_path", "last_model_path")
    if (Path(folder) / Path(state["best_model_path"]).name).is_file():
        moved = {path: str(Path(folder) / Path(path).name) for path in state["best_k_models"]}
        state["best_k_models"] = {moved[path]: score for path, score in state["best_k_models"].items()}
        state.update({name: state[name] and str(Path(folder) / Path(state[name]).name) for name in names})
    else:
        # the checkpoint was copied without the best one of its run
        state.update(dict.fromkeys(names, ""), best_model_score=None, best_k_models={}, kth_value=None)
    state["dirpath"] = folder
