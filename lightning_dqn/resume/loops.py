"""Corrections of Lightning's state of a fit, needed for an exact resume."""

from typing import Any


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
