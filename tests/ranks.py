"""Runs of several ranks: starts this file once for each, as Lightning would, and brings back what each has seen.

A job is what a rank does, a function of this file by its name, with arguments that JSON can hold.
"""

import functools
import hashlib
import json
import random
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from conftest import clean_environment, quiet_trainer
from torch import distributed

COLLECTIVES = ["all_reduce", "all_gather", "all_gather_object", "barrier", "broadcast"]
COLLECTIVES += ["broadcast_object_list", "reduce"]


def start(folder, job, *, world_size=2, **arguments):
    """One process for each rank, at work on a job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(world_size):
        places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
        env = clean_environment(folder, **places, LOCAL_RANK=str(rank), NODE_RANK="0", OMP_NUM_THREADS="1")
        words = [sys.executable, __file__, job, str(folder), str(rank), str(world_size), json.dumps(arguments)]
        output = (folder / f"output-{rank}.txt").open("w")
        processes.append(subprocess.Popen(words, env=env, cwd=folder, stdout=output, stderr=subprocess.STDOUT))
    return processes


def run(folder, job, *, world_size=2, timeout_s=300, **arguments):
    """Do a job on several ranks, and give what each brought back, in their order."""
    processes = start(folder, job, world_size=world_size, **arguments)
    end = time.monotonic() + timeout_s
    try:
        codes = [process.wait(max(1, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    texts = [(folder / f"output-{rank}.txt").read_text() for rank in range(world_size)]
    assert codes == [0] * world_size, "\n".join(texts)
    return [torch.load(folder / f"record-{rank}.pt", weights_only=False) for rank in range(world_size)]


def digest(net):
    """A hash of all weights."""
    content = b"".join(value.detach().contiguous().numpy().tobytes() for value in net.state_dict().values())
    return hashlib.sha256(content).hexdigest()


def witness(counts):
    """A callback that writes down what a rank has, iteration by iteration."""
    from lightning_dqn.callbacks import UpdateCallback  # noqa: PLC0415  only a rank pays for it

    class Witness(UpdateCallback):
        def __init__(self):
            names = "env_steps own_env_steps epsilon updates digests calls"
            self.record = {name: [] for name in names.split()}

        def on_iteration_end(self, trainer, pl_module, batch, results):
            record, data = self.record, trainer.datamodule
            record["env_steps"].append(data.env_steps)
            record["own_env_steps"].append(data.train_dataset.collector.env_steps)
            record["epsilon"].append(float(pl_module.epsilon))
            record["updates"].append(trainer.global_step)
            record["calls"].append(dict(counts))
            if "generators" not in record:
                states = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
                record["generators"] = [hashlib.sha256(repr(state).encode()).hexdigest() for state in states]
            if "first_batch" not in record and len(batch.reward):
                record["first_batch"] = batch.observation.clone()
            if trainer.global_step and trainer.global_step % 100 == 0:
                nets = [net for net in (pl_module.policy_net, pl_module.target_net) if net is not None]
                record["digests"].append(tuple(digest(net) for net in nets))

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_):
            self.record.setdefault("evaluated", []).append(float(batch.episode_return))

        def on_validation_end(self, trainer, pl_module):
            self.record.setdefault("evaluated_at", []).append(trainer.datamodule.env_steps)
            self.record["val"] = {name: float(value) for name, value in trainer.callback_metrics.items()}

    return Witness()


def watcher():
    """A callback that Lightning calls in the middle of each update."""
    from lightning.pytorch import Callback  # noqa: PLC0415  as above

    class Watcher(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            assert next(pl_module.policy_net.parameters()).grad is not None

    return Watcher()


def count_collectives():
    """Count the calls of torch.distributed from here on, by name."""
    counts = dict.fromkeys(COLLECTIVES, 0)

    def counted(name, call):
        def counting(*args, **kwargs):
            counts[name] += 1
            return call(*args, **kwargs)

        return counting

    for name in COLLECTIVES:
        setattr(distributed, name, counted(name, getattr(distributed, name)))
    return counts


def fits(folder, rank, world_size, *, jobs):
    """Train, one job after the other; see `runs.fit` for what may be in them."""
    import runs  # noqa: PLC0415
    from lightning.pytorch.callbacks import EarlyStopping  # noqa: PLC0415
    from lightning.pytorch.loggers import CSVLogger  # noqa: PLC0415

    import lightning_dqn  # noqa: PLC0415  as above
    from lightning_dqn.distributed.rank_check import RankCheck  # noqa: PLC0415
    from lightning_dqn.monitoring.episode_statistics import EpisodeStatistics  # noqa: PLC0415

    networks = {"Dropout": runs.Dropout, "noisy": functools.partial(lightning_dqn.MLP, noisy=True)}

    records = []
    for job in jobs:
        seen = witness(count_collectives())
        if job.pop("prioritized", False):
            job["sampler"] = lightning_dqn.PrioritizedSampler
        # who takes part in the steps of an update has Lightning make them, and its DDP reduce the gradient
        watchers = [watcher()] if job.pop("watched", False) else []
        if job.pop("hard to please", False):
            watchers.append(EarlyStopping("val/episode_return", mode="max", min_delta=1e9, patience=1))
        if "network" in job:
            job["network"] = networks[job["network"]]
        job["model"] = getattr(lightning_dqn, job.pop("model", "DQN"))
        strategy = {"devices": world_size, "strategy": "ddp"} if world_size > 1 else {}
        if job.pop("logged", False):
            watchers.append(EpisodeStatistics())
            strategy |= {"logger": CSVLogger(folder, "logged"), "log_every_n_steps": 1}
        trainer = runs.fit(
            Path(folder, job.pop("name")),
            callbacks=[seen, RankCheck(every_n_updates=100), *watchers],
            limits={"max_epochs": 2, **job.pop("limits", {}), **strategy},
            **job,
        )
        module, memory = trainer.lightning_module, getattr(trainer.datamodule.train_dataset, "memory", None)
        last = {"policy": module.policy_net.state_dict(), "ended_at": trainer.datamodule.episodes.env_steps}
        if memory is not None:
            last |= {"rows": len(memory), "slots": len(memory._drawable)}
        if module.normalizer is not None:
            last["normalizer"] = module.normalizer.state_dict()
        records.append({**seen.record, **last, "compiled": module.update_mode == "compiled"})
    return records


def one_changes_its_weights(folder, rank, world_size):
    """Let the second rank's weights be changed by a callback of its own, after 150 updates."""
    import runs  # noqa: PLC0415  as above
    from lightning.pytorch import Callback  # noqa: PLC0415

    from lightning_dqn.distributed.rank_check import RankCheck  # noqa: PLC0415

    class Meddler(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 150 and trainer.global_rank == 1:
                with torch.no_grad():
                    next(pl_module.policy_net.parameters())[0, 0] += 1e-6

    strategy = {"devices": world_size, "strategy": "ddp", "max_epochs": 2}
    runs.fit(Path(folder, "run"), callbacks=[Meddler(), RankCheck(every_n_updates=100)], limits=strategy)


def each_from_its_own(folder, rank, world_size, *, checkpoints):
    """Resume from another checkpoint than the other rank."""
    import runs  # noqa: PLC0415  as above

    limits = {"strategy": "ddp", "devices": world_size, "max_epochs": 3}
    runs.fit(Path(folder, "run"), ckpt_path=checkpoints[rank], limits=limits, epoch_env_steps=100)


def one_stops_responding(folder, rank, world_size):
    """Let the second rank do nothing more before the first update; how many seconds the first waited for it.

    Meetings have a group of their own, as where gradients travel between GPUs.
    """
    import runs  # noqa: PLC0415  as above
    from lightning.pytorch import Callback  # noqa: PLC0415
    from lightning.pytorch.strategies import DDPStrategy  # noqa: PLC0415

    from lightning_dqn.distributed.sync import RankLostError  # noqa: PLC0415

    class Sleeper(Callback):
        def on_train_batch_end(self, trainer, *_):
            self.last_seen = time.monotonic()
            if trainer.datamodule.env_steps == 20 and rank == 1:
                time.sleep(300)

    sleeper = Sleeper()
    ddp = DDPStrategy(process_group_backend="cpu:gloo", timeout=timedelta(seconds=20))
    try:
        runs.fit(Path(folder, "run"), callbacks=[sleeper], limits={"strategy": ddp, "devices": 2, "max_epochs": 2})
    except RankLostError:
        return time.monotonic() - sleeper.last_seen
    return None


def one_update(folder, rank, world_size, *, compile, sizes):
    """Move the weights by the gradient of a batch that all ranks have a part of; the gradient."""
    import lightning.pytorch as pl  # noqa: PLC0415  as above
    import runs  # noqa: PLC0415

    from lightning_dqn import DQN, DQNDataModule  # noqa: PLC0415
    from lightning_dqn.replay import Transition  # noqa: PLC0415

    class Fixed(DQNDataModule):
        def train_dataloader(self):
            part = Transition(*(rows[rank * sizes : (rank + 1) * sizes][None] for rows in batch))
            return torch.utils.data.DataLoader([part], batch_size=None, collate_fn=lambda item: item)

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=1.0)

    pl.seed_everything(5, verbose=False)
    batch = Transition(
        observation=torch.randn(128, 4),
        action=torch.randint(2, (128,)),
        reward=torch.randn(128),
        discount=torch.full((128,), 0.99),
        next_observation=torch.randn(128, 4),
        weight=torch.rand(128),
        index=torch.arange(128),
    )
    data = Fixed(**runs.SMALL)
    model = DQN(data.observation_space, data.action_space, optimizer=sgd, compile=compile)
    before = torch.cat([p.detach().flatten().clone() for p in model.policy_net.parameters()])
    strategy = {"devices": world_size, "strategy": "ddp"} if world_size > 1 else {}
    trainer = quiet_trainer(max_steps=1, limit_val_batches=0, **strategy)
    trainer.fit(model, data)
    after = torch.cat([p.detach().flatten() for p in model.policy_net.parameters()])
    return {"gradient": before - after, "compiled": model.update_mode == "compiled"}


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    job, folder, rank, world_size, arguments = sys.argv[1:]
    brought = globals()[job](folder, int(rank), int(world_size), **json.loads(arguments))
    torch.save(brought, Path(folder, f"record-{rank}.pt"))
