"""Environments that fail, values that are not finite, NaN losses, memories that don't fit."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
from conftest import clean_environment, quiet_trainer, run_cli
from gymnasium import spaces
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_dqn import DQN, DQNDataModule, EpsilonDecay, SoftTargetUpdate
from lightning_dqn.envs.errors import BrokenEnvironmentError
from lightning_dqn.monitoring.finite_check import FiniteCheck
from lightning_dqn.replay import ReplayMemory
from lightning_dqn.storage.memory_size import MemorySize, available_ram

# 250 env steps: one epoch with its checkpoint, and a fault in the middle of the second
EPOCH, FAULT = 200, 250

MODULE = '''
import pathlib

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Faulty(gym.Env):
    """Episodes of 10 env steps; the step number `at` of the environment's life goes wrong."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    action_space = spaces.Discrete(2)
    made = 0

    def __init__(self, fault="raise", at=250, which=0, note=None):
        self.number, Faulty.made = Faulty.made, Faulty.made + 1
        self.fault, self.at, self.which, self.note = fault, at, which, note
        self.life = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 10
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.life, self.left = self.life + 1, self.left - 1
        observation, reward = np.zeros(3, np.float32), 1.0
        if self.life == self.at and self.number == self.which:
            if self.fault == "raise":
                raise OSError("the simulator is gone")
            if self.fault == "observation":
                observation[1] = np.nan
            if self.fault == "infinite":
                observation[2] = -np.inf
            if self.fault == "reward":
                reward = np.inf
            if self.fault == "large":
                reward = 1e300
        return observation, reward, self.left == 0, False, {}

    def close(self):
        if self.note:
            with pathlib.Path(self.note).open("a") as file:
                file.write(f"{self.number} ")


gym.register("Faulty-v0", Faulty)
'''


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """A module `faulty` that registers Faulty-v0, in the current folder."""
    (tmp_path / "faulty.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    gym.registry.pop("Faulty-v0", None)
    sys.modules.pop("faulty", None)


def fit(folder, *callbacks, updates_per_iteration=1, optimizer=None, **kwargs):
    """A fit that keeps its epochs' checkpoints; its data."""
    data = DQNDataModule(epoch_env_steps=EPOCH, eval_episodes=2, updates_per_iteration=updates_per_iteration, **kwargs)
    chosen = {"optimizer": optimizer} if optimizer else {}
    model = DQN(data.observation_space, data.action_space, compile=False, **chosen)
    keep = ModelCheckpoint(dirpath=folder / "checkpoints", filename="last")
    trainer = quiet_trainer(max_epochs=3, callbacks=[SoftTargetUpdate(), EpsilonDecay(), *callbacks], checkpoint=keep)
    trainer.fit(model, data)
    return data


# the number of the first environment that is played in: one shows its spaces
FIRST = 1


@pytest.mark.parametrize(("num_envs", "which"), [(1, 0), (3, 2)])
def test_an_environment_that_raises_is_named_with_its_step(faulty, tmp_path, num_envs, which):
    # episodes of 10 env steps and one call of reset: life counts env steps only
    arguments = {"fault": "raise", "at": 95, "which": FIRST + which, "note": str(tmp_path / "closed")}
    with pytest.raises(BrokenEnvironmentError) as error:
        fit(tmp_path, env_id="faulty:Faulty-v0", env_kwargs=arguments, num_envs=num_envs)
    reported = str(error.value)
    assert reported.startswith("Faulty-v0, ")
    assert f"environment {which} of {num_envs}" in reported
    assert f"after {94 * num_envs} env steps, step 5 of its episode" in reported
    assert "OSError: the simulator is gone" in reported
    assert isinstance(error.value.__cause__, OSError)
    # the one that shows the spaces, those that are played, and two for each evaluation
    closed = {int(number) for number in (tmp_path / "closed").read_text().split()}
    assert closed == set(range(FIRST + num_envs + 2 * (94 * num_envs // EPOCH)))


def test_an_environment_of_another_process_is_named_too(faulty, tmp_path):
    # each process counts from where it was forked, behind those that show the spaces: both fail, at the same step
    arguments = {"fault": "raise", "at": 95, "which": 2}
    options = {"num_envs": 2, "vectorization": "async"}
    with pytest.raises(BrokenEnvironmentError, match=r"environment [01] of 2, after 188 env steps, step 5 of its"):
        fit(tmp_path, env_id="faulty:Faulty-v0", env_kwargs=arguments, **options)


def test_an_environment_that_raises_in_an_evaluation_is_named_with_its_episode(faulty, tmp_path):
    with pytest.raises(
        BrokenEnvironmentError, match=r"Faulty-v0, evaluation episode of seed \d+, step 4: raised OSError"
    ):
        fit(tmp_path, env_id="faulty:Faulty-v0", env_kwargs={"fault": "raise", "at": 4, "which": FIRST + 1})


@pytest.mark.faults
def test_the_last_checkpoint_is_of_the_epoch_before(faulty, tmp_path):
    flags = ("--data.epoch_env_steps", str(EPOCH), "--trainer.max_epochs", "3", "--data.eval_episodes", "2")
    quiet = ("--video.episodes", "0", "--trainer.logger", "CSVLogger")
    fault = f"{{at: {FAULT}, which: {FIRST}}}"
    arguments = ("--data.env_id", "faulty:Faulty-v0", "--data.env_kwargs", fault)
    run = run_cli(tmp_path, clean_environment(tmp_path), "fit", *flags, *quiet, *arguments)
    assert run.exit_code == 1
    last_line = run.err.strip().splitlines()[-1]
    assert "Faulty-v0, environment 0 of 1, after 249 env steps, step 10 of its episode: raised OSError" in last_line
    for path in tmp_path.glob("runs/*/*/checkpoints/*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["DQNDataModule"]["train"]["env_steps"] == EPOCH, "not from the middle of a step"
        assert checkpoint["global_step"] == EPOCH - 127
    # it continues from there; the life of the environment that is made again begins with the last episode, replayed
    again = run_cli(tmp_path, run.env, "fit", "--ckpt_path", "last", "--trust", "faulty")
    assert again.exit_code == 1, again.text
    assert f"after {EPOCH + FAULT - 10 - 1} env steps" in again.err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "fault_and_words",
    [
        ("observation", "observation[1] = nan"),
        ("infinite", "observation[2] = -inf"),
        ("reward", "reward = inf"),
        ("large", "reward = 1e+300"),
    ],
)
@pytest.mark.parametrize(("num_envs", "which"), [(1, 0), (3, 2)])
@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered in cast")
def test_what_is_not_finite_is_rejected_before_it_is_stored(faulty, tmp_path, fault_and_words, num_envs, which):
    fault, what = fault_and_words
    kept = []
    watch = Keep(kept)
    arguments = {"fault": fault, "at": 95, "which": FIRST + which}
    with pytest.raises(BrokenEnvironmentError) as error:
        fit(tmp_path, watch, env_id="faulty:Faulty-v0", env_kwargs=arguments, num_envs=num_envs)
    reported = str(error.value)
    assert (
        f"environment {which} of {num_envs}, after {94 * num_envs} env steps, step 5 of its episode: {what}" in reported
    )
    (memory,) = kept
    assert all(np.isfinite(rows).all() for rows in memory._written.values())
    assert len(memory) == 94 * num_envs


class Keep(FiniteCheck):
    """Notes the memory of a run."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def on_train_start(self, trainer, pl_module):
        self.kept.append(trainer.datamodule.train_dataset.memory)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_first_observation_that_is_not_finite_is_rejected(faulty, tmp_path, monkeypatch):
    import faulty  # noqa: PLC0415  made by the fixture

    reset = faulty.Faulty.reset
    monkeypatch.setattr(faulty.Faulty, "reset", lambda self, **kwargs: (reset(self, **kwargs)[0] / 0, {}))
    with pytest.raises(BrokenEnvironmentError, match=r"after 0 env steps.*observation\[0\] = nan"):
        fit(tmp_path, env_id="faulty:Faulty-v0")


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
def test_large_and_integer_observations_are_no_faults():
    class Large(gym.Env):
        observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        action_space = spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return np.full(3, 3e38, np.float32), {}

        def step(self, action):
            # their sum would be infinite, they are not
            return np.full(3, 3e38, np.float32), 3e38, False, False, {}

    gym.register("Large-v0", Large)
    try:
        for env_id in ("Large-v0", "FrozenLake-v1"):
            data = DQNDataModule(env_id=env_id, epoch_env_steps=20, eval_episodes=1, eval_max_steps=1)
            trainer = quiet_trainer(limit_val_batches=0)
            trainer.fit(DQN(data.observation_space, data.action_space), data)
            assert data.env_steps == 20
    finally:
        gym.registry.pop("Large-v0")


class Diverging(torch.optim.SGD):
    """Makes all weights NaN at its n-th step."""

    def __init__(self, params, at):
        super().__init__(params, lr=1e-4)
        self.at, self.steps_made = at, 0

    def step(self, closure=None):
        result = super().step(closure)
        self.steps_made += 1
        if self.steps_made == self.at:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.fill_(float("nan"))
        return result


# updates of the first epoch with U = 1: 200 - 127 = 73; then one an iteration
@pytest.mark.parametrize("updates", [1, 4])
def test_a_loss_that_is_nan_ends_the_fit_within_50_iterations(tmp_path, updates):
    at = (73 + 5) * updates
    with pytest.raises(FloatingPointError) as error:
        fit(tmp_path, FiniteCheck(), updates_per_iteration=updates, optimizer=lambda params: Diverging(params, at))
    stopped = int(re.search(r"after ([\d,]+) updates", str(error.value))[1].replace(",", ""))
    assert at <= stopped <= at + 50 * updates
    assert "loss is nan" in str(error.value)
    # what the first epoch left
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 73 * updates
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())


def test_weights_that_are_nan_at_an_epochs_end_are_neither_evaluated_nor_saved(tmp_path):
    # the last update of the second epoch: no later loss shows it
    with pytest.raises(FloatingPointError, match=r"policy_net.* is not finite after 273 updates"):
        fit(tmp_path, FiniteCheck(), optimizer=lambda params: Diverging(params, 273))
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 73
    assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())


@pytest.mark.integration
def test_the_command_line_reports_it_in_one_line(tmp_path):
    # so large a rate that weights, and then the loss, leave the range of floats within a hundred updates
    flags = ("--model.optimizer.lr", "1e37", "--model.compile", "false", "--video.episodes", "0")
    size = ("--data.epoch_env_steps", "300", "--trainer.max_epochs", "3", "--data.eval_episodes", "2")
    run = run_cli(tmp_path, clean_environment(tmp_path), "fit", *flags, *size, "--trainer.logger", "false")
    assert run.exit_code == 2
    assert "Traceback" not in run.text
    assert re.fullmatch(r"error: .* after \d+ updates and \d+ env steps: .*", run.err.strip().splitlines()[-1])
    assert not list(tmp_path.glob("runs/*/*/checkpoints/*.ckpt")), "there was no good state to save"


def test_workers_are_rejected(tmp_path):
    data = DQNDataModule(epoch_env_steps=EPOCH)
    data.train_dataloader = lambda: DataLoader(data.train_dataset, batch_size=None, num_workers=1)
    with pytest.raises(ValueError, match="use num_workers=0"):
        quiet_trainer().fit(DQN(data.observation_space, data.action_space), data)


# memories that don't fit

PIXELS = spaces.Box(0, 255, (84, 84), np.uint8)


@pytest.mark.parametrize("space", [PIXELS, spaces.Box(-1, 1, (5,), np.float64), spaces.Discrete(7)], ids=str)
def test_the_bytes_are_those_that_the_memory_takes(space):
    memory = ReplayMemory(capacity=1000, num_envs=1, observation_space=space, gamma=0.99)
    arrays = [memory._observations._slots, *memory._written.values(), memory.sampler._queue.rows]
    # one row more, which waits for its action
    assert MemorySize(1001, space, memory.sampler.bytes_per_row()).ram == sum(array.nbytes for array in arrays)


def test_the_ram_is_what_the_machine_and_every_group_above_us_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    assert available_ram(tmp_path) == 10_000, "no control groups"
    stat = "anon 5\ninactive_file 20\n"
    files = {
        "proc/self/cgroup": "1:name=systemd:/x\n0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": "1000\n",
        "sys/fs/cgroup/a/memory.current": "300\n",
        "sys/fs/cgroup/a/memory.stat": stat,
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "200\n",
        "sys/fs/cgroup/a/b/memory.stat": stat,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_ram(tmp_path) == 1000 - 300 + 20
    # a container sees its own group as the top
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    assert available_ram(tmp_path) == 10_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("900")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("100")
    (tmp_path / "sys/fs/cgroup/memory.stat").write_text(stat)
    assert available_ram(tmp_path) == 900 - 100 + 20


@pytest.mark.faults
def test_resident_memory_does_not_grow_over_a_long_run():
    script = Path(__file__).parent / "resident_memory.py"
    done = subprocess.run([sys.executable, str(script), "20000"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    resident = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(resident) == 10
    assert resident[-1] < 1.01 * resident[0], resident
