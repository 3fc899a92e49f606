"""Several ranks of one run: what each has of its own, what they share, and what one says to the others."""

import csv
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import clean_environment, quiet_trainer, run_cli
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from ranks import run, start
from runs import Dropout, differences, fit, load, make_pair, play
from torch import nn

from lightning_dqn import EpsilonDecay, PrioritizedSampler, PriorityUpdate, SoftTargetUpdate
from lightning_dqn.distributed.sync import check_networks

pytestmark = pytest.mark.ranks
TWO_DEVICES = "--trainer.accelerator cpu --trainer.devices 2 --trainer.strategy ddp"
# of two ranks: an iteration is 2 x 2 env steps and 2 updates, an epoch 150 iterations
JOB = {"num_envs": 2, "updates_per_iteration": 2, "epoch_env_steps": 600, "memory_capacity": 1001, "eval_episodes": 5}
# of PQN: an iteration is 2 x 2 x 10 env steps and 4 updates
ROLLOUTS = {"model": "PQN", "steps_per_iteration": 10, "batch_size": 10, "updates_per_iteration": 4}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two ranks brought back from fits of all kinds, by the names that these have here."""
    jobs = [
        {"name": "plain", **JOB},
        {"name": "compiled", **JOB, "compile": True, "limits": {"max_steps": 2000, "max_epochs": -1}},
        {"name": "prioritized", **JOB, "prioritized": True},
        {"name": "by Lightning", **JOB, "watched": True},
        {"name": "plain and long", **JOB, "limits": {"max_steps": 2000, "max_epochs": -1}},
        {"name": "noisy IQN", **JOB, "model": "IQN", "network": "noisy"},
        {"name": "PQN", **JOB, **ROLLOUTS, "hard to please": True, "limits": {"max_epochs": 5}},
        # one game of a rank is over long before the first of the other
        {"name": "logged", **JOB, "num_envs": 1, "logged": True, "limits": {"max_epochs": 1}},
    ]
    names = [job["name"] for job in jobs]
    both = run(tmp_path_factory.mktemp("two"), "fits", jobs=jobs)
    return {name: [ours[i] for ours in both] for i, name in enumerate(names)}


def test_each_rank_plays_and_draws_for_itself(two_ranks):
    one, other = two_ranks["plain"]
    assert one["first_batch"].shape == other["first_batch"].shape
    assert not torch.equal(one["first_batch"], other["first_batch"])


def test_the_clock_is_that_of_all_ranks(two_ranks):
    one, other = two_ranks["plain"]
    assert one["env_steps"] == other["env_steps"]
    assert one["env_steps"] == [sum(own) for own in zip(one["own_env_steps"], other["own_env_steps"], strict=True)]
    # two epochs of 600 env steps, to within the environments of an iteration; 300 iterations of either rank
    assert len(one["env_steps"]) == 300
    assert 1200 - 4 < one["env_steps"][-1] <= 1200


def test_epsilon_and_the_first_update_follow_that_clock(two_ranks):
    one, other = two_ranks["plain"]
    assert one["epsilon"] == other["epsilon"]
    expected = [0.05 + 0.85 * np.exp(-steps / 1000) for steps in one["env_steps"]]
    assert one["epsilon"] == pytest.approx(expected)
    learning = [steps >= 50 for steps in one["env_steps"]]
    assert one["updates"] == list(np.cumsum([2 * update for update in learning]))
    assert one["updates"] == other["updates"]


def test_the_memory_is_divided_among_the_ranks(two_ranks):
    # 1,001 transitions are 501 of each rank: 251 slots of two environments, and one that waits for its action
    assert [ours["slots"] for ours in two_ranks["plain"]] == [252, 252]


def test_updates_by_lightnings_calls_are_the_same_as_ours(two_ranks):
    ours, theirs = two_ranks["plain"][0], two_ranks["by Lightning"][0]
    assert ours["updates"] == theirs["updates"]
    assert ours["digests"] == theirs["digests"]


@pytest.mark.parametrize(
    "job", ["plain", "compiled", "prioritized", "by Lightning", "plain and long", "noisy IQN", "PQN"]
)
def test_both_nets_stay_equal_bitwise(two_ranks, job):
    one, other = two_ranks[job]
    assert one["digests"] == other["digests"]
    assert len(one["digests"]) >= (20 if job in ("compiled", "plain and long") else 1 if job == "PQN" else 5)
    # and they do learn
    assert len(set(one["digests"])) == len(one["digests"])
    assert one["compiled"] == (job == "compiled")


@pytest.mark.parametrize("job", ["plain", "compiled", "prioritized"])
def test_an_update_costs_one_collective_call_and_an_iteration_one_more(two_ranks, job):
    one, _ = two_ranks[job]
    # iterations of the first epoch, past warm-up, in which nothing is saved, logged or compared
    for i in range(20, 48):
        before, after = one["calls"][i : i + 2]
        assert one["updates"][i + 1] == one["updates"][i] + 2
        made = {name: after[name] - before[name] for name in after if after[name] != before[name]}
        # the broadcast is Lightning's own question whether the first rank was sent SIGTERM
        assert made == {"all_gather": 1, "all_reduce": 2, "broadcast": 1}


def test_an_evaluation_is_shared_out_and_its_result_that_of_all(two_ranks):
    one, other = two_ranks["plain"]
    # two evaluations of five episodes
    assert (len(one["evaluated"]), len(other["evaluated"])) == (6, 4)
    last = [*one["evaluated"][3:], *other["evaluated"][2:]]
    for ours in (one, other):
        assert ours["val"]["val/episode_return"] == pytest.approx(np.mean(last))
        assert ours["val"]["val/episode_return_std"] == pytest.approx(np.std(last))
        assert ours["val"]["val/episode_return_min"] == min(last)


@pytest.mark.parametrize("job", ["plain", "noisy IQN", "PQN"])
def test_ranks_draw_numbers_of_their_own_from_all_generators(two_ranks, job):
    one, other = (ours["generators"] for ours in two_ranks[job])
    assert [a == b for a, b in zip(one, other, strict=True)] == [False, False, False]


def test_an_early_stop_is_one_of_all_ranks(two_ranks):
    one, other = two_ranks["PQN"]
    # the first evaluation is the best there is, and the one after it the last
    assert len(one["evaluated_at"]) == 2
    assert one["evaluated_at"] == other["evaluated_at"] == pytest.approx([600, 1200], abs=4)
    assert one["updates"] == other["updates"]
    assert one["val"] == other["val"]


def test_ranks_log_together_while_one_has_not_ended_an_episode(two_ranks, tmp_path_factory):
    one, other = two_ranks["logged"]
    first = [min(ours["ended_at"], default=10**9) for ours in (one, other)]
    assert first[0] != first[1]
    assert one["env_steps"][-1] == other["env_steps"][-1] >= 598


@pytest.mark.parametrize("compile", [False, True])
def test_two_ranks_of_half_a_batch_make_the_gradient_of_one(tmp_path, compile):
    [whole] = run(tmp_path / "one", "one_update", world_size=1, compile=compile, sizes=128)
    halves = run(tmp_path / "two", "one_update", compile=compile, sizes=64)
    assert whole["compiled"] == compile
    for half in halves:
        assert half["gradient"].abs().max() > 0.01
        torch.testing.assert_close(half["gradient"], whole["gradient"], atol=1e-6, rtol=0)


# what a rank has of its own: environments, memory, priorities, and what dropout draws
OWN = {**JOB, "network": "Dropout", "prioritized": True, "every_n_updates": 222}


@pytest.fixture(scope="module")
def stopped_and_resumed(tmp_path_factory):
    """The folder of a fit of two ranks, and of two that went on from its checkpoints with another seed."""
    folder = tmp_path_factory.mktemp("resumed")
    earlier = {"from its first epoch": "epoch0.ckpt", "from within an epoch": "mid222.ckpt"}
    jobs = [{"name": "whole", **OWN}]
    jobs += [{"name": k, **OWN, "seed": 77, "ckpt_path": str(folder / "whole" / v)} for k, v in earlier.items()]
    run(folder, "fits", jobs=jobs)
    return folder


@pytest.mark.parametrize("how", ["from its first epoch", "from within an epoch"])
def test_every_rank_resumes_exactly_where_it_was(stopped_and_resumed, how):
    one, other = (load(stopped_and_resumed / name / "epoch1.ckpt") for name in ("whole", how))
    [share], [other_share] = (found.pop("shares") for found in (one, other))
    assert list(differences(one, other)) == []
    assert play(one) == play(other)
    # and so does the second, whose share is another one
    own, other_own = load(share), load(other_share)
    assert list(differences(own, other_own)) == []
    assert play({**one, **own}) == play({**other, **other_own})
    assert "DQNDataModule" in own
    found = list(differences({**one, **own}, one))
    assert {".generators.torch", ".DQNDataModule.train.rng.state.state"} < set(found)


@pytest.mark.parametrize("world_size", [1, 3])
def test_another_number_of_ranks_resumes_within_the_epoch(stopped_and_resumed, tmp_path, world_size):
    checkpoint = stopped_and_resumed / "whole" / "mid222.ckpt"
    start_at = load(checkpoint)["DQNDataModule"]["train"]["env_steps"] * 2
    job = {"name": "dealt", **OWN, "seed": 77, "ckpt_path": str(checkpoint)}
    records = [found for [found] in run(tmp_path, "fits", world_size=world_size, jobs=[job])]
    of_an_iteration = 2 * world_size
    assert records[0]["env_steps"][0] == pytest.approx(start_at, abs=2 * of_an_iteration)
    # what the epoch lacked, then the next one
    assert records[0]["evaluated_at"] == pytest.approx([600, 1200], abs=2 * of_an_iteration)
    for other in records[1:]:
        assert other["env_steps"] == records[0]["env_steps"]
        assert other["updates"] == records[0]["updates"]
        assert other["digests"] == records[0]["digests"]
        assert other["generators"] != records[0]["generators"]


def test_a_checkpoint_of_two_ranks_is_rejected_where_its_shards_are_unknown(stopped_and_resumed):
    model, data = make_pair(**{**JOB, "network": Dropout, "sampler": PrioritizedSampler})
    trainer = quiet_trainer(
        max_epochs=3, callbacks=[SoftTargetUpdate(), EpsilonDecay(), PriorityUpdate(anneal_env_steps=900)]
    )
    with pytest.raises(MisconfigurationException, match=r"TorchCheckpointIO loads rank 0 only: use Trainer\(plugins"):
        trainer.fit(model, data, ckpt_path=stopped_and_resumed / "whole" / "epoch1.ckpt")


def test_no_shard_outlives_its_checkpoint(stopped_and_resumed):
    names = {path.name for path in (stopped_and_resumed / "whole").iterdir()}
    checkpoints = {name for name in names if name.endswith(".ckpt")}
    assert len(checkpoints) > 3
    assert len(names - checkpoints) == len(checkpoints)


def test_a_rank_whose_weights_were_changed_alone_ends_the_fit(tmp_path):
    processes = start(tmp_path, "one_changes_its_weights")
    assert [process.wait(120) for process in processes] == [1, 1]
    reported = (tmp_path / "output-0.txt").read_text()
    assert "policy_net of rank 1 differs from rank 0 after 200 updates" in reported


def test_ranks_that_found_other_checkpoints_end_with_both_names(tmp_path):
    limits = {"max_epochs": 1}
    for seed in (0, 1):
        fit(tmp_path / f"seed{seed}", seed=seed, limits=limits, epoch_env_steps=100)
    checkpoints = [str(tmp_path / f"seed{seed}" / "epoch0.ckpt") for seed in (0, 1)]
    processes = start(tmp_path, "each_from_its_own", checkpoints=checkpoints)
    assert [process.wait(120) for process in processes] == [1, 1]
    for rank in (0, 1):
        reported = (tmp_path / f"output-{rank}.txt").read_text()
        assert f"Rank 0 resumes from {checkpoints[0]}, rank 1 from {checkpoints[1]}, which is another" in reported


def test_a_rank_waits_for_another_as_long_as_the_strategy_says(tmp_path):
    first, second = start(tmp_path, "one_stops_responding")
    try:
        assert first.wait(200) == 0
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
    # 20 s there; without, torch's own 30 minutes
    assert 15 < torch.load(tmp_path / "record-0.pt", weights_only=True) < 60


@pytest.fixture(scope="module")
def command_line_run(tmp_path_factory):
    """The folder of a run of two devices by the command line, and its output."""
    folder = tmp_path_factory.mktemp("cli")
    words = f"fit {TWO_DEVICES} --trainer.max_epochs 2 --trainer.logger CSVLogger --data.eval_episodes 5"
    further = "--video.episodes", "0", "--data.epoch_env_steps", "400"
    done = run_cli(folder, clean_environment(folder), *words.split(), *further)
    assert done.exit_code == 0, done.text
    return folder, done


def test_two_devices_make_one_run_with_one_record(command_line_run):
    folder, done = command_line_run
    [run_folder] = folder.glob("runs/*/*")
    assert {path.name for path in (run_folder / "checkpoints").glob("*.ckpt")} == {"best.ckpt", "last.ckpt"}
    with (run_folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    clocks = [float(row["env_steps"]) for row in rows if row["train/epsilon"]]
    # logged every 50 iterations of two env steps
    assert clocks == pytest.approx([100 * i for i in range(1, 9)], abs=2)
    assert len([row for row in rows if row["val/episode_return"]]) == 2
    # nothing is printed twice, and no warning of what is on purpose
    assert done.text.count("Finished: 800 env steps") == 1
    assert "sync_dist" not in done.text
    assert done.text.count("memory: 10,000 transitions") == 1


def test_an_evaluation_by_two_devices_is_that_of_one(command_line_run):
    folder, _ = command_line_run
    words = "test --ckpt_path last --trainer.logger CSVLogger --video.episodes 0 --data.eval_episodes 7"
    found = []
    for devices in ("--trainer.devices 1 --trainer.strategy auto", TWO_DEVICES):
        done = run_cli(folder, clean_environment(folder), *words.split(), *devices.split())
        assert done.exit_code == 0, done.text
        found.append(re.findall(r"test/(\w+) +\W* +([\d.]+)", done.text))
    assert len(found[0]) == 5
    assert found[0] == found[1]


def test_a_prediction_by_two_devices_has_the_episodes_of_both(command_line_run):
    folder, _ = command_line_run
    words = f"predict --ckpt_path last {TWO_DEVICES} --data.eval_episodes 5"
    done = run_cli(folder, clean_environment(folder), *words.split())
    assert done.exit_code == 0, done.text
    [path] = folder.glob("runs/*/*/evaluation/episodes.pt")
    episodes = torch.load(path, weights_only=True)
    assert len(episodes) == 5
    starts = {tuple(episode["observation"][0].tolist()) for episode in episodes}
    assert len(starts) == 5


@pytest.mark.parametrize("devices", ["--trainer.devices 1 --trainer.strategy auto", TWO_DEVICES.replace("2", "3")])
def test_another_number_of_ranks_resumes_from_resharded_memories(command_line_run, tmp_path, devices):
    folder, _ = command_line_run
    shutil.copytree(folder / "runs", tmp_path / "runs")
    [last] = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    words = f"fit --ckpt_path last {devices} --trainer.max_epochs 3"
    done = run_cli(tmp_path, clean_environment(tmp_path), *words.split())
    assert done.exit_code == 0, done.text
    now = 1 if "auto" in devices else 3
    assert f"The checkpoint is of 2 ranks, this run has {now}: the replay memory is resharded" in done.text
    assert "The resume is approximate" in done.text
    # the env step count and the epoch count continue
    resumed_at = int(re.search(r"Resumed at (\d+) env steps", done.text)[1])
    assert resumed_at == pytest.approx(800, abs=4)
    finished_at = int(re.search(r"Finished: ([\d,]+) env steps", done.text)[1].replace(",", ""))
    assert finished_at == pytest.approx(1200, abs=12)
    # nothing of the memory is lost but what a cut costs
    saved = load(last)
    shares = [saved, *(load(path) for path in saved.get("shares", []))]
    assert len(shares) == now
    rows = sum(int(share["DQNDataModule"]["train"]["memory"]["rows"]["playable"].sum()) for share in shares)
    assert 1100 < rows <= finished_at


def test_layers_with_running_statistics_raise():
    check_networks(nn.Sequential(nn.LayerNorm(3), nn.BatchNorm1d(3, track_running_stats=False), nn.InstanceNorm1d(3)))
    with pytest.raises(MisconfigurationException, match="1 is a BatchNorm1d, whose running statistics would differ"):
        check_networks(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


RANK = """
import os, sys
from lightning_dqn.cli import main
if os.environ["RANK"] == "1":
    sys.argv += os.environ["ONLY_RANK_1"].split()
main()
"""
OTHER_OPTIONS = {
    "target_update.tau": "--target_update.tau 1",
    "data.updates_per_iteration": "--data.updates_per_iteration 2",
    "data.num_envs": "--data.num_envs 2",
    "trainer.max_epochs": "--trainer.max_epochs 3",
}


@pytest.mark.parametrize(("name", "option"), OTHER_OPTIONS.items(), ids=OTHER_OPTIONS)
def test_ranks_started_with_other_options_all_end_with_an_error_that_names_it(tmp_path, name, option):
    (tmp_path / "rank.py").write_text(RANK)
    words = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--tee", "3"),
        *("--log-dir", "logs", "rank.py", "fit", "--trainer.devices", "2", "--trainer.strategy", "ddp"),
        *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--data.epoch_env_steps", "400"),
        *("--data.eval_episodes", "2", "--trainer.logger", "false", "--model.compile", "false"),
    ]
    env = clean_environment(tmp_path, OMP_NUM_THREADS="1", ONLY_RANK_1=option)
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    lines = [path.read_text() for path in sorted((tmp_path / "logs").rglob("stderr.log"))]
    assert len(lines) == 2
    # torchrun ends the other as soon as one has ended
    reported = [line for text in lines for line in text.splitlines() if line.startswith("error: ")]
    assert reported
    assert all(line.startswith(f"error: {name}=") and " on rank 1, but " in line for line in reported)
