"""What Lightning's own account of a fit lacks, so that a run resumes exactly."""

from collections import Counter
from typing import Any


def plain_schedules(states: list[dict[str, Any]]) -> None:
    """Let the states of learning rate schedules hold plain values: MultiStepLR has a Counter, a dict serves it as well.

    Args:
        states: of a checkpoint; changed in place.
    """
    for state in states:
        state |= {name: dict(value) for name, value in state.items() if isinstance(value, Counter)}


def repair_loop_progress(fit_loop: dict[str, Any]) -> None:
    """Let an epoch that was cut short resume with the rest of its iterations, and with its evaluation.

    Lightning counts an epoch that `max_steps` has cut as completed, and would leave its rest out. Of an epoch that was
    saved right after its last iteration it would leave the evaluation out.

    Args:
        fit_loop: Lightning's progress in a checkpoint; changed in place.
    """
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
    evaluation = fit_loop["epoch_loop.val_loop.batch_progress"]
    ended = epochs["current"]["processed"] == epochs["current"]["ready"] > 0
    if ended:
        # counted as under way by the last branch below
        evaluation["total"]["ready"] = evaluation["total"]["started"] = evaluation["total"]["processed"]
    if ended and not batches["is_last_batch"]:
        # as it would have been counted after the last batch
        for progress in (epochs["current"], epochs["total"]):
            progress["completed"] -= progress["completed"] == progress["processed"]
            progress["processed"] -= 1
        for progress in (batches["current"], batches["total"]):
            progress["completed"] -= 1
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    elif not ended and batches["is_last_batch"] and batches["current"]["completed"] < batches["current"]["processed"]:
        # as it would be counted in the first episode of the evaluation, which is then played from the start
        for progress in (batches["current"], batches["total"]):
            progress["completed"] += 1
        for progress in (evaluation["current"], evaluation["total"]):
            progress["ready"] = progress["started"] = progress["processed"] + 1
