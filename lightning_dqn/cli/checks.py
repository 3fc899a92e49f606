"""Checks of the configuration before an environment is created."""

import os
from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch import Trainer

from lightning_dqn.callbacks import EpsilonDecay, PriorityUpdate, SoftTargetUpdate
from lightning_dqn.distributed.sync import processes_started
from lightning_dqn.monitoring.agent_video import AgentVideo
from lightning_dqn.monitoring.episode_plot import EpisodePlot

PROBE_BYTES = 2**20


def check_arguments(run: Namespace) -> None:
    """Check the arguments of callbacks and of the optimizer; the data module checks its own.

    Args:
        run: the configuration of a subcommand.

    Raises:
        ValueError: if a value is out of its range.
    """
    owners: dict[str, type] = {
        **{"target_update": SoftTargetUpdate, "priorities": PriorityUpdate, "plot": EpisodePlot, "video": AgentVideo},
    }
    arguments = {key: run[key].as_dict() for key in owners}
    if run.epsilon.class_path == "lightning_dqn.EpsilonDecay":
        owners["epsilon"], arguments["epsilon"] = EpsilonDecay, run.epsilon.init_args.as_dict()
    for key, owner in owners.items():
        try:
            owner(**arguments[key])
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith(f"{key}.") else f"{key}.{text}") from error
    optimizer = run.get("model.init_args.optimizer")
    lr = optimizer.get("init_args.lr") if isinstance(optimizer, Namespace) else None
    if isinstance(lr, (int, float)) and not lr > 0:
        raise ValueError(f"model.optimizer.lr={lr}: must be positive")


def check_writable(folder: Path) -> None:
    """Check that a folder is writable.

    Args:
        folder: existing folder.

    Raises:
        OSError: if a file of 1 MiB can't be written.
    """
    probe = folder / f".writable-{os.getpid()}"
    try:
        with probe.open("xb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def check_processes(trainer: Trainer) -> None:
    """Check that the processes that torchrun or srun started are the ranks of one run, not separate runs.

    Args:
        trainer: trainer of the run.

    Raises:
        ValueError: if they started several processes, but not one per rank.
    """
    starter, started = processes_started()
    if started > 1 and started != trainer.num_devices * trainer.num_nodes:
        raise ValueError(
            f"trainer.devices={trainer.num_devices}, trainer.num_nodes={trainer.num_nodes}: but {starter} has started "
            f"{started} processes; set devices to those of each machine, and num_nodes to the number of machines"
        )
