"""The configurations that come with the package."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from lightning_dqn.cli import main

pytestmark = pytest.mark.integration

CONFIGS = Path(__file__).parent.parent / "configs"
NEEDS_BOX2D = pytest.mark.skipif(importlib.util.find_spec("Box2D") is None, reason="needs gymnasium[box2d]")
# updates of large networks, and up to 64 emulators, take their time
MARKS = {"lunarlander": NEEDS_BOX2D}
MARKS |= dict.fromkeys(("atari", "atari_fast", "atari_rainbow"), pytest.mark.learning)


def every():
    """One parameter a configuration; a sweep file is none."""
    for path in sorted(set(CONFIGS.glob("*.yaml")) - {CONFIGS / "sweep.yaml"}):
        yield pytest.param(path, id=path.stem, marks=MARKS.get(path.stem, ()))


def resolved(capsys, *arguments):
    """The whole configuration that a fit with these arguments would have."""
    with pytest.raises(SystemExit):
        main(["fit", *arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def holds(whole, part):
    """Whether a configuration says everything that another says."""
    if isinstance(part, dict):
        return all(name in whole and holds(whole[name], value) for name, value in part.items())
    return whole == part


@pytest.mark.parametrize("path", list(every()))
def test_every_configuration_runs_for_a_short_epoch(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = "--trainer.max_epochs 1 --data.epoch_env_steps 300 --data.eval_episodes 2 --video.episodes 0"
    short += " --data.warmup_env_steps 200 --data.memory_capacity 20000 --data.eval_max_steps 300"
    main(["fit", "--config", str(path), "--trainer.logger", "CSVLogger", *short.split()])
    [run] = Path("runs").glob("*/*")
    given, kept = yaml.safe_load(path.read_text()), yaml.safe_load((run / "config.yaml").read_text())
    shorter = {"epoch_env_steps": 300, "eval_episodes": 2, "warmup_env_steps": 200}
    shorter |= {"memory_capacity": 20_000, "eval_max_steps": 300}
    assert holds(kept["data"], {**given["data"], **shorter})
    assert kept["model"]["class_path"] == given["model"]["class_path"]
    assert (run / "checkpoints" / "best.ckpt").is_file()


def test_the_textbook_configuration_states_the_defaults_in_full(capsys):
    with_config = resolved(capsys, "--config", str(CONFIGS / "cartpole.yaml"))
    by_default = resolved(capsys)
    # it stops when solved; that is all it adds
    assert with_config["trainer"].pop("callbacks")[0]["class_path"].endswith("EarlyStopping")
    by_default["trainer"].pop("callbacks")
    by_default["data"]["env_kwargs"] = {}
    assert with_config == by_default
    in_file = yaml.safe_load((CONFIGS / "cartpole.yaml").read_text())
    by_default["epsilon"] = by_default["epsilon"]["init_args"]
    for group in ("data", "target_update", "epsilon"):
        assert in_file[group].keys() == by_default[group].keys()
    assert in_file["model"]["init_args"].keys() == by_default["model"]["init_args"].keys()


@pytest.mark.parametrize("words", ["--model.optimizer Adam", "--model.optimizer=torch.optim.Adam"])
def test_another_optimizer_starts_from_its_own_defaults(words, capsys):
    options = resolved(capsys, *words.split())["model"]["init_args"]["optimizer"]
    assert options["class_path"] == "torch.optim.Adam"
    # AdamW of the default model: lr 1e-4, weight_decay 0.01, amsgrad true
    assert (options["init_args"]["lr"], options["init_args"]["weight_decay"]) == (1e-3, 0.0)
    assert options["init_args"]["amsgrad"] is False


def test_another_optimizer_in_a_file_starts_from_its_own_defaults_and_what_follows_counts(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {init_args: {optimizer: {class_path: torch.optim.SGD, init_args: {momentum: 0.9}}}}\n")
    words = ["--config", str(CONFIGS / "acrobot.yaml"), "--config", str(file), "--model.optimizer.lr", "0.5"]
    options = resolved(capsys, *words)["model"]["init_args"]["optimizer"]["init_args"]
    assert (options["lr"], options["momentum"], options["weight_decay"]) == (0.5, 0.9, 0.0)


def test_the_same_optimizer_keeps_its_arguments(capsys):
    options = resolved(capsys, "--model.optimizer.lr", "3e-4", "--model.optimizer.weight_decay", "0.1")
    options = options["model"]["init_args"]["optimizer"]["init_args"]
    assert (options["lr"], options["weight_decay"], options["amsgrad"]) == (3e-4, 0.1, True)


def test_another_schedule_starts_from_its_own_defaults(capsys):
    words = "--model.lr_scheduler ExponentialLR --model.lr_scheduler.gamma 0.9 --model.lr_scheduler.last_epoch 3"
    words += " --model.lr_scheduler StepLR --model.lr_scheduler.step_size 2"
    options = resolved(capsys, *words.split())["model"]["init_args"]["lr_scheduler"]["init_args"]
    assert (options["step_size"], options["gamma"], options["last_epoch"]) == (2, 0.1, -1)


@pytest.mark.parametrize("owner", ["--model.optimizer", "--model"])
def test_an_argument_before_its_class_is_an_error(owner, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model.optimizer.lr", "1", owner, "PQN"])
    expected = f"error: --model.optimizer.lr comes before {owner}, whose defaults differ; give the class first\n"
    assert capsys.readouterr().err == expected
