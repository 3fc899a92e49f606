"""The command line as a user sees it: files of a run, its output, rejected arguments."""

import csv
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio.v2 as imageio
import pytest
import torch
import yaml
from conftest import clean_environment, run_cli

from lightning_dqn.cli import main
from lightning_dqn.cli.errors import as_options
from lightning_dqn.cli.runs import new_run_folder

pytestmark = pytest.mark.integration

# 200 env steps make 200 - 127 = 73 updates: one after each env step from the 128th on
QUIET = ("--video.episodes", "0", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")
SMALL = ("--data.epoch_env_steps", "200", "--trainer.max_epochs", "1", "--data.eval_episodes", "2", *QUIET)
PRIORITIZED = "lightning_dqn.PrioritizedSampler"
NO_LOGGER = ("--trainer.logger", "false")
CSV = ("--trainer.logger", "CSVLogger")
METRICS = {
    *("train/loss", "train/q_value", "train/td_error", "train/epsilon", "train/episode_return", "train/episode_length"),
    *("val/episode_return", "val/episode_return_std", "val/episode_length"),
    *("env_steps", "updates", "env_steps_per_second", "updates_per_second"),
}


def runs_in(folder):
    """The folders of all runs, oldest first."""
    return sorted(path.parent for path in Path(folder).glob("runs/*/*/checkpoints"))


def history(run):
    """The rows of a run's metrics.csv, without what is empty."""
    with (run / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def printed_metrics(text):
    """The table that Lightning prints after an evaluation."""
    return {name: float(value) for name, value in re.findall(r"^\s*((?:val|test)/\w+)\s+([-\d.e]+)\s*$", text, re.M)}


def error_line(capfd, *words):
    """The one line that a rejected command line ends with; it has made no folder and changed no checkpoint."""
    before = snapshot()
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    captured = capfd.readouterr()
    assert ended.value.code == 2
    assert "Traceback" not in captured.out + captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, captured.err
    assert captured.err.splitlines()[-1] == lines[0], "the error is the last line"
    assert snapshot() == before
    return lines[0]


def snapshot():
    """The content of `runs`: folders, and checkpoints with what is in them."""
    paths = [path for path in Path("runs").rglob("*") if path.is_dir() or path.suffix == ".ckpt"]
    return {Path("runs"): Path("runs").exists(), **{path: path.is_file() and path.read_bytes() for path in paths}}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with two runs: a small one, and one made from its config.yaml."""
    folder = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", *SMALL, *CSV])
        (first,) = runs_in(folder)
        main(["fit", "--config", str(first / "config.yaml")])
    return folder


@pytest.fixture
def here(workplace, monkeypatch):
    """The workplace as the current folder."""
    monkeypatch.chdir(workplace)
    return workplace


@pytest.fixture(scope="module")
def run(workplace):
    """The folder of the first run."""
    return runs_in(workplace)[0]


def test_fit_leaves_configuration_checkpoints_and_plot_in_the_folder_of_its_run(workplace, run):
    assert run.parent == workplace / "runs" / "CartPole-v1"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?", run.name)
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["epoch_env_steps"] == 200
    assert imageio.imread(run / "episodes.png").shape[:2] == (400, 700)
    for name in ("best", "last"):
        checkpoint = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 73
        assert checkpoint["DQNDataModule"]["train"]["env_steps"] == 200
    assert not list(workplace.glob("*.ckpt"))
    assert not (workplace / "lightning_logs").exists()


def test_the_saved_configuration_names_no_folder(workplace, run):
    text = (run / "config.yaml").read_text()
    assert run.name not in text
    assert str(workplace) not in text
    assert yaml.safe_load(text)["trainer"]["default_root_dir"] is None
    assert yaml.safe_load(text)["checkpoint"]["dirpath"] is None


def test_the_saved_configuration_makes_the_same_run_again_in_a_folder_of_its_own(workplace, run):
    first, second = runs_in(workplace)
    assert first != second
    for folder in (first, second):
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (first / "config.yaml").read_text() == (second / "config.yaml").read_text()
    losses = [[row["train/loss"] for row in history(folder) if "train/loss" in row] for folder in (first, second)]
    assert len(losses[0]) == 2, "logged at 150 and 200 env steps"
    assert losses[0] == losses[1]


def test_folders_made_in_the_same_second_are_separate(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_run_folder(tmp_path, "module:Team/Env-v0"), range(32)))
    assert len(set(folders)) == 32
    assert {folder.parent for folder in folders} == {tmp_path / "module-Team-Env-v0"}


def test_the_csv_logger_writes_every_metric_into_the_folder_of_the_run(run):
    rows = history(run)
    assert set().union(*rows) >= METRICS
    for row in rows:
        assert row["step"] == row["env_steps"]
        assert row["updates"] == max(0, row["env_steps"] - 127)
    assert [row["env_steps"] for row in rows if "train/epsilon" in row] == [50, 100, 150, 200]
    assert [row["env_steps"] for row in rows if "val/episode_return" in row] == [200]


def test_the_tensorboard_logger_counts_env_steps_of_all_environments(tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    words = "--data.num_envs 4 --trainer.logger TensorBoardLogger --trainer.log_every_n_steps 10"
    main(["fit", *SMALL, *words.split()])
    (run,) = runs_in(tmp_path)
    events = reader.EventAccumulator(str(run)).Reload()
    assert set(events.Tags()["scalars"]) >= METRICS
    clock = events.Scalars("env_steps")
    for event in clock:
        assert event.step == event.value
    steps = [event.step for event in events.Scalars("train/epsilon")]
    # 200 env steps are 50 iterations of 4; a log every 10, each within the 4 steps that one iteration may wait
    assert len(steps) == 5
    for i, step in enumerate(steps, start=1):
        assert 40 * i - 4 < step <= 40 * i
    assert [event.step for event in events.Scalars("val/episode_return")] == steps[-1:]


def test_validate_prints_mean_spread_and_length_of_the_episodes_and_changes_no_checkpoint(here, run, capfd):
    before = snapshot()
    main(["validate", "--ckpt_path", str(run / "checkpoints" / "best.ckpt"), *QUIET])
    printed = printed_metrics(capfd.readouterr().out)
    low, high = printed["val/episode_return_min"], printed["val/episode_return_max"]
    assert low < high
    # two episodes: their mean is the middle, their standard deviation half of the difference
    assert printed["val/episode_return"] == pytest.approx((low + high) / 2)
    assert printed["val/episode_return_std"] == pytest.approx((high - low) / 2)
    # CartPole pays 1 an env step
    assert printed["val/episode_length"] == printed["val/episode_return"]
    at_its_end = [row for row in history(run) if "val/episode_return" in row][-1]
    assert printed["val/episode_return"] == at_its_end["val/episode_return"], "best is from the only evaluation"
    assert snapshot() == before


def test_test_finds_the_newest_run_and_films_the_episode_that_predict_plays(here, capfd, messages):
    newest = runs_in(here)[-1]
    main(["test", "--ckpt_path", "best", *QUIET, "--video.episodes", "1"])
    printed = printed_metrics(capfd.readouterr().out)
    (reported,) = [line.removeprefix("video: ") for line in messages if line.startswith("video: ")]
    assert Path(reported).is_file()
    main(["predict", "--ckpt_path", "best", *QUIET])
    episodes = torch.load(newest / "evaluation" / "episodes.pt", weights_only=True)
    assert len(episodes) == 2
    assert printed["test/episode_return"] == sum(float(episode["reward"].sum()) for episode in episodes) / 2
    (video,) = (newest / "evaluation" / "videos").glob("*.mp4")
    with imageio.get_reader(video) as film:
        metadata, frames = film.get_meta_data(), sum(1 for _ in film)
    # CartPole draws 600 x 400 pixels, 50 times a second; one frame before the first env step, one after each
    assert metadata["size"] == (600, 400)
    assert metadata["fps"] == 50
    assert frames - 1 in [len(episode["action"]) for episode in episodes]


def test_predict_writes_episodes_whose_actions_are_the_greedy_ones(here, run, messages):
    main(["predict", "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--data.eval_episodes", "3", *QUIET])
    path = run / "evaluation" / "episodes.pt"
    assert any(str(path.relative_to(here)) in line or str(path) in line for line in messages)
    episodes = torch.load(path, weights_only=True)
    assert len(episodes) == 3
    for episode in episodes:
        length = len(episode["action"])
        assert episode["observation"].shape == (length, 4)
        assert episode["q_values"].shape == (length, 2)
        assert episode["q_values"].argmax(1).equal(episode["action"])
        assert episode["reward"].tolist() == [1.0] * length


def test_a_fit_resumes_from_the_last_checkpoint_with_its_clocks_and_warns_of_nothing(copy, recwarn):
    main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    # in the folder of its run, beside the record of before
    assert set(runs_in(Path.cwd())) == {copy}
    (resumed,) = copy.glob("resumed_*")
    rows = history(resumed)
    # the second epoch only: 50 iterations from log to log, and an evaluation at its end
    assert [row["env_steps"] for row in rows] == [250, 300, 350, 400, 400]
    # 73 updates before, and now one an env step: the memory is warm
    assert [row["updates"] for row in rows] == [73 + 50, 73 + 100, 73 + 150, 73 + 200, 73 + 200]
    checkpoint = torch.load(copy / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 273
    assert checkpoint["DQNDataModule"]["train"]["env_steps"] == 400
    main(["validate", "--ckpt_path", str(copy / "checkpoints" / "best.ckpt"), *QUIET])
    # Python shows no deprecations to users
    shown = [warning for warning in recwarn if not issubclass(warning.category, DeprecationWarning)]
    assert [str(warning.message) for warning in shown] == []


def test_frozen_lake_trains_with_arguments_of_the_environment(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    main(["fit", *SMALL, *CSV, "--data.env_id", "FrozenLake-v1", "--data.env_kwargs", "{is_slippery: false}"])
    (run,) = runs_in(tmp_path)
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["env_kwargs"] == {"is_slippery": False}
    assert history(run)[-1]["updates"] == 73
    main(["validate", "--ckpt_path", "best", "--data.eval_episodes", "5", *QUIET])
    # one start and no chance: five greedy episodes are one and the same
    assert printed_metrics(capfd.readouterr().out)["val/episode_return_std"] == 0


@pytest.mark.parametrize(
    ("name", "actions"), [("Cue-v0", {0, 1}), ("CueFrom3-v0", {3, 4})], ids=["dict-observations", "actions-from-3"]
)
def test_an_environment_of_the_user_is_learnt(tmp_path, monkeypatch, capfd, name, actions):
    monkeypatch.chdir(tmp_path)
    learning = ("--data.gamma", "0", "--model.optimizer.lr", "0.01", "--data.env_id", f"user_module:{name}")
    main(["fit", *SMALL, *NO_LOGGER, "--data.epoch_env_steps", "400", *learning])
    # the checkpoint alone does not get the module imported
    assert "--trust user_module" in error_line(capfd, "validate", "--ckpt_path", "best", *QUIET)
    main(["validate", "--ckpt_path", "best", "--trust", "user_module", *QUIET])
    assert printed_metrics(capfd.readouterr().out)["val/episode_return"] == 10, "the cue is followed every time"
    main(["predict", "--ckpt_path", "best", "--trust=user_module", *QUIET])
    (run,) = runs_in(tmp_path)
    episodes = torch.load(run / "evaluation" / "episodes.pt", weights_only=True)
    assert set(torch.cat([episode["action"] for episode in episodes]).tolist()) == actions
    # a cue of 2 kinds, one-hot, and 3 numbers of noise
    assert episodes[0]["observation"].shape == (10, 2 + 3)


def test_prioritised_replay_runs_from_the_command_line_and_again_from_its_configuration(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    flags = "--data.sampler", PRIORITIZED, "--data.sampler.alpha", "0.5", "--priorities.anneal_env_steps", "150"
    main(["fit", *SMALL, *NO_LOGGER, *flags])
    [run] = Path("runs").glob("*/*")
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert kept["data"]["sampler"] == {"class_path": PRIORITIZED, "init_args": {"alpha": 0.5, "epsilon": 1e-6}}
    assert kept["priorities"] == {"beta_start": 0.4, "beta_end": 1.0, "anneal_env_steps": 150}
    main(["fit", "--config", str(run / "config.yaml")])
    one, other = (torch.load(path, weights_only=True) for path in Path("runs").glob("*/*/checkpoints/last.ckpt"))
    samplers = [each["DQNDataModule"]["train"]["memory"]["sampler"] for each in (one, other)]
    assert torch.equal(samplers[0]["priorities"], samplers[1]["priorities"])
    assert samplers[0]["beta"] == 1.0
    # at a resume, what it was made with stays
    last = str(run / "checkpoints" / "last.ckpt")
    for flag, value in (("data.sampler.alpha", "0.6"), ("priorities.beta_start", "0.5")):
        line = error_line(capfd, "fit", "--ckpt_path", last, f"--{flag}", value)
        assert f"{flag}={value}: the checkpoint was made with" in line


def test_a_schedule_of_epsilon_of_a_user_replaces_ours_and_a_resume_has_it_again(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    own = ("--epsilon", "user_module.Steps", "--epsilon.after", "150")
    main(["fit", "--config", str(Path(__file__).parent.parent / "configs" / "cartpole.yaml"), *SMALL, *NO_LOGGER, *own])
    (run,) = runs_in(tmp_path)
    described = {"class_path": "user_module.Steps", "init_args": {"end": 0.25, "after": 150}}
    assert yaml.safe_load((run / "config.yaml").read_text())["epsilon"] == described
    last = run / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    assert (float(saved["state_dict"]["epsilon"]), saved["agent"]["epsilon"]) == (0.25, described)
    assert "--trust user_module" in error_line(capfd, "fit", "--ckpt_path", str(last))
    trusting = ("fit", "--ckpt_path", str(last), "--trust", "user_module", "--trainer.max_epochs", "2")
    assert "epsilon.after=151" in error_line(capfd, *trusting, "--epsilon.after", "151")
    main(list(trusting))
    assert torch.load(last, weights_only=True)["epoch"] == 1
    main(["fit", "--config", str(run / "config.yaml")])
    main(["fit", *SMALL, *NO_LOGGER, "--epsilon.start", "0.5"])
    decay = yaml.safe_load((runs_in(tmp_path)[-1] / "config.yaml").read_text())["epsilon"]
    assert decay["class_path"] == "lightning_dqn.EpsilonDecay"
    assert decay["init_args"] == {"start": 0.5, "end": 0.05, "decay_env_steps": 1000, "schedule": "exponential"}
    with pytest.raises(SystemExit):
        main(["fit", *SMALL, *NO_LOGGER, "--trainer.callbacks", "user_module.Steps"])
    assert "two epsilon schedules" in capfd.readouterr().err


FAMILY = {
    "C51": "--model.v_max 200 --model.network.dueling true --model.network.noisy true",
    "QRDQN": "--model.num_quantiles 8 --model.munchausen true --model.clip_grad_norm 10",
    "IQN": "--model.lr_scheduler torch.optim.lr_scheduler.LinearLR --model.lr_scheduler.total_iters 100 "
    "--model.boltzmann_temperature 1 --target_update.tau 1 --target_update.every_n_env_steps 50",
}


@pytest.mark.parametrize("model", FAMILY)
def test_models_go_by_their_short_names_and_come_back_from_their_configuration(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    main(["fit", *SMALL, *CSV, "--model", model, *FAMILY[model].split()])
    (first,) = runs_in(tmp_path)
    saved = yaml.safe_load((first / "config.yaml").read_text())
    assert saved["model"]["class_path"] == f"lightning_dqn.{model}"
    arguments = saved["model"]["init_args"]
    if model == "C51":
        network = arguments["network"]["init_args"]
        assert {"dueling": True, "noisy": True, "layer_norm": False}.items() <= network.items()
        assert arguments["v_max"] == 200
    if model == "QRDQN":
        assert {"num_quantiles": 8, "munchausen": True, "clip_grad_norm": 10}.items() <= arguments.items()
    if model == "IQN":
        assert arguments["lr_scheduler"]["init_args"]["total_iters"] == 100
        assert saved["target_update"]["every_n_env_steps"] == 50
        state = torch.load(first / "checkpoints" / "last.ckpt", weights_only=True)
        # a third of the rate at the start, 73 hundredths of the rest later
        assert state["lr_schedulers"][0]["_last_lr"] == [pytest.approx(1e-4 * (1 / 3 + 2 / 3 * 0.73))]
    main(["fit", "--config", str(first / "config.yaml")])
    second = runs_in(tmp_path)[1]
    assert (first / "config.yaml").read_text() == (second / "config.yaml").read_text()
    paths = [run / "checkpoints" / "last.ckpt" for run in (first, second)]
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    assert all(torch.equal(one[name], other[name]) for name in one)
    main(["validate", "--ckpt_path", "best", *QUIET])


# option, value and what the error shows of it
OUT_OF_RANGE = """
    data.num_envs=0 data.steps_per_iteration=0 data.updates_per_iteration=0 data.batch_size=0 data.memory_capacity=127
    data.warmup_env_steps=-1 data.gamma=1.5 data.gamma=-0.1 data.n_step=0 data.epoch_env_steps=0 data.eval_episodes=0
    model.network.hidden_sizes=[0] model.optimizer.lr=0 model.optimizer.lr=-1 model.clip_grad_value=0
    model.clip_grad_norm=-1 model.boltzmann_temperature=0 model.munchausen_temperature=0
    target_update.every_n_env_steps=0 target_update.tau=0 target_update.tau=1.1 target_update.every_n_updates=0
    epsilon.start=1.1 epsilon.end=-0.1 epsilon.decay_env_steps=0 priorities.beta_start=1.1 priorities.beta_end=-0.1
    priorities.anneal_env_steps=0 plot.window=0 video.episodes=-1 trainer.max_epochs=-2 seed_everything=-1
"""
OUT_OF_RANGE = [(*each.split("="), each.split("=")[1]) for each in OUT_OF_RANGE.split()]
OUT_OF_RANGE += [("data.env_kwargs", "{foo: 1}", "{'foo': 1}"), ("data.gamma", ".nan", "nan")]
WRONG_TYPE = """
    data.env_kwargs=many data.num_envs=many data.batch_size=1.5 data.gamma=many data.sampler=many
    data.sampler=lightning_dqn.MLP model.network.hidden_sizes=many model.optimizer.lr=many model.clip_grad_value=many
    model.double=many model.loss=mae model.network.noisy=many target_update.tau=many target_update.every_n_updates=1.5
    epsilon.start=many epsilon.schedule=cosine trainer.max_epochs=many seed_everything=many
"""
WRONG_TYPE = [each.split("=") for each in WRONG_TYPE.split()]
# unknown key, and the one that is suggested
UNKNOWN = """
    data.num_env=data.num_envs data.gama=data.gamma gamma=data.gamma model.gamma=data.gamma
    model.clip_grad_val=model.clip_grad_value model.network.hiden_sizes=model.network.hidden_sizes
    lr=model.optimizer.lr model.network.duelling=model.network.dueling model.boltzmann=model.boltzmann_temperature
    target_update.every_n_env=target_update.every_n_env_steps target_update.ta=target_update.tau
    epsilon.st=epsilon.start trainer.max_epoch=trainer.max_epochs seed=seed_everything
"""
UNKNOWN = [each.split("=") for each in UNKNOWN.split()]


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty folder as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copy(run, tmp_path, monkeypatch):
    """A copy of the first run, in a current folder of its own."""
    folder = tmp_path / "runs" / run.parent.name / run.name
    shutil.copytree(run, folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize(("key", "value", "shown"), OUT_OF_RANGE, ids=[f"{k}={v}" for k, v, _ in OUT_OF_RANGE])
def test_a_value_out_of_its_range_is_rejected_by_key_and_value(empty, capfd, key, value, shown):
    line = error_line(capfd, "fit", *SMALL, *NO_LOGGER, f"--{key}", value)
    assert key.rpartition(".")[2] in line
    assert shown in line


@pytest.mark.parametrize(
    ("key", "value"), [("data.sampler", "PrioritisedSampler"), ("model", "Rainbow"), ("epsilon", "Cosine")]
)
def test_a_class_that_is_not_found_is_named(empty, capfd, key, value):
    line = error_line(capfd, "fit", *SMALL, *NO_LOGGER, f"--{key}", value)
    assert line == f"error: {key}={value}: no such class; give its whole path, module.Class"


def test_best_of_a_run_without_an_evaluation_is_not_that_of_an_older_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(["old/checkpoints/best", "old/checkpoints/last", "new/checkpoints/last"]):
        path = tmp_path / "runs" / "CartPole-v1" / f"{name}.ckpt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (i, i))
    line = error_line(capfd, "test", "--ckpt_path", "best")
    last_run = "the last run, runs/CartPole-v1/new, has last.ckpt only"
    assert line == f"error: --ckpt_path best: {last_run}; use that, or give a path"


def test_errors_of_the_library_name_options_on_the_command_line():
    shown = {
        "num_envs=0: must be at least 1": "data.num_envs=0: must be at least 1",
        "alpha=2.0: must be in [0, 1]": "data.sampler.alpha=2.0: must be in [0, 1]",
        "lr=0: must be positive": "model.optimizer.lr=0: must be positive",
        "double=True, munchausen=True: choose": "model.double=true, model.munchausen=true: choose",
        "start=2: must be in [0, 1]": "epsilon.start=2: must be in [0, 1]",
        "gamma=3: lower memory_capacity, loss": "data.gamma=3: lower data.memory_capacity, loss",
        "data.gamma=3, /a/num_envs=4, env_id": "data.gamma=3, /a/num_envs=4, data.env_id",
    }
    assert {text: as_options(text) for text in shown} == shown


@pytest.mark.parametrize(("key", "value"), WRONG_TYPE, ids=[f"{k}={v}" for k, v in WRONG_TYPE])
def test_a_value_of_the_wrong_type_is_rejected_by_key_and_value(empty, capfd, key, value):
    line = error_line(capfd, "fit", *SMALL, *NO_LOGGER, f"--{key}", value)
    assert key.rpartition(".")[2] in line
    assert value in line
    assert "Namespace" not in line
    assert "<class" not in line


@pytest.mark.parametrize(("key", "meant"), UNKNOWN, ids=[key for key, _ in UNKNOWN])
def test_unknown_and_shortened_keys_are_rejected_with_what_was_meant(empty, capfd, key, meant):
    line = error_line(capfd, "fit", *SMALL, *NO_LOGGER, f"--{key}", "3")
    assert key.rpartition(".")[2] in line
    assert line.endswith(f"did you mean --{meant}?")


# words behind `--model C51`, and what the error says
OF_A_MODEL = {
    f"--data.sampler {PRIORITIZED} --data.sampler.alpha 1.5": "data.sampler.alpha=1.5: must",
    "--data.sampler Prioritised": "data.sampler=Prioritised: no such class; give its whole path, module.Class",
    "--model Rainbow": "model=Rainbow: no such class; give its whole path, module.Class",
    "--model.clip_grad_norm many": "model.clip_grad_norm=many: must be of type float",
    "--model DQN --model.loss mae": "model.loss=mae: must be of type Literal['huber', 'mse']",
    "--model.munchausen true": "model=lightning_dqn.C51: Option 'munchausen' is not accepted; ",
    "--model.loss mse": "model=lightning_dqn.C51: Option 'loss' is not accepted; ",
    "--model.vmax 3": "'vmax' is not accepted; did you mean --model.v_max?",
    "--model.v_min 300": "model.v_min=300.0, model.v_max=100.0: model.v_min must be below model.v_max",
    "--model QRDQN --model.double true --model.munchausen true": "soft values pick no action; choose one of them",
    "--model IQN --model.munchausen true --data.n_step 3": "data.n_step=3: munchausen adds to the reward",
    "--model.lr_scheduler LinearLR --model.lr_scheduler.nonsense 1": "'nonsense'",
    "--model.lr_scheduler LinarLR": "model.lr_scheduler=LinarLR: no such class; give its whole path, module.Class",
    "--model.lr_scheduler ReduceLROnPlateau": "to avoid ambiguity: torch.optim.lr_scheduler.ReduceLROnPlateau",
    "--model.lr_scheduler torch.optim.lr_scheduler.ReduceLROnPlateau": "ReduceLROnPlateau: waits for a metric",
    "--target_update.every_n_env_steps 9 --target_update.every_n_updates 2": "every_n_env_steps=9: two clocks",
}


@pytest.mark.parametrize(("flags", "reported"), OF_A_MODEL.items(), ids=OF_A_MODEL)
def test_what_a_model_does_not_take_is_rejected_in_its_name(empty, capfd, flags, reported):
    line = error_line(capfd, "fit", *SMALL, *NO_LOGGER, "--model", "C51", *flags.split())
    assert reported in line
    if reported.endswith("; "):
        assert line.endswith("fit --model.help C51 lists all options"), "and not the arguments of another model"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data:\n  gama: 0.5\n", ["data.gama", "did you mean --data.gamma?"]),
        ("data:\n  num_envs: many\n", ["data.num_envs", "many"]),
        ("target_update:\n  tau: 0\n", ["target_update.tau=0"]),
        ("data: [1\n", ["config", "line 1"]),
    ],
    ids=["unknown-key", "wrong-type", "out-of-range", "no-yaml"],
)
def test_a_mistake_in_a_configuration_file_is_rejected(empty, capfd, text, words):
    (empty / "mine.yaml").write_text(text)
    line = error_line(capfd, "fit", *SMALL, *NO_LOGGER, "--config", "mine.yaml")
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("CartPol-v1", ["env_id=CartPol-v1", "did you mean CartPole-v1"]),
        ("CartPole-v99", ["env_id=CartPole-v99", "did you mean CartPole-v1"]),
        ("nowhere:Env-v0", ["env_id=nowhere:Env-v0", "no module 'nowhere'"]),
        ("Pendulum-v1", ["action_space", "Box", "Discrete"]),
    ],
)
def test_an_environment_that_cannot_be_used_is_rejected(empty, capfd, env_id, words):
    line = error_line(capfd, "fit", *SMALL, *NO_LOGGER, "--data.env_id", env_id)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["fit", "--config", "missing.yaml"], "missing.yaml"),
        (["fit", *SMALL, "--ckpt_path", "missing.ckpt"], "missing.ckpt"),
        (["test", "--ckpt_path=missing.ckpt"], "missing.ckpt"),
        (["fit", *SMALL, "--ckpt_path", "last"], "no run in runs has a checkpoint"),
        (["validate", "--ckpt_path", "best"], "no run in runs has a checkpoint"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join([value[0], *value[-2:]]),
)
def test_a_missing_file_is_rejected_by_name(empty, capfd, words, named):
    assert named in error_line(capfd, *words)


def test_a_missing_subcommand_is_rejected(empty, capfd):
    for words in ([], ["fitt"]):
        line = error_line(capfd, *words)
        for name in ("fit", "validate", "test", "predict"):
            assert name in line


FOREIGN = {
    "of-another-environment": (("--data.env_id", "Acrobot-v1"), ["env_id"]),
    "of-another-width": (("--model.network.hidden_sizes", "[64, 64]"), ["128", "64", "network"]),
    "of-a-deeper-network": (("--model.network.hidden_sizes", "[128]"), ["network"]),
    "of-a-shallower-network": (("--model.network.hidden_sizes", "[128, 128, 128]"), ["network"]),
}


@pytest.mark.parametrize("subcommand", ["fit", "test"])
@pytest.mark.parametrize(("flags", "words"), FOREIGN.values(), ids=FOREIGN)
def test_a_checkpoint_of_something_else_is_rejected(copy, capfd, subcommand, flags, words):
    sized = SMALL if subcommand == "fit" else QUIET
    checkpoint = str(copy / "checkpoints" / "last.ckpt")
    # a record for people: nothing reads it
    (copy / "config.yaml").unlink()
    line = error_line(capfd, subcommand, *sized, *NO_LOGGER, "--ckpt_path", checkpoint, *flags)
    for word in words:
        assert word in line


@pytest.mark.parametrize("subcommand", ["fit", "test"])
@pytest.mark.parametrize("share", [0.5, 0.0], ids=["half", "nothing"])
def test_a_truncated_checkpoint_is_rejected(copy, capfd, subcommand, share):
    checkpoint = copy / "checkpoints" / "last.ckpt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(share * len(whole))])
    sized = SMALL if subcommand == "fit" else QUIET
    assert "last.ckpt" in error_line(capfd, subcommand, *sized, *NO_LOGGER, "--ckpt_path", str(checkpoint))


def test_a_memory_of_another_shape_is_rejected(copy, capfd):
    flags = ("--ckpt_path", "last", "--data.memory_capacity", "500")
    assert "memory_capacity" in error_line(capfd, "fit", *SMALL, *NO_LOGGER, *flags)


def test_a_rejected_command_line_ends_with_one_line_and_exit_code_2(tmp_path):
    done = run_cli(tmp_path, clean_environment(tmp_path), "fit", "--data.gamma", "1.5")
    assert done.exit_code == 2
    assert [line for line in done.text.splitlines() if line != "Seed set to 0"] == [
        "error: data.gamma=1.5: must be in [0, 1]"
    ]
    assert not (tmp_path / "runs").exists()


# `model.compile` comes with the tight path
OPTIONS = """
    data.env_id data.env_kwargs data.num_envs data.steps_per_iteration data.updates_per_iteration data.batch_size
    data.memory_capacity data.warmup_env_steps data.gamma data.n_step data.epoch_env_steps data.eval_episodes
    model model.network model.network.hidden_sizes model.optimizer model.clip_grad_value model.double
    model.lr_scheduler model.clip_grad_norm model.loss model.munchausen model.munchausen_temperature
    model.boltzmann_temperature model.network.dueling model.network.noisy model.network.layer_norm
    target_update.tau target_update.every_n_updates target_update.every_n_env_steps
    epsilon.start epsilon.end epsilon.decay_env_steps epsilon.schedule
    checkpoint.monitor trainer.max_epochs seed_everything
"""
DEFAULTS = """
    data.env_id=CartPole-v1 data.batch_size=128 data.memory_capacity=10000 data.gamma=0.99 data.epoch_env_steps=2500
    model.clip_grad_value=100.0 target_update.tau=0.005 epsilon.start=0.9 epsilon.end=0.05
    epsilon.decay_env_steps=1000 trainer.max_epochs=40 trainer.devices=1 seed_everything=0
"""


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_help_explains_every_option(empty, capfd, subcommand):
    with pytest.raises(SystemExit) as ended:
        main([subcommand, "--help"])
    assert ended.value.code == 0
    text = capfd.readouterr().out
    explained = {}
    for option in re.split(r"\n(?=  -)", text):
        head = re.match(r"  (?:-\w[^-]*, )?--([\w.]+)(?: \S+)?[^\n]*?(?:\n\s+|  )(.*)", option, re.S)
        if head:
            explained.setdefault(head[1], " ".join(head[2].split()))
    for option in OPTIONS.split():
        assert option in explained, option
        assert len(explained[option].partition("(type:")[0].split()) >= 3, (option, explained[option])
    defaults = dict(each.split("=") for each in DEFAULTS.split())
    for option, default in {**defaults, "model.network.hidden_sizes": "(128, 128)"}.items():
        assert f"default: {default})" in explained[option], option


def test_a_default_run_warns_of_nothing(default_runs):
    for run in default_runs.values():
        assert run.exit_code == 0, run.text
        assert [line for line in run.text.splitlines() if re.search(r"warn|deprecat", line, re.IGNORECASE)] == []


@pytest.mark.parametrize("kind", ["plain", "tty"])
def test_the_summary_reports_the_result_and_the_folder_of_a_run(default_runs, kind):
    run = default_runs[kind]
    first = re.search(r"^Finished: (.*)$", run.out, re.M)
    clocks = re.fullmatch(r"500 env steps, 373 updates in (\d+) min (\d+) s", first[1].strip())
    assert 0 < 60 * int(clocks[1]) + int(clocks[2]) <= run.seconds
    scores = re.fullmatch(
        r"best ([\d.]+), last ([\d.]+) \(mean of 2 greedy episodes\)", " ".join(run.summary["return"])
    )
    assert float(scores[1]) >= float(scores[2]) > 0
    best, last = run.summary["checkpoint"]
    assert (Path(best).name, Path(last).name) == ("best.ckpt", "last.ckpt")
    for path in (best, last, *run.summary["plot"], *run.summary["video"]):
        assert (run.cwd / path).is_file(), path
        assert not Path(path).is_absolute(), "as one would type it there"


def test_the_command_in_the_summary_replays_the_agent(default_runs):
    run = default_runs["plain"]
    (command,) = run.summary["replay"]
    assert command.startswith("python -m lightning_dqn test ")
    # video and table, as a reader gets them who pastes the line into a shell
    done = subprocess.run(command, shell=True, cwd=run.cwd, env=run.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = printed_metrics(done.stdout)
    assert printed["test/episode_return_min"] <= printed["test/episode_return"] <= printed["test/episode_return_max"]
    (video,) = re.findall(r"video: (\S+)$", done.stderr, re.M)
    assert (run.cwd / video).is_file()
    assert len(list(run.cwd.glob("runs/*/*/config.yaml"))) == 2, "no run is made by an evaluation"
