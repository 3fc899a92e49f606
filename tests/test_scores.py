"""`python -m benchmarks.scores`: the statistics by hand, the plan against the configurations, and what is kept."""

import json
import statistics as plain
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.scores import report
from benchmarks.scores.picture import curves, draw
from benchmarks.scores.plan import ENVIRONMENTS, VARIANTS, runs_of
from benchmarks.scores.runs import finished, key, read_curve
from benchmarks.scores.statistics import interquartile_mean, normalized, stratified_interval, summary

ROOT = Path(__file__).parent.parent
EVERY = [environment.name for environment in ENVIRONMENTS]


def result(run, score, **changed):
    """What a run leaves: two episodes around its score."""
    curve = [[1000, score - 20.0], [2000, score]]
    made = {"key": key(run), "command": "fit", "commit": "c", "load": 0.5, "wall_s": 9.0, "cpu_s": 8.0}
    return made | {"env_steps": 2000, "curve": curve, "returns": [score - 1.0, score + 1.0]} | changed


def test_the_interquartile_mean_leaves_out_a_quarter_on_each_side():
    # 4 scores: 1 is cut on each side, (2 + 4) / 2; 5: also 1, (2 + 4 + 9) / 3; 8: 2, (3 + 4 + 5 + 7) / 4
    assert interquartile_mean(np.array([100.0, 2.0, 4.0, -50.0])) == 3
    assert interquartile_mean(np.array([100.0, 2.0, 4.0, -50.0, 9.0])) == 5
    assert interquartile_mean(np.array([8.0, 1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 90.0])) == 4.75
    # up to 3 nothing is: (1 + 2 + 9) / 3
    assert interquartile_mean(np.array([9.0, 1.0, 2.0])) == 4
    assert interquartile_mean(np.array([[9.0, 1.0, 2.0], [0.0, 0.0, 3.0]])).tolist() == [4, 1]


def test_the_bootstrap_draws_runs_within_each_task():
    # two tasks without spread: within each every draw gives the same, so the mean of both is sure
    assert stratified_interval([[0.0, 0.0], [1.0, 1.0]]) == (0.5, 0.5)
    # one task of both: the mean of 4 draws is 0 or 1 in one of 16 each, beyond 2.5% of the draws
    assert stratified_interval([[0.0, 0.0, 1.0, 1.0]]) == (0.0, 1.0)


def test_the_bootstrap_interval_is_that_of_the_binomial():
    # IQM of 3 is their mean; of 3 draws from 0, 0, 3 the mean is the number of 3s: 0 in 8 of 27, 3 in 1 of 27 = 3.7%
    assert stratified_interval([[0.0, 0.0, 3.0]]) == (0.0, 3.0)
    assert stratified_interval([[5.0]]) == (5.0, 5.0)


def test_a_summary_by_hand():
    # mean 3, squares 4 + 1 + 0 + 1 + 4 = 10 over 4; the middle three 2 + 3 + 4
    found = summary([[1.0, 2.0, 3.0, 4.0, 5.0]])
    assert (found["mean"], found["std"], found["iqm"]) == (3, pytest.approx(2.5**0.5), 3)
    low, high = found["iqm_interval"]
    assert 1 <= low < 3 < high <= 5
    assert summary([[7.0]]) == {"mean": 7.0, "std": 0.0, "iqm": 7.0, "iqm_interval": [7.0, 7.0]}


def test_normalized_scores():
    assert normalized(-200, -200, -107) == 0
    assert normalized(-107, -200, -107) == 1
    # half the way on top
    assert normalized(-60.5, -200, -107) == 1.5


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=EVERY)
def test_configurations_play_what_the_plan_states_and_no_more(environment):
    config = yaml.safe_load((ROOT / environment.config).read_text())
    data = config["data"]
    assert data["env_id"] == environment.env_id
    iteration = data["num_envs"] * data.get("steps_per_iteration", 1)
    # epochs are whole iterations
    played = -(-data["epoch_env_steps"] // iteration) * iteration * config["trainer"]["max_epochs"]
    assert 0.99 * environment.env_steps <= played <= environment.env_steps
    # scores are those of the end: nothing stops when it is good
    assert "callbacks" not in config["trainer"]


def test_the_plan_has_every_run_once_and_seeds_outermost():
    runs = runs_of(EVERY, [variant.name for variant in VARIANTS], 2)
    assert len({run.folder for run in runs}) == len(runs) == 4 * len(VARIANTS) * 2
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    [run] = [run for run in runs if run.folder == Path("cartpole/double/1")]
    assert run.words == ["--config", "configs/cartpole_50k.yaml", "--model.double", "true", "--seed_everything", "1"]
    [rainbow] = [run for run in runs if run.folder == Path("acrobot/rainbow/0")]
    assert rainbow.configs == ["configs/acrobot.yaml", "configs/rainbow.yaml"]


def test_settings_name_a_run_and_its_seed_does_not():
    one, other = runs_of(["cartpole"], ["dqn"], 2)
    [double] = runs_of(["cartpole"], ["double"], 1)
    assert key(one) == key(other) != key(double)


def test_only_a_finished_run_of_the_same_settings_counts(tmp_path):
    [run] = runs_of(["cartpole"], ["dqn"], 1)
    assert finished(tmp_path, run) is None
    path = tmp_path / run.folder / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result(run, 5.0)))
    assert finished(tmp_path, run)["returns"] == [4.0, 6.0]
    path.write_text(json.dumps(result(run, 5.0, key="of other settings")))
    assert finished(tmp_path, run) is None


def test_results_are_merged_seed_by_seed_and_other_settings_replace_them():
    one, other, third = runs_of(["cartpole"], ["dqn"], 3)
    scores = report.merge({}, [(other, result(other, 400.0)), (one, result(one, 500.0))], {})
    scores = report.merge(scores, [(third, result(third, 480.0))], {})
    dqn = scores["environments"]["cartpole"]["variants"]["dqn"]
    assert list(dqn["seeds"]) == ["0", "1", "2"]
    assert [seed["score"] for seed in dqn["seeds"].values()] == [500, 400, 480]
    assert (dqn["mean"], dqn["iqm"]) == (460, 460)
    assert dqn["std"] == round(plain.stdev([500, 400, 480]), 2)
    # the episodes of one seed were its score -1 and +1
    assert dqn["seeds"]["0"]["std"] == 1
    scores = report.merge(scores, [(other, result(other, 9.0, key="new"))], {})
    assert list(scores["environments"]["cartpole"]["variants"]["dqn"]["seeds"]) == ["1"]


def test_what_the_results_hold_is_not_run_again_unless_its_settings_changed():
    one, other = runs_of(["cartpole"], ["dqn"], 2)
    [double] = runs_of(["cartpole"], ["double"], 1)
    assert not report.holds({}, one)
    scores = report.merge({}, [(one, result(one, 400.0))], {})
    assert [report.holds(scores, run) for run in (one, other, double)] == [True, False, False]
    scores = report.merge({}, [(one, result(one, 400.0, key="of other settings"))], {})
    assert not report.holds(scores, one)


def test_all_environments_count_alike_in_the_whole(tmp_path):
    runs = runs_of(EVERY, ["dqn"], 1)
    scores = report.merge({}, [(run, result(run, run.environment.published)) for run in runs[:3]], {})
    assert scores["over_environments"] == {}
    scores = report.merge(scores, [(runs[3], result(runs[3], runs[3].environment.random))], {})
    # 1, 1, 1 and 0: mean 3/4; one cut on each side leaves 1 and 1
    assert (scores["over_environments"]["dqn"]["mean"], scores["over_environments"]["dqn"]["iqm"]) == (0.75, 1)
    report.save(tmp_path / "scores.json", scores)
    assert report.load(tmp_path / "scores.json") == scores
    assert "| dqn | 500.0 +- 0.0 | 500.0 [500.0, 500.0] | 500.0 +- 1.0 | 9 |" in report.tables(scores)
    draw(tmp_path / "scores.png", scores)
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_is_the_mean_of_neighbours():
    seeds = [{"curve": [[10, 0.0], [20, 3.0], [30, 9.0]]}, {"curve": [[12, 2.0], [22, 2.0], [32, 2.0], [42, 7.0]]}]
    env_steps, values = curves(seeds)
    assert env_steps.tolist() == [11, 21, 31]
    # at the ends two neighbours: (0 + 3) / 2, (0 + 3 + 9) / 3, (3 + 9) / 2
    assert values.tolist() == [[1.5, 4, 6], [2, 2, 2]]


def test_a_curve_is_read_past_the_rows_of_training(tmp_path):
    folder = tmp_path / "CartPole-v1" / "now"
    folder.mkdir(parents=True)
    rows = "env_steps,train/loss,val/episode_return\n500,0.1,\n1000.0,,21.5\n1500,0.2,\n2000.0,,80.0\n"
    (folder / "metrics.csv").write_text(rows)
    assert read_curve(tmp_path) == [(1000, 21.5), (2000, 80.0)]


def test_training_returns_are_read_from_a_runs_own_record(tmp_path):
    from benchmarks.curves import read_returns  # noqa: PLC0415

    record = tmp_path / "version_0" / "metrics.csv"
    record.parent.mkdir()
    record.write_text("env_steps,train/episode_return,val/episode_return\n100,1.5,\n200,,7\n300,2.5,\n")
    assert read_returns(tmp_path) == ([100.0, 300.0], [1.5, 2.5])
