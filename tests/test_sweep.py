"""Sweeps on one machine: what a sweep file means to Optuna, and what becomes of good, bad and stopped trials."""

import csv
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest
import yaml
from conftest import clean_environment, run_cli
from optuna.trial import TrialState

from lightning_dqn.cli import main as fit
from lightning_dqn.sweep.__main__ import main
from lightning_dqn.sweep.process import TrialProcess, reason
from lightning_dqn.sweep.search import Search, shown
from lightning_dqn.sweep.space import read_parameter
from lightning_dqn.sweep.sweep_file import read_sweep_file
from lightning_dqn.sweep.trial import make_pruner

ROOT = Path(__file__).parent.parent
FILE = ROOT / "configs" / "sweep.yaml"
COMMAND = ["${env}", "${interpreter}", "-m", "lightning_dqn", "fit", "${args}"]
# returns of CartPole are 8 at the least, but 1 where an evaluation stops an episode after its first step
TINY = """
method: random
metric: {name: val/episode_return, goal: maximize}
early_terminate: {type: hyperband, min_iter: 1, eta: 2}
command:
  - ${interpreter}
  - -m
  - lightning_dqn
  - fit
  - --trainer.max_epochs=3
  - --data.epoch_env_steps=300
  - --data.eval_episodes=4
  - --video.episodes=0
  - ${args}
parameters:
  target_update.tau: {min: 0.001, max: 4.0}
  model.optimizer.lr: {distribution: log_uniform_values, min: 1.0e-4, max: 1.0e+30}
  data.eval_max_steps: {values: [1, 500]}
"""
GOOD = {"target_update.tau": 0.005, "model.optimizer.lr": 1e-3, "data.eval_max_steps": "500"}


def drawn(said, count=300):
    """Values of a parameter, by chance."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    parameter = read_parameter("knob", said)
    return [parameter.ask(study.ask()) for _ in range(count)]


def write(folder, **changes):
    """A sweep file of one parameter, with changes."""
    said = {
        "method": "bayes",
        "metric": {"name": "val/episode_return", "goal": "maximize"},
        "command": COMMAND,
        "parameters": {"model.optimizer.lr": {"min": 1e-4, "max": 1e-2}},
    }
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in {**said, **changes}.items() if value is not None}))
    return path


@pytest.mark.parametrize("said", [{"value": 7}, {"distribution": "constant", "value": 7}])
def test_a_constant_is_always_its_value(said):
    assert set(drawn(said, 5)) == {7}


@pytest.mark.parametrize("more", [{}, {"distribution": "categorical"}])
def test_each_of_the_values_is_drawn_as_the_text_that_the_command_line_takes(more):
    values = [True, 0, 2.5, "null", [64, 64]]
    assert set(drawn({"values": values, **more})) == {"True", "0", "2.5", "null", "[64, 64]"}


@pytest.mark.parametrize("more", [{}, {"distribution": "int_uniform"}])
def test_whole_bounds_mean_whole_values_and_both_bounds_are_among_them(more):
    assert set(drawn({"min": 2, "max": 5, **more})) == {2, 3, 4, 5}


@pytest.mark.parametrize("said", [{"min": 1, "max": 3.0}, {"min": 1, "max": 3, "distribution": "uniform"}])
def test_uniform_values_lie_evenly_between_their_bounds(said):
    values = drawn(said)
    assert all(isinstance(value, float) and 1 <= value <= 3 for value in values)
    assert 0.4 < sum(value < 2 for value in values) / len(values) < 0.6


@pytest.mark.parametrize(
    "said",
    [
        {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        # exponents of e
        {"distribution": "log_uniform", "min": math.log(1e-4), "max": math.log(1e-2)},
    ],
)
def test_logarithms_of_log_uniform_values_lie_evenly_between_the_bounds(said):
    values = drawn(said)
    assert all(1e-4 * (1 - 1e-9) <= value <= 1e-2 * (1 + 1e-9) for value in values)
    # the middle of the logarithms
    assert 0.4 < sum(value < 1e-3 for value in values) / len(values) < 0.6


def test_quantised_values_are_multiples_of_q_within_the_bounds():
    # 1.5 to 11: 4 and 8, where W&B's rounding would give 0 and 12 as well
    values = drawn({"distribution": "q_uniform", "min": 1.5, "max": 11, "q": 4})
    assert set(values) == {4, 8}
    assert all(isinstance(value, int) for value in values)
    assert set(drawn({"distribution": "q_uniform", "min": 1, "max": 3})) == {1, 2, 3}


def test_a_fraction_as_q_keeps_both_bounds():
    values = drawn({"distribution": "q_uniform", "min": 0.3, "max": 0.7, "q": 0.1})
    # 0.7 / 0.1 is 6.999999999999999
    assert sorted(set(values)) == [0.3, 0.4, 0.5, 0.6, 0.7]


@pytest.mark.parametrize(
    "said",
    [
        {"distribution": "q_log_uniform_values", "min": 1, "max": 1000, "q": 10},
        {"distribution": "q_log_uniform", "min": 0.0, "max": math.log(1000), "q": 10},
    ],
)
def test_quantised_log_uniform_values_are_multiples_of_q_within_the_bounds(said):
    values = drawn(said)
    assert all(value % 10 == 0 and 10 <= value <= 1000 and isinstance(value, int) for value in values)
    # 10 to 1000: the middle of the logarithms is 100
    assert 0.4 < sum(value <= 100 for value in values) / len(values) < 0.65


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"distribution": "normal", "mu": 0}, "distribution=normal: Optuna has nothing like it; use one of constant, "),
        ({"values": [1, 2], "probabilities": [0.1, 0.9]}, "distribution=categorical_w_probabilities: Optuna has"),
        ({"min": "1e-4", "max": 1.0}, "min=1e-4: must be a number; to YAML 1e-4 is text, 1.0e-4 a number"),
        ({"min": True, "max": 3}, "min=True: must be an integer"),
        ({"min": 2, "max": 1}, "min=2: must not be above max=1"),
        ({"min": 1}, "max: is missing, which uniform needs"),
        ({"min": 1, "max": 2, "q": 1}, "q=1: means nothing to int_uniform; leave it out"),
        ({"distribution": "log_uniform_values", "min": 0.0, "max": 1.0}, "min=0.0: must be positive"),
        ({"distribution": "q_uniform", "min": 1, "max": 2, "q": 0}, "q=0: must be positive"),
        ({"distribution": "q_uniform", "min": 1, "max": 2, "q": 5}, "q=5: no multiple of it lies between 1 and 2"),
        ({"distribution": "int_uniform", "min": 1.5, "max": 2}, "min=1.5: must be an integer"),
        ({"values": []}, "must be a list of one value or more"),
        ({"values": [1, None]}, 'write "null", with the quotes'),
        ({"parameters": {"lr": {"value": 1}}}, "write nested names dotted"),
        (3, "must be a mapping"),
    ],
    ids=str,
)
def test_what_optuna_cannot_draw_is_refused_with_its_name_and_the_remedy(said, error):
    with pytest.raises(ValueError, match=re.escape(error)) as refused:
        read_parameter("model.optimizer.lr", said)
    assert str(refused.value).startswith("parameters.model.optimizer.lr")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"parameters": None}, "has no parameters"),
        ({"method": "grid"}, "method=grid: must be bayes or random"),
        ({"metric": {"name": "val/episode_return", "goal": "up"}}, "and a goal, maximize or minimize"),
        ({"metric": {"name": "x", "goal": "maximize", "target": 3}}, "metric.target=3: is not known here"),
        ({"early_terminate": {"type": "median"}}, "early_terminate.type=median: must be hyperband"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 9, "s": 2}}, "is not known here; leave it out"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 0}}, "early_terminate.min_iter=0: must be"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 1}}, "early_terminate.eta=1: must be above 1"),
        ({"command": None}, "command=None: must be a list with the words -m, lightning_dqn, fit"),
        ({"command": ["${env}", "python", "train.py", "${args}"]}, "must be a list with the words"),
        ({"command": COMMAND[:-1]}, "command: must have ${args} once"),
        ({"command": [*COMMAND[:-1], "${args_no_hyphens}"]}, "command: ${args_no_hyphens} is not known here"),
    ],
    ids=str,
)
def test_a_file_that_is_no_sweep_of_a_fit_is_refused_with_the_key(tmp_path, changes, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        read_sweep_file(write(tmp_path, **changes))


def test_the_users_words_stand_before_the_parameters_so_that_these_count(tmp_path):
    file = read_sweep_file(write(tmp_path, command=[*COMMAND[:-1], "--data.n_step", 3, "${args}", "--plot.x=1"]))
    words = file.words({"model.optimizer.lr": 0.5}, ["--model.optimizer", "Adam"])
    assert words == ["--data.n_step", "3", "--model.optimizer", "Adam", "--model.optimizer.lr=0.5", "--plot.x=1"]


def test_a_class_comes_before_its_knobs_however_the_file_orders_them(tmp_path, capsys):
    parameters = {"model.optimizer.lr": {"value": 0.5}, "model.optimizer": {"value": "Adam"}, "model": {"value": "C51"}}
    file = read_sweep_file(write(tmp_path, parameters=parameters))
    with pytest.raises(SystemExit) as left:
        fit(["fit", *file.words({p.name: p.example for p in file.parameters}, []), "--print_config"])
    assert left.value.code == 0
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert model["class_path"] == "lightning_dqn.C51"
    assert model["init_args"]["optimizer"]["class_path"] == "torch.optim.Adam"
    assert model["init_args"]["optimizer"]["init_args"]["lr"] == 0.5


def test_hyperband_with_eta_2_goes_on_with_the_better_half_by_the_best_so_far():
    pruner = make_pruner({"eta": 2, "min_iter": 2, "full_trials": 3})
    study = optuna.create_study(direction="maximize", pruner=pruner)
    # at the second evaluation 10, 20 and 30: the median is 20
    for second in (10, 20, 30):
        trial = study.ask()
        for step, value in enumerate((5, second)):
            trial.report(value, step)
        study.tell(trial, second)
    pruned = {}
    for name, values in {"low": (1, 19), "high": (1, 21), "once_high": (25, 1)}.items():
        trial = study.ask()
        trial.report(values[0], 0)
        assert not trial.should_prune(), "before min_iter evaluations"
        trial.report(values[1], 1)
        pruned[name] = trial.should_prune()
    assert pruned == {"low": True, "high": False, "once_high": False}
    assert isinstance(make_pruner(None), optuna.pruners.NopPruner)


def search_in(folder, **changes):
    """A search of TINY in a folder."""
    path = folder / "tiny.yaml"
    path.write_text(TINY)
    knobs = {"extra": [], "storage": f"sqlite:///{folder / 'study.db'}", "seed": 0, "full_trials": 1, "folder": folder}
    return Search(**{"file": read_sweep_file(path), **knobs, **changes})


def test_a_study_takes_no_trials_of_another_search(tmp_path):
    search_in(tmp_path).open()
    search_in(tmp_path, seed=1, full_trials=3).open()
    with pytest.raises(ValueError, match=r"was made with words .*300.*, not .*301.*choose another storage"):
        search_in(tmp_path, extra=["--data.epoch_env_steps=301"]).open()


def test_a_stopped_trial_is_asked_for_again_and_a_failed_one_is_not(tmp_path):
    search = search_in(tmp_path)
    first, asked = search.ask(search.open())
    first.set_user_attr("stopped", True)
    search.open().tell(first, state=TrialState.FAIL)
    second, again = search.ask(search.open())
    assert again == asked
    search.open().tell(second, state=TrialState.FAIL)
    assert search.ask(search.open())[1] != asked


def test_two_sweeps_at_once_ask_for_different_trials(tmp_path):
    one, other = (search_in(tmp_path) for _ in range(2))
    # both look before either has told how its trial went
    assert one.ask(one.open())[1] != other.ask(other.open())[1]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["no.yaml"], "error: no.yaml: no such file; configs/sweep.yaml is a sweep file\n"),
        ([str(FILE), "--trials", "0"], "error: --trials 0: must be at least 1\n"),
        ([str(FILE), "--trails", "9"], "error: --trails: no such option; did you mean --trials?\n"),
        ([str(FILE), "--model.double=true"], f"error: --model.double: is a parameter of {FILE}; leave it out, or"),
        ([str(FILE), "--data.num_env", "3"], "did you mean --data.num_envs?\n"),
        ([str(FILE), "--data.env_kwargs.api_token", "abc"], "error: env_kwargs.api_token: a secret given by value"),
        ([str(FILE), "--storage", "study.db"], "error: --storage study.db: must be the address of a database, sqlite:"),
        ([str(FILE), "--storage", "sqlite:///no/where.db"], "unable to open database file\n"),
    ],
    ids=lambda words: words[-1] if isinstance(words, list) else "",
)
def test_what_no_trial_could_run_with_is_refused_before_there_is_one(tmp_path, monkeypatch, capsys, words, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(FILE.parent)
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert error in said
    assert said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_without_optuna_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit):
        main([str(FILE)])
    assert capsys.readouterr().err.endswith('which chooses the trials: pip install -e ".[sweep]"\n')


def test_the_password_of_a_storage_is_not_shown():
    assert shown("postgresql://me:hunter2@host/db") == "postgresql://me:***@host/db"


COUNTS_SIGNALS = """
import signal, sys, time
got = []
signal.signal(signal.SIGINT, lambda *_: got.append(1))
print("ready", flush=True)
while not got or {stubborn}:
    time.sleep(0.01)
time.sleep(0.3)
print(len(got), "signals", flush=True)
sys.exit(130)
"""


@pytest.mark.parametrize(("signals", "code"), [(1, 130), (2, -signal.SIGKILL)])
def test_a_ctrl_c_reaches_the_trial_once_and_a_second_one_kills_it(tmp_path, signals, code):
    log = tmp_path / "log"

    def interrupt():
        while not (log.exists() and "ready" in log.read_text()):
            time.sleep(0.01)
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with TrialProcess() as process:
        script = COUNTS_SIGNALS.format(stubborn=signals == 2)
        ended = process.run([sys.executable, "-c", script], dict(os.environ), log)
        thread.join()
    assert ended == code
    assert process.received == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) == before
    assert ("1 signals" in log.read_text()) == (signals == 1)


@pytest.mark.parametrize(
    ("code", "text", "why"),
    [
        (2, "Seed set to 0\nerror: tau=3: must be in (0, 1]\nwandb: bye\n", "tau=3: must be in (0, 1]"),
        (
            1,
            "Traceback (most recent call last):\n  x\ntorch.OutOfMemoryError: no room\n",
            "torch.OutOfMemoryError: no room",
        ),
        (-9, "", "killed by SIGKILL"),
        (143, "Stopped by SIGTERM at 3 env steps", "stopped by SIGTERM"),
        (3, "", "exit code 3"),
    ],
)
def test_why_a_trial_failed_is_said_in_a_line(tmp_path, code, text, why):
    (tmp_path / "log").write_text(text)
    assert reason(code, tmp_path / "log") == why


def run_sweep(cwd, *words, **popen):
    """`python -m lightning_dqn.sweep` in a folder; its process if more is asked for, else what it said and its code."""
    command = [sys.executable, "-m", "lightning_dqn.sweep", "tiny.yaml", *words]
    env = clean_environment(cwd)
    if popen:
        return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, text=True, **popen)
    return subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def returns_of(folder):
    """The evaluations of a run, as its own files have them."""
    with (folder / "metrics.csv").open() as rows:
        return [float(row["val/episode_return"]) for row in csv.DictReader(rows) if row["val/episode_return"]]


@pytest.fixture
def tiny(tmp_path):
    """A folder with TINY, and the study that its searches go on with."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    return tmp_path, storage, optuna.create_study(study_name="tiny", storage=storage, direction="maximize")


@pytest.mark.learning
def test_a_sweep_prunes_the_hopeless_lets_the_broken_fail_alone_and_goes_on_from_its_storage(tiny):
    cwd, storage, study = tiny
    too_much = {**GOOD, "model.optimizer.lr": 1e30}
    for values in (GOOD, {**GOOD, "target_update.tau": 3.0}, {**GOOD, "data.eval_max_steps": "1"}, too_much):
        study.enqueue_trial(values)
    words = ("--storage", storage, "--full_trials", "1")
    done = run_sweep(cwd, *words, "--trials", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    good, refused, hopeless = study.trials[:3]
    assert [t.state for t in study.trials[:3]] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED]
    assert refused.user_attrs["failure"].startswith("target_update.tau=3.0: must be in")
    assert f"failed: {refused.user_attrs['failure']}" in done.stdout
    # the score is the best of the evaluations, as the run's own files have them
    runs = [cwd / trial.user_attrs["folder"] for trial in (good, hopeless)]
    assert good.value == pytest.approx(max(returns_of(runs[0])))
    assert len(returns_of(runs[0])) == 3
    assert returns_of(runs[1]) == [1.0]
    assert (runs[0] / "checkpoints" / "best.ckpt").is_file()
    assert "3 trials: 1 complete, 1 pruned, 1 failed" in done.stdout
    assert f"best       {good.value:.2f}, trial 0, " in done.stdout

    done = run_sweep(cwd, *words, "--trials", "4")
    assert "4 trials of tiny.yaml, to maximize val/episode_return; 3 of them are there already" in done.stdout
    assert len(study.trials) == 4
    assert study.trials[3].state == TrialState.FAIL
    assert re.match(r"the loss is (nan|inf)|.*is not finite", study.trials[3].user_attrs["failure"])

    # the printed command line makes the best trial again
    [line] = [line for line in done.stdout.splitlines() if line.startswith("  train ")]
    python, *rest = shlex.split(line.split(maxsplit=1)[1])
    assert [python, *rest[:3]] == ["python", "-m", "lightning_dqn", "fit"]
    again = run_cli(cwd, clean_environment(cwd), *rest[2:], "--trainer.logger", "CSVLogger")
    assert returns_of(again.folder) == returns_of(runs[0])


@pytest.mark.learning
def test_a_trial_on_two_devices_is_pruned_on_both(tiny):
    cwd, storage, study = tiny
    for values in (GOOD, {**GOOD, "data.eval_max_steps": "1"}):
        study.enqueue_trial(values)
    devices = "--trainer.accelerator=cpu --trainer.devices=2 --trainer.strategy=ddp --data.epoch_env_steps=600"
    done = run_sweep(cwd, "--storage", storage, "--full_trials", "1", "--trials", "2", *devices.split())
    assert done.returncode == 0, done.stdout + done.stderr
    good, hopeless = study.trials
    assert (good.state, hopeless.state) == (TrialState.COMPLETE, TrialState.PRUNED)
    assert (len(good.intermediate_values), hopeless.intermediate_values) == (3, {0: 1.0})
    assert returns_of(cwd / hopeless.user_attrs["folder"]) == [1.0]


@pytest.mark.faults
def test_a_killed_trial_fails_alone_and_a_stopped_sweep_goes_on(tiny):
    cwd, storage, study = tiny
    study.enqueue_trial(GOOD)
    process = run_sweep(
        cwd, "--storage", storage, "--trials", "2", "--data.epoch_env_steps=100000", stderr=subprocess.PIPE
    )

    def training(number):
        """The run's folder, once it trains, and the processes of the trial."""
        while True:
            time.sleep(0.2)
            assert process.poll() is None, process.communicate()
            logs = list(cwd.glob(f"runs/sweeps/*/trial_{number}.log"))
            if logs and "Training" in logs[0].read_text():
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                return cwd / study.trials[number].user_attrs["folder"], [int(child) for child in children]

    _, [child] = training(0)
    os.kill(child, signal.SIGKILL)
    folder, _ = training(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "failed: killed by SIGKILL" in out
    assert "Stopped by SIGINT: the same command with --storage" in out
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert [t.user_attrs["stopped"] for t in study.trials] == [False, True]

    # again what was stopped, with an end this time
    stopped = study.trials[1].params
    search = search_in(cwd, storage=storage, extra=["--data.epoch_env_steps=100000"])
    assert search.open().study_name == "tiny"
    assert search.ask(search.open())[1] == stopped
