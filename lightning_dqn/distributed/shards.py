"""What each of several ranks keeps of a checkpoint: its environments, its part of the memory, its random generators.

The first rank's lie in the checkpoint itself, as those of a run of one; every other rank writes its own into a file
beside it, and the checkpoint, which names them all, is renamed last: with it all are there, or none.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_dqn.resume.content import ENTRY, check_dict
from lightning_dqn.resume.rng import check_rng_state
from lightning_dqn.resume.training_state import weights_digest

# where a checkpoint names the shares of the other ranks, as paths; in its file it does so within ENTRY
SHARDS = "shares"
REMEDY = "use Trainer(plugins=[lightning_dqn.resume.AtomicCheckpointIO()])"


def check_plugin(trainer: Trainer) -> None:
    """See that checkpoints of several ranks can hold what all of them need to go on.

    Raises:
        MisconfigurationException: if the plugin that writes them knows of the first rank alone.
    """
    if trainer.world_size > 1 and trainer.checkpoint_callbacks:
        _plugin(trainer)


def save_shard(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Let a checkpoint of several ranks name the shares of all, which this writes; called on every rank alike.

    Args:
        checkpoint: as all ranks have it, but for their own; changed in place.
        trainer: of the fit.

    Raises:
        CheckpointError: if this rank's can't be written.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    name = type(data).__qualname__
    if trainer.world_size == 1 or name not in checkpoint:
        return
    plugin = _plugin(trainer)
    folder = trainer.strategy.broadcast(str(_folder(trainer)))
    own = {key: checkpoint[key] for key in (name, "generators")}
    path = str(plugin.save_shard(own, folder)) if trainer.global_rank else ""
    checkpoint[SHARDS] = data.sync.gather(path)[1:]


def load_shard(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Put this rank's share in the place of the first one's; of another number of ranks, all are dealt anew.

    Args:
        checkpoint: as it was read, the first rank's; changed in place.
        trainer: that is about to go on from it.

    Raises:
        CheckpointError: if a share is missing or damaged.
        MisconfigurationException: if another rank has read another checkpoint, or it was read without its shares.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if SHARDS in checkpoint.get(ENTRY, {}):
        raise MisconfigurationException(
            f"The checkpoint is of several ranks, of which {type(trainer.strategy.checkpoint_io).__name__} knows the "
            f"first alone: {REMEDY}"
        )
    paths = checkpoint.get(SHARDS, [])
    then, now = 1 + len(paths), trainer.world_size
    if then == now == 1:
        return
    if now > 1:
        _check_same_checkpoint(checkpoint, trainer, data.sync)
    plugin, name = _plugin(trainer), type(data).__qualname__
    if then == now:
        if trainer.global_rank:
            checkpoint |= _read_shard(plugin, paths[trainer.global_rank - 1], trainer)
        return
    rank_zero_info(
        f"The checkpoint is of {then} rank{'s' * (then > 1)}, this run has {now}: the shares of the memory are dealt "
        "anew, with the episodes under way kept as truncated. The run goes on, but not as if unstopped."
    )
    others = [_read_shard(plugin, path, trainer)[name] for path in paths]
    checkpoint[name] = data.reshard_state([checkpoint[name], *others])
    # they were of ranks that are no more
    del checkpoint["generators"]
    _rescale_epoch(checkpoint["loops"]["fit_loop"], then / now, len(data.train_dataset))


def _read_shard(plugin: Any, path: str, trainer: Trainer) -> dict[str, Any]:
    """What a rank resumes from beside the checkpoint, checked as that was, and nothing else that the file may hold."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    module: Any = trainer.lightning_module
    name = type(data).__qualname__
    content = check_dict(plugin.load_checkpoint(path), path, (name, "generators"))
    data.check_checkpoint(content, has_memory=not module.on_policy)
    check_rng_state(content["generators"], f"{path}: generators")
    return {key: content[key] for key in (name, "generators")}


def _check_same_checkpoint(checkpoint: dict[str, Any], trainer: Trainer, sync: Any) -> None:
    """Each rank finds its checkpoint for itself, by the words of the same command; say so where they are several."""
    read = sync.gather((str(trainer.ckpt_path), checkpoint["global_step"], weights_digest(checkpoint["state_dict"])))
    for rank, other in enumerate(read):
        # machines may have it under different names
        if other[1:] != read[0][1:]:
            raise MisconfigurationException(
                f"Rank 0 goes on from {read[0][0]}, rank {rank} from {other[0]}, which is another checkpoint: give the "
                "path of one that all ranks see"
            )


def _rescale_epoch(fit_loop: dict[str, Any], factor: float, length: int) -> None:
    """Let the iterations of an epoch under way count for as many env steps as they did.

    Args:
        fit_loop: Lightning's account of it; changed in place.
        factor: how much fewer env steps an iteration has now.
        length: iterations in an epoch now.
    """
    batches = fit_loop["epoch_loop.batch_progress"]
    done = batches["current"]["processed"]
    here = length if batches["is_last_batch"] else min(round(done * factor), length - 1)
    for name in batches["current"]:
        batches["current"][name] += here - done


def _plugin(trainer: Trainer) -> Any:
    plugin = trainer.strategy.checkpoint_io
    # the profiler's and other wrappers hold it
    plugin = getattr(plugin, "checkpoint_io", None) or plugin
    if not hasattr(plugin, "save_shard"):
        raise MisconfigurationException(
            f"{type(plugin).__name__} saves what the first of {trainer.world_size} ranks has, alone: {REMEDY}"
        )
    return plugin


def _folder(trainer: Trainer) -> Path:
    """Where shares are written: beside the checkpoints of the run."""
    callback = trainer.checkpoint_callback
    return Path(getattr(callback, "dirpath", None) or trainer.default_root_dir)
