"""`fit --ckpt_path last`, `best` or a path, as a user sees it: exact resumes and rejected ones."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import clean_environment, read_offline_run, run_cli
from runs import assert_same_run, load
from test_cli import CSV, NO_LOGGER, QUIET, error_line, runs_in

from lightning_dqn.cli import main
from lightning_dqn.resume import checkpoint_io as plugin

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
# 300 env steps an epoch, of which those from the 128th on learn; a log every 50
SMALL = ("--data.epoch_env_steps", "300", "--data.eval_episodes", "2", "--model.network.hidden_sizes", "[16]", *QUIET)
RATES = {"env_steps_per_second", "updates_per_second"}


def epochs(count):
    """The words that end a run after so many epochs."""
    return "--trainer.max_epochs", str(count)


def rows(run, pattern="metrics.csv"):
    """All that was logged in a run's folder, but for how fast it was."""
    (path,) = run.glob(pattern)
    with path.open() as file:
        return [{k: v for k, v in row.items() if v and k not in RATES} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Three epochs of which none was stopped, in `whole`, and in `part` the first of them."""
    folder = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("whole", 3), ("part", 1)):
            (folder / name).mkdir()
            patch.chdir(folder / name)
            main(["fit", *SMALL, *CSV, *epochs(count)])
    return folder


@pytest.fixture
def part(workplace, tmp_path, monkeypatch):
    """A copy of the run of one epoch, in a current folder of its own."""
    shutil.copytree(workplace / "part", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return runs_in(tmp_path)[0]


@pytest.fixture
def whole(workplace):
    """The run that was not stopped."""
    return runs_in(workplace / "whole")[0]


def test_a_fresh_process_resumes_exactly(part, whole):
    env = clean_environment(Path.cwd())
    done = run_cli(Path.cwd(), env, "fit", "--ckpt_path", "last", *epochs(3))
    assert done.exit_code == 0, done.text
    assert_same_run(whole / "checkpoints" / "last.ckpt", part / "checkpoints" / "last.ckpt")
    (line,) = [line for line in done.text.splitlines() if line.startswith("Resumed")]
    assert line == "Resumed at 300 env steps with 300 transitions."
    assert "approximate" not in done.text
    # the log continues too: the same values at the same env steps
    assert rows(part, "resumed_*/metrics.csv") == rows(whole)[-len(rows(part, "resumed_*/metrics.csv")) :]
    assert rows(part) == rows(whole)[: len(rows(part))]
    assert len(rows(part)) + len(rows(part, "resumed_*/metrics.csv")) == len(rows(whole)) > 18


@pytest.mark.parametrize("checkpoint", ["best", "last", "path"])
def test_best_last_and_a_path_lead_to_the_same_end(part, whole, checkpoint):
    path = part / "checkpoints" / "last.ckpt"
    main(["fit", "--ckpt_path", str(path) if checkpoint == "path" else checkpoint, *epochs(3)])
    assert_same_run(whole / "checkpoints" / "last.ckpt", path)
    # which the plot draws
    assert (part / "episodes.png").read_bytes() == (whole / "episodes.png").read_bytes()
    assert_same_run(whole / "checkpoints" / "best.ckpt", part / "checkpoints" / "best.ckpt")


def bests(run):
    """Score and name of the best checkpoint so far, as the last one knows them."""
    states = load(run / "checkpoints" / "last.ckpt")["callbacks"].values()
    return [
        (float(state["best_model_score"]), Path(state["best_model_path"]).name)
        for state in states
        if isinstance(state, dict) and state.get("monitor")
    ]


def test_the_best_so_far_is_remembered_also_where_the_folder_was_moved(part, whole, tmp_path, monkeypatch):
    main(["fit", "--ckpt_path", "last", *epochs(2)])
    moved = tmp_path / "elsewhere" / "moved"
    shutil.move(part, moved)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    main(["fit", "--ckpt_path", str(moved / "checkpoints" / "last.ckpt"), *epochs(3)])
    assert len(bests(whole)) == 1
    assert bests(moved) == bests(whole)
    assert sorted(path.name for path in (moved / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.faults
def test_the_run_in_wandb_resumes_under_its_id(tmp_path):
    env = clean_environment(tmp_path)
    assert run_cli(tmp_path, env, "fit", *SMALL, *epochs(1)).exit_code == 0
    done = run_cli(tmp_path, env, "fit", "--ckpt_path", "last", *epochs(2))
    assert done.exit_code == 0, done.text
    (run,) = runs_in(tmp_path)
    folders = sorted(run.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_mtime)
    assert len(folders) == 2
    assert len({path.name.rpartition("-")[2] for path in folders}) == 1
    shutil.rmtree(folders[0])
    records = read_offline_run(run)
    clock = [record["history"]["item"]["env_steps"] for record in records if record["type"] == "history"]
    assert clock == sorted(clock)
    assert (clock[0], clock[-1]) == (350, 600)
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert [metric["step_metric"] for metric in metrics if metric.get("glob_name") == "*"][-1] == "env_steps"


def test_the_checkpoint_is_read_once(part, monkeypatch):
    read = []
    original = plugin._read
    monkeypatch.setattr(plugin, "_read", lambda path, *rest: read.append(path) or original(path, *rest))
    main(["fit", "--ckpt_path", "last", *epochs(2)])
    assert [path.name for path in read] == ["last.ckpt"]


def test_what_a_killed_save_left_is_removed_when_the_run_resumes(part):
    folder = part / "checkpoints"
    # no process has this number
    stale = folder / ".saving-999999999-0123abcd-0123abcd.tmp"
    orphan = folder / "memory-0123456789abcdef.safetensors"
    for path in (stale, orphan):
        path.write_bytes(b"half a checkpoint")
    main(["fit", "--ckpt_path", "last", *epochs(2)])
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_plugin_of_the_user_is_added(part, monkeypatch):
    (Path.cwd() / "mine.py").write_text(
        "from lightning.pytorch.plugins import DoublePrecision\n\nclass Mine(DoublePrecision):\n    made = []\n\n"
        "    def __init__(self):\n        super().__init__()\n        self.made.append(self)\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    main(["fit", *SMALL, *NO_LOGGER, *epochs(1), "--trainer.plugins", "mine.Mine"])
    newest = max(runs_in(Path.cwd()), key=lambda run: run.stat().st_mtime)
    content = torch.load(newest / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["state_dict"]["policy_net.output.weight"].dtype == torch.float64
    assert content["lightning_dqn"]["schema"] == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.gamma=0.5"], "data.gamma=0.5: the checkpoint was made with 0.99"),
        (["--model.optimizer.lr", "0.5"], "model.optimizer.lr=0.5: the checkpoint was made with 0.0001"),
        (["--model.network.hidden_sizes", "[8]"], "hidden_sizes=[8]: the checkpoint was made with [16]"),
        (["--epsilon.end", "0.1"], "epsilon.end=0.1: the checkpoint was made with 0.05"),
        (["--seed_everything", "7"], "seed=7: the checkpoint was made with 0"),
    ],
)
def test_a_flag_that_contradicts_the_run_is_rejected_with_both_values(part, capfd, flags, words):
    line = error_line(capfd, "fit", "--ckpt_path", "last", *flags)
    assert words in line


def test_a_configuration_beside_that_contradicts_the_run_is_rejected_with_both_values(part, capfd):
    config = yaml.safe_load((part / "config.yaml").read_text())
    config["data"]["n_step"] = 3
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    path = str(part / "checkpoints" / "last.ckpt")
    assert "data.n_step=3: the checkpoint was made with 1" in error_line(
        capfd, "fit", "--config", "mine.yaml", "--ckpt_path", path
    )


def test_the_checkpoint_is_compared_whatever_the_configuration_beside_it_says(part, capfd):
    config = yaml.safe_load((part / "config.yaml").read_text())
    config["data"]["gamma"] = 0.5
    (part / "config.yaml").write_text(yaml.safe_dump(config))
    path = str(part / "checkpoints" / "last.ckpt")
    line = error_line(capfd, "fit", "--ckpt_path", path, "--data.gamma", "0.5")
    assert "data.gamma=0.5: the checkpoint was made with 0.99" in line


def test_what_does_not_touch_learning_may_change(part, whole):
    free = [
        *("--data.eval_episodes", "3", "--trainer.log_every_n_steps", "10", "--plot.window", "5", *epochs(3)),
        *("--checkpoint.save_top_k", "2", "--trainer.logger", "false", "--model.compile", "false"),
    ]
    main(["fit", "--ckpt_path", "last", *free])
    one, other = (load(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (whole, part))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_evaluation_may_have_other_options_than_the_run(part, capfd):
    main(["test", "--ckpt_path", "best", "--data.num_envs", "8", "--data.gamma", "0.5", *QUIET])
    assert "test/episode_return" in capfd.readouterr().out
