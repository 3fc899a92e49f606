"""The configurations that come with the package."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from lightning_dqn.cli import main

CONFIGS = Path(__file__).parent.parent / "configs"
NEEDS_BOX2D = pytest.mark.skipif(importlib.util.find_spec("Box2D") is None, reason="needs gymnasium[box2d]")


def every():
    """One parameter a configuration."""
    for path in sorted(CONFIGS.glob("*.yaml")):
        yield pytest.param(path, id=path.stem, marks=NEEDS_BOX2D if path.stem == "lunarlander" else ())


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


@pytest.mark.parametrize("path", every())
def test_every_configuration_runs_for_a_short_epoch(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = "--trainer.max_epochs 1 --data.epoch_env_steps 300 --data.eval_episodes 2 --video.episodes 0"
    short += " --data.warmup_env_steps 200"
    main(["fit", "--config", str(path), "--trainer.logger", "CSVLogger", *short.split()])
    [run] = Path("runs").glob("*/*")
    given, kept = yaml.safe_load(path.read_text()), yaml.safe_load((run / "config.yaml").read_text())
    shorter = {"epoch_env_steps": 300, "eval_episodes": 2, "warmup_env_steps": 200}
    assert holds(kept["data"], {**given["data"], **shorter})
    assert kept["model"]["class_path"] == given["model"]["class_path"]
    assert (run / "checkpoints" / "best.ckpt").is_file()


def test_the_textbook_configuration_says_the_defaults_in_full(capsys):
    with_config = resolved(capsys, "--config", str(CONFIGS / "cartpole.yaml"))
    by_default = resolved(capsys)
    # it stops when solved; that is all it adds
    assert with_config["trainer"].pop("callbacks")[0]["class_path"].endswith("EarlyStopping")
    by_default["trainer"].pop("callbacks")
    by_default["data"]["env_kwargs"] = {}
    assert with_config == by_default
    said = yaml.safe_load((CONFIGS / "cartpole.yaml").read_text())
    for group in ("data", "target_update", "epsilon"):
        assert said[group].keys() == by_default[group].keys()
    assert said["model"]["init_args"].keys() == by_default["model"]["init_args"].keys()
