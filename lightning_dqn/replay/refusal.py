"""Which state a memory can take up: refuses that of another kind before anything of it is taken over."""

from collections.abc import Mapping
from typing import Any


def refuse_other(state: Mapping[str, Any], own: Mapping[str, Any], sampler: str) -> None:
    """Compare the state of some memory with that of the memory which shall take it up.

    Args:
        state: as `ReplayMemory.state_dict` gave it.
        own: what it gives there now.
        sampler: the kind that is there.

    Raises:
        ValueError: naming what is not the same.
    """
    # before there was a choice, observations were kept as they were
    knobs = (("n_step", state["n_step"]), ("frame_stack", state.get("frame_stack", 1)))
    for knob, then in knobs:
        if then != own[knob]:
            raise ValueError(
                f"the checkpoint's memory was filled for data.{knob}={then}, this run has {own[knob]}: "
                "use the value that the checkpoint was made with"
            )
    if state["sampler"].keys() != own["sampler"].keys():
        raise ValueError(
            f"the checkpoint's memory had another kind of sampler, this run has {sampler}: "
            "use the data.sampler that the checkpoint was made with"
        )
    for name, rows in own["rows"].items():
        form, own_form = _form(state["rows"][name], state["slots"]), _form(rows, own["slots"])
        if form != own_form:
            raise ValueError(
                f"the checkpoint's memory has {name} rows of {' '.join(form)} (slots, envs, ...), "
                f"this run's are {' '.join(own_form)}: use the memory_capacity and num_envs that the "
                "checkpoint was made with"
            )


def _form(rows: Any, slots: int) -> tuple[str, str]:
    """Type and shape of all rows there is room for."""
    array = rows.numpy()
    return str(array.dtype), str((slots, *array.shape[1:]))
