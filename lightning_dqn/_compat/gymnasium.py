"""What Gymnasium's public API does not give."""

import traceback

# by module and function: the local variable with the index of the environment that is stepped or reset
INDEX_VARIABLES = {
    ("gymnasium.vector.sync_vector_env", "step"): "i",
    ("gymnasium.vector.sync_vector_env", "reset"): "i",
    ("gymnasium.vector.async_vector_env", "_raise_if_errors"): "index",
}


def failed_env_index(error: BaseException) -> int | None:
    """Index of the environment that raised in a SyncVectorEnv or AsyncVectorEnv, read from the traceback.

    Args:
        error: exception raised by `reset`, `step` or `step_wait`.

    Returns:
        The index; None if the traceback does not contain it.
    """
    index = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        variable = INDEX_VARIABLES.get((frame.f_globals.get("__name__", ""), frame.f_code.co_name))
        if variable is not None:
            index = frame.f_locals.get(variable, index)
    return index
