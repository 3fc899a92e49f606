"""The example of Ray Train as it stands in configs/, on a local Ray; one of its two workers is killed on the way."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import clean_environment

from lightning_dqn.resume.checkpoint_io import AtomicCheckpointIO

pytestmark = pytest.mark.ranks
TESTS = Path(__file__).parent
EXAMPLE = TESTS.parent / "configs" / "ray_train.py"


def processes_of(session: int) -> list[int]:
    """Those that a process, or its children, have started since it began a session of its own."""
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.getsid(int(name)) == session:
                found.append(int(name))
        except ProcessLookupError:
            continue
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What the two workers noted, before the death of one and after; the example's last line; its folder."""
    pytest.importorskip("ray", reason='needs pip install -e ".[ray]"')
    folder, home = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("home")
    command = [sys.executable, str(TESTS / "watched_ray.py"), str(EXAMPLE), str(folder)]
    # its sockets have long names, and those may have a hundred letters
    with tempfile.TemporaryDirectory(prefix="ray") as short, (folder / "output.txt").open("w+") as output:
        env = clean_environment(home, RAY_TMPDIR=short, RAY_USAGE_STATS_ENABLED="0")
        pipes = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=folder, env=env, start_new_session=True, **pipes)
        try:
            exit_code = process.wait(800)
        finally:
            for left in processes_of(process.pid):
                os.kill(left, signal.SIGKILL)
            process.wait()
    text = (folder / "output.txt").read_text()
    assert exit_code == 0, text[-10_000:]
    records = {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
    return records, text, folder


def test_two_workers_of_ray_learn_from_games_of_their_own(run):
    records, _, _ = run
    assert {name: note["world_size"] for name, note in records.items()} == dict.fromkeys(
        ("first-0", "first-1", "resumed-0", "resumed-1"), 2
    )
    assert not torch.equal(records["first-0"]["first_batch"], records["first-1"]["first_batch"])


def test_two_workers_of_ray_end_with_the_same_weights_bitwise(run):
    records, _, _ = run
    one, other = (records[f"resumed-{rank}"]["weights"] for rank in range(2))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    # and these are no longer those that it went on from
    assert records["resumed-0"]["ended_at"] > records["resumed-0"]["started_at"] + 1000


def test_a_worker_of_ray_that_is_killed_is_replaced_and_all_resume_from_the_last_report(run):
    records, _, _ = run
    assert records["first-1"]["pid"] != records["resumed-1"]["pid"]
    assert "ended_at" not in records["first-0"]
    # the end of an epoch, after which there were updates that are made again
    assert 0 < records["resumed-0"]["started_at"] == records["resumed-1"]["started_at"]


def test_ray_is_told_the_score_and_given_a_checkpoint_that_opens(run):
    _, text, folder = run
    score, checkpoint = re.search(r"^return (\d+\.\d), (\S+)$", text, re.MULTILINE).groups()
    # a policy that acts by chance lasts 20 steps or so
    assert float(score) > 60
    *left_over, kept = sorted((folder / "runs" / "ray" / "cartpole").glob("checkpoint_*/"))
    assert kept == Path(checkpoint)
    # of all others Ray forgets but one whose report a worker's death cut short
    assert len(left_over) <= 1
    content = AtomicCheckpointIO().load_checkpoint(kept / "checkpoint.ckpt")
    assert content["epoch"] == 3
    assert len(content["DQNDataModule"]["train"]["memory"]["rows"]) > 0
