"""Corrections of Lightning's state of a fit, needed for an exact resume."""

from collections import Counter
from typing import Any


def plain_schedules(states: list[dict[str, Any]]) -> None:
    """Convert the states of learning rate schedules to plain values: the Counter of MultiStepLR becomes a dict.

    Args:
        states: of a checkpoint; changed in place.
    """
    for state in states:
        state |= {name: dict(value) for name, value in state.items() if isinstance(value, Counter)}


def count_chunks(fit_loop: dict[str, Any], complete: int, epoch_is_over: bool) -> None:
    """Count the chunks of the epoch anew: one that a signal cut is not complete, and their length may have changed.

    Args:
        fit_loop: Lightning's progress in a checkpoint; changed in place.
        complete: chunks that are complete.
        epoch_is_over: whether there are no more.
    """
    batches = fit_loop["epoch_loop.batch_progress"]
    difference = complete - batches["current"]["processed"]
    for progress in (batches["current"], batches["total"]):
        for name in progress:
            progress[name] += difference
        if not complete:
            # an epoch without complete chunks begins like a new one
            progress["completed"] = progress["processed"]
    # which Lightning increments when it goes on after a complete chunk
    begins = not complete and difference < 0
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] += difference + begins
    if difference < 0 and not epoch_is_over:
        batches["is_last_batch"] = False


def repair_loop_progress(fit_loop: dict[str, Any]) -> None:
    """Correct the progress of an unfinished epoch, so that a resume runs its other iterations and its evaluation.

    Lightning counts an epoch that `max_steps` ended as completed, and would skip its other iterations. It would also
    skip the evaluation of an epoch that was saved right after its last iteration.

    Args:
        fit_loop: Lightning's progress in a checkpoint; changed in place.
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
