"""What a fit needs, beside what Lightning notes of it, to go on from a checkpoint as if it had never stopped.

Asked by `module.DQN`: the random generators that the whole process shares (dropout and noisy networks draw from
torch's, an environment may draw from Python's or NumPy's), and the gaps in Lightning's own account.
"""

import random
from collections import Counter
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer

from lightning_dqn.shares import save_share, take_up_share


def prepare_to_go_on(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Close the gaps in a checkpoint that a trainer has read, before it takes up anything of it.

    Args:
        checkpoint: changed in place.
        trainer: that is about to go on from it.

    Raises:
        MisconfigurationException: if it is of a run with another data side.
    """
    # Lightning passes over the state of a data side that the checkpoint lacks, without a word
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if hasattr(data, "check_checkpoint"):
        data.check_checkpoint(checkpoint)
        take_up_share(checkpoint, trainer)
    _mend_epoch(checkpoint["loops"]["fit_loop"])


def prepare_to_save(checkpoint: dict[str, Any], trainer: Trainer | None) -> None:
    """Let a checkpoint hold schedules as plain values, and name what all ranks but the first keep of it.

    Args:
        checkpoint: that is complete, but for the shares of other ranks; changed in place.
        trainer: of the run, if there is one.
    """
    # MultiStepLR keeps a Counter, and a dict serves it as well
    for state in checkpoint.get("lr_schedulers", []):
        state |= {name: dict(value) for name, value in state.items() if isinstance(value, Counter)}
    if trainer is not None:
        save_share(checkpoint, trainer)


def _mend_epoch(fit_loop: dict[str, Any]) -> None:
    """Let an epoch that a stop has cut have the rest of its iterations, and its evaluation.

    Lightning counts an epoch that `max_steps` has cut as over, and would leave its rest out. Of one that was saved
    right after its last iteration it would leave the evaluation out.
    """
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
    evaluation = fit_loop["epoch_loop.val_loop.batch_progress"]
    ended = epochs["current"]["processed"] == epochs["current"]["ready"] > 0
    if ended:
        # left one apart by the note below
        evaluation["total"]["ready"] = evaluation["total"]["started"] = evaluation["total"]["processed"]
    if ended and not batches["is_last_batch"]:
        # as it would have been noted after the last batch
        for progress in (epochs["current"], epochs["total"]):
            progress["completed"] -= progress["completed"] == progress["processed"]
            progress["processed"] -= 1
        for progress in (batches["current"], batches["total"]):
            progress["completed"] -= 1
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    elif not ended and batches["is_last_batch"] and batches["current"]["completed"] < batches["current"]["processed"]:
        # as it would be noted in the first episode of the evaluation, which is then played from the start
        for progress in (batches["current"], batches["total"]):
            progress["completed"] += 1
        for progress in (evaluation["current"], evaluation["total"]):
            progress["ready"] = progress["started"] = progress["processed"] + 1


def generators_state(device: torch.device) -> dict[str, Any]:
    """Where torch's generators (of the CPU and of the device), Python's and NumPy's stand, as tensors and plain values.

    Args:
        device: that is trained on.
    """
    version, words, gauss = random.getstate()
    kind, key, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [str(kind), torch.from_numpy(np.array(key, np.int64)), int(position), int(has_gauss), float(cached)],
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def start_generators(state: dict[str, Any] | None, device: torch.device, *, rank: int, updates: int) -> None:
    """Set the generators for a fit that begins or goes on.

    All ranks of a new run have been given the same seed, by which their networks are equal; what they draw from here on
    shall differ. Nor shall a run that goes on without its generators draw what it began with.

    Args:
        state: what `generators_state` gave, if that is known.
        device: that is trained on.
        rank: this one.
        updates: that the run has made.
    """
    if state is not None:
        _set_generators(state, device)
    elif rank or updates:
        seeds = np.random.SeedSequence([torch.initial_seed(), rank, updates]).generate_state(3)
        torch.manual_seed(int(seeds[0]))
        random.seed(int(seeds[1]))
        np.random.seed(seeds[2])


def _set_generators(state: dict[str, Any], device: torch.device) -> None:
    """Put the generators back where `generators_state` found them; one of a device only on a device of that kind.

    Args:
        state: what `generators_state` gave.
        device: that is trained on.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, key, *others = state["numpy"]
    np.random.set_state((kind, key.numpy().astype(np.uint32), *others))
    torch.set_rng_state(state["torch"])
    if device.type in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type])
