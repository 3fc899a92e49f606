"""Several ranks of one run: what each has of its own, what they share, and what one says to the others."""

import numpy as np
import pytest
import torch
from ranks import run, start
from runs import differences, load, play

pytestmark = pytest.mark.ranks
# of two ranks: an iteration is 2 x 2 env steps and 2 updates, an epoch 150 iterations
JOB = {"num_envs": 2, "updates_per_iteration": 2, "epoch_env_steps": 600, "memory_capacity": 1001, "eval_episodes": 5}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two ranks brought back from three fits: plain, compiled, and prioritised."""
    jobs = [
        {"name": "plain", **JOB},
        {"name": "compiled", **JOB, "compile": True, "limits": {"max_steps": 2000, "max_epochs": -1}},
        {"name": "prioritized", **JOB, "prioritized": True},
    ]
    both = run(tmp_path_factory.mktemp("two"), "fits", jobs=jobs)
    return {job: [ours[i] for ours in both] for i, job in enumerate(("plain", "compiled", "prioritized"))}


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


@pytest.mark.parametrize("job", ["plain", "compiled", "prioritized"])
def test_both_nets_stay_equal_to_the_bit(two_ranks, job):
    one, other = two_ranks[job]
    assert one["digests"] == other["digests"]
    assert len(one["digests"]) >= (20 if job == "compiled" else 5)
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
def test_case_25_every_rank_goes_on_exactly_where_it_was(stopped_and_resumed, how):
    one, other = (load(stopped_and_resumed / name / "epoch1.ckpt") for name in ("whole", how))
    [share], [other_share] = (found.pop("shares") for found in (one, other))
    assert list(differences(one, other)) == []
    assert play(one) == play(other)
    # and so does the second, whose share is another one
    own, other_own = load(share), load(other_share)
    assert list(differences(own, other_own)) == []
    assert play(own) == play(other_own)
    assert "DQNDataModule" in own
    found = list(differences({**one, **own}, one))
    assert {".generators.torch", ".DQNDataModule.train.rng.state.state"} < set(found)


def test_no_share_outlives_its_checkpoint(stopped_and_resumed):
    names = {path.name for path in (stopped_and_resumed / "whole").iterdir()}
    checkpoints = {name for name in names if name.endswith(".ckpt")}
    assert len(checkpoints) > 3
    assert len(names - checkpoints) == len(checkpoints)


def test_a_rank_whose_weights_were_changed_alone_ends_the_fit(tmp_path):
    processes = start(tmp_path, "one_goes_astray")
    assert [process.wait(120) for process in processes] == [1, 1]
    said = (tmp_path / "output-0.txt").read_text()
    assert "policy_net of rank 1 is not that of rank 0 any more, after 200 updates" in said


def test_a_rank_waits_for_another_as_long_as_the_strategy_says(tmp_path):
    first, second = start(tmp_path, "one_falls_silent")
    try:
        assert first.wait(200) == 0
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
    # 20 s there; without, torch's own 30 minutes
    assert 15 < torch.load(tmp_path / "record-0.pt", weights_only=True) < 60
