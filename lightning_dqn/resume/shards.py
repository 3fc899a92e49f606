"""Saves and loads each rank's shard of a checkpoint: environments, part of the memory, random generators.

Rank 0 saves its shard in the checkpoint itself, as a single process does; every other rank writes a file beside it. The
checkpoint names all files and is renamed last, so that a checkpoint is complete or absent.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_dqn.distributed.rank_check import weights_digest
from lightning_dqn.resume.content import ENTRY, check_dict
from lightning_dqn.resume.rng import check_rng_state

# key of the paths of the other ranks' shards in a loaded checkpoint; in its file the names are under ENTRY
SHARDS = "shares"
REMEDY = "use Trainer(plugins=[lightning_dqn.resume.AtomicCheckpointIO()])"


def check_plugin(trainer: Trainer) -> None:
    """Check that the checkpoint plugin can save the shards of several ranks.

    Raises:
        MisconfigurationException: if the plugin saves rank 0 only.
    """
    if trainer.world_size > 1 and trainer.checkpoint_callbacks:
        _plugin(trainer)


def save_shard(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Write the shard of this rank, and add the paths of all shards to the checkpoint. All ranks must call it.

    Args:
        checkpoint: checkpoint with the state of this rank; changed in place.
        trainer: trainer of the fit.

    Raises:
        CheckpointError: if the shard can't be written.
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
    """Replace the shard of rank 0 with that of this rank; with another world size, reshard.

    Args:
        checkpoint: the loaded checkpoint with the shard of rank 0; changed in place.
        trainer: trainer of the fit that resumes.

    Raises:
        CheckpointError: if a shard is missing or damaged.
        MisconfigurationException: if ranks have read different checkpoints, or the plugin loads rank 0 only.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if SHARDS in checkpoint.get(ENTRY, {}):
        raise MisconfigurationException(
            f"The checkpoint is of several ranks, of which {type(trainer.strategy.checkpoint_io).__name__} loads "
            f"rank 0 only: {REMEDY}"
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
        f"The checkpoint is of {then} rank{'s' * (then > 1)}, this run has {now}: the replay memory is resharded, "
        "unfinished episodes are kept as truncated. The resume is approximate."
    )
    others = [_read_shard(plugin, path, trainer)[name] for path in paths]
    checkpoint[name] = data.reshard_state([checkpoint[name], *others])
    # generators of the old ranks do not match the new ones
    del checkpoint["generators"]


def _read_shard(plugin: Any, path: str, trainer: Trainer) -> dict[str, Any]:
    """The shard of a rank, checked like the checkpoint; other entries of the file are dropped."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    module: Any = trainer.lightning_module
    name = type(data).__qualname__
    content = check_dict(plugin.load_checkpoint(path), path, (name, "generators"))
    data.check_checkpoint(content, has_memory=not module.on_policy)
    check_rng_state(content["generators"], f"{path}: generators")
    return {key: content[key] for key in (name, "generators")}


def _check_same_checkpoint(checkpoint: dict[str, Any], trainer: Trainer, sync: Any) -> None:
    """Check that all ranks have read the same checkpoint: each resolves `last` or a path for itself."""
    read = sync.gather((str(trainer.ckpt_path), checkpoint["global_step"], weights_digest(checkpoint["state_dict"])))
    for rank, other in enumerate(read):
        # its path may differ between machines
        if other[1:] != read[0][1:]:
            raise MisconfigurationException(
                f"Rank 0 resumes from {read[0][0]}, rank {rank} from {other[0]}, which is another checkpoint: give a "
                "path that all ranks can read"
            )


def _plugin(trainer: Trainer) -> Any:
    plugin = trainer.strategy.checkpoint_io
    # profilers and asynchronous plugins wrap it
    plugin = getattr(plugin, "checkpoint_io", None) or plugin
    if not hasattr(plugin, "save_shard"):
        raise MisconfigurationException(
            f"{type(plugin).__name__} saves rank 0 only, of {trainer.world_size} ranks: {REMEDY}"
        )
    return plugin


def _folder(trainer: Trainer) -> Path:
    """The folder of the shards: that of the run's checkpoints."""
    callback = trainer.checkpoint_callback
    return Path(getattr(callback, "dirpath", None) or trainer.default_root_dir)
