"""What can be refused before an environment is made or a step is played."""

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
    """Try out what costs nothing to make; the data side looks at its own knobs before it makes an environment.

    Args:
        run: the configuration of a subcommand.

    Raises:
        ValueError: if a value is out of its range.
    """
    for owner, key in (
        (SoftTargetUpdate, "target_update"),
        (EpsilonDecay, "epsilon"),
        (PriorityUpdate, "priorities"),
        (EpisodePlot, "plot"),
        (AgentVideo, "video"),
    ):
        owner(**run[key].as_dict())
    optimizer = run.get("model.init_args.optimizer")
    lr = optimizer.get("init_args.lr") if isinstance(optimizer, Namespace) else None
    if isinstance(lr, (int, float)) and not lr > 0:
        raise ValueError(f"model.optimizer.lr={lr}: must be positive")


def check_writable(folder: Path) -> None:
    """See that a folder takes files: nobody wants to know an hour later.

    Args:
        folder: that exists.

    Raises:
        OSError: if it does not take a file of 1 MiB.
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
    """See that what torchrun or srun has started are the ranks of one run: otherwise each would train alone.

    Args:
        trainer: of the run.

    Raises:
        ValueError: if they started several processes, and not as many as the trainer has ranks.
    """
    starter, started = processes_started()
    if started > 1 and started != trainer.num_devices * trainer.num_nodes:
        raise ValueError(
            f"trainer.devices={trainer.num_devices}, trainer.num_nodes={trainer.num_nodes}: but {starter} has started "
            f"{started} processes; say how many of them each machine has, and how many machines there are"
        )
