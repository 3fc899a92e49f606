"""Checkpoints that were damaged or forged: one line that names the value and exit code 2, or the same agent."""

import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from forging import MARKER, PAYLOAD, attempt, item, leaves, mutations_of, opened

SMALL = (
    "fit --trainer.max_epochs 1 --trainer.logger false --trainer.accelerator cpu --data.epoch_env_steps 60 "
    "--data.eval_episodes 1 --data.eval_max_steps 20 --data.warmup_env_steps 20 --data.batch_size 8 "
    "--data.memory_capacity 50 --video.episodes 0 --model.network.hidden_sizes [8,8]"
)
RUNS = {
    "dqn": "",
    "per": "--data.sampler lightning_dqn.PrioritizedSampler --data.n_step 3 --data.env_id Taxi-v4 "
    "--data.action_masks true --model.lr_scheduler torch.optim.lr_scheduler.MultiStepLR "
    "--model.lr_scheduler.milestones [10,1000]",
    "frames": "--data.frame_stack 3 --model.normalize_observations true --model.optimizer torch.optim.RMSprop "
    "--model.optimizer.lr 0.001",
    "pqn": "--model PQN --data.num_envs 4 --data.steps_per_iteration 5 --data.n_step 1",
    "native": "--data.num_envs 4",
    "async": "--data.num_envs 2 --data.vectorization async --data.overlap true",
}
# mutations of each run, spread over the parts of its checkpoint
COUNT = 70


def part(path):
    """The part of a checkpoint that a value is in; large ones are told apart."""
    return path[:2] if path[0] in ("agent", "options", "DQNDataModule", "loops", "callbacks") else path[:1]


def choose(checkpoint, count, seed):
    """So many mutations, the same for each call: parts in turn, values and mutations of each drawn."""
    rng = random.Random(seed)
    parts: dict = {}
    for path in leaves(checkpoint):
        parts.setdefault(part(path), []).append(path)
    names = list(parts)
    for i in range(count):
        path = rng.choice(parts[names[i % len(names)]])
        yield path, rng.choice(mutations_of(item(checkpoint, path))), rng.randrange(2**31)


def lay_traps(folder):
    """A module that says so when it is imported, and files that are configurations of its classes."""
    code = f"open({MARKER!r}, 'a').write('x')\nimport torch\nclass Net(torch.nn.Module):\n    pass\npng = Net\n"
    (folder / f"{PAYLOAD}.py").write_text(code)
    for name in ("evil", "x"):
        (folder / name).write_text(f"class_path: {PAYLOAD}.Net\n")


@pytest.fixture(scope="module")
def pool():
    """Two processes, so that a signal in one of them does not end the tests."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        yield processes


def train(name, folder, pool):
    """The last checkpoint of a small run."""
    words = [*SMALL.split(), *RUNS[name].split(), "--trainer.default_root_dir", str(folder / name)]
    code, text = pool.submit(opened, words).result()
    assert code == 0, text
    (path,) = (folder / name).glob("*/*/checkpoints/last.ckpt")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the forged files are opened."""
    folder = tmp_path_factory.mktemp("forged")
    lay_traps(folder)
    return folder


def expected_outcome(path, name, found):
    """What is wrong with how a forged file was opened; empty if nothing is."""
    lines = [line for line in found["text"].splitlines() if line.startswith("error: ")]
    if found["executed"]:
        return "executed"
    if found["code"] == 0:
        return ""
    if found["code"] != 2 or len(lines) != 1:
        return f"exit code {found['code']}, {found['text'][-300:]!r}"
    # the value, or what it is in
    named = [key.rpartition(".")[2] for key in path if type(key) is str][-3:]
    return "" if any(each in lines[0] for each in named) else f"names nothing of {named}: {lines[0][:300]}"


@pytest.mark.faults
@pytest.mark.parametrize("run", RUNS)
def test_forged_checkpoints_end_in_one_line_that_names_the_value_or_load_the_same_agent(run, folder, pool):
    base = train(run, folder, pool)
    checkpoint = torch.load(base, weights_only=True)
    cases = list(choose(checkpoint, COUNT, run))
    tasks = [pool.submit(attempt, str(folder), str(base), *case) for case in cases]
    wrong = {}
    for (path, name, _), task in zip(cases, tasks, strict=True):
        found = task.result()
        if problem := expected_outcome(path, name, found):
            wrong[(*path, name, found["command"])] = problem
        assert found["megabytes"] < 4000
    assert wrong == {}
