"""Private functions and local variables of Gymnasium."""

import traceback

from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv


def failed_env_index(error: BaseException) -> int | None:
    """The index of the environment of a Sync or AsyncVectorEnv that raised an error; None if it is unknown.

    Gymnasium does not report it. It is read from local variables in the traceback.
    """
    index: int | None = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        function, owner = frame.f_code.co_name, frame.f_locals.get("self")
        if isinstance(owner, SyncVectorEnv) and function in ("reset", "step"):
            index = frame.f_locals.get("i", index)
        elif isinstance(owner, AsyncVectorEnv) and function == "_raise_if_errors":
            index = frame.f_locals.get("index", index)
    return index
