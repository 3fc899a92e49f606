"""Startup times of this package's command line, and of a process that only imports the packages of such a run.

Imports packages in functions, so that their import time is measured.
"""

import sys
import time
from typing import Any

from benchmarks.settings import ENV_ID, Job, Result


def ours(job: Job) -> Result:
    """Seconds from the start of the process to the end of the first update of a plain `python -m lightning_dqn fit`."""
    from lightning_dqn.cli import main  # noqa: PLC0415  # part of the measured startup

    words = ["fit", "--trainer.default_root_dir", job.scratch, "--data.eval_episodes", "1"]
    words += ["--trainer.callbacks+=benchmarks.first_update.FirstUpdateClock", "--model.compile", "false"]
    main(words)
    from benchmarks.first_update import FirstUpdateClock  # noqa: PLC0415  # imports Lightning, which is part of the measured startup

    return {
        "figures": {"startup_s": FirstUpdateClock.done_at - job.launched_at},
        "notes": {"packages": _packages(FirstUpdateClock.modules)},
    }


def bare(job: Job) -> Result:
    """Seconds from process start until torch, Lightning and Gymnasium are imported and an environment is made."""
    import gymnasium as gym  # noqa: PLC0415  # part of the measured startup
    import lightning.pytorch  # noqa: F401, PLC0415
    import torch  # noqa: F401, PLC0415

    gym.make(ENV_ID)
    return {"figures": {"startup_s": time.time() - job.launched_at}, "notes": {"packages": _packages(sys.modules)}}


def _packages(modules: Any) -> list[str]:
    """Installed packages among module names."""
    names = {name.partition(".")[0] for name in modules}
    return sorted(name for name in names if name not in sys.stdlib_module_names and not name.startswith("_"))
