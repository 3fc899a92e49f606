"""The command line with the file of an agent alone in a folder, and new runs that start from weights."""

import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import user_module
from conftest import quiet_trainer
from lightning.pytorch import Callback
from test_cli import QUIET, error_line, runs_in

from lightning_dqn import DQN, DQNDataModule
from lightning_dqn.cli import main
from lightning_dqn.resume.checkpoint_io import AtomicCheckpointIO

pytestmark = [pytest.mark.learning, pytest.mark.filterwarnings("ignore")]
SMALL = (
    *("--data.epoch_env_steps", "200", "--data.eval_episodes", "3", "--model.network.hidden_sizes", "[16]"),
    *("--trainer.logger", "false", *QUIET),
)
ONE_EPOCH = ("--trainer.max_epochs", "1")


class Watch(Callback):
    """Keeps what a run of the command line was and found."""

    def on_fit_start(self, trainer, pl_module):
        self.start = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.env_steps = trainer.datamodule.env_steps
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_test_end(self, trainer, pl_module):
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}


def watch(*words):
    """Run the command line and return what was seen of it."""
    seen = Watch()
    main(list(words), callbacks=[seen])
    return seen


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The folder of a run of one epoch, and the result of its test."""
    folder = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", *SMALL, *ONE_EPOCH])
        metrics = watch("test", "--ckpt_path", "best", *QUIET).metrics
    return runs_in(folder)[0], metrics


@pytest.fixture
def alone(original, tmp_path, monkeypatch):
    """The path of its agent in a folder that holds nothing else."""
    path = shutil.copy(original[0] / "checkpoints" / "best.ckpt", tmp_path / "agent.ckpt")
    monkeypatch.chdir(tmp_path)
    return path.name


def files():
    """All files below the current folder but the agent's."""
    return sorted(str(path) for path in Path().rglob("*") if path.is_file() and path.name != "agent.ckpt")


def test_a_file_alone_is_tested_as_in_its_run(original, alone, recwarn):
    assert watch("test", "--ckpt_path", alone, *QUIET).metrics == original[1]
    assert files() == []
    assert not [each for each in recwarn if "dirpath" in str(each.message)]


def test_a_file_alone_is_validated_and_its_episodes_are_written_into_runs(alone, capfd):
    main(["validate", "--ckpt_path", alone, *QUIET])
    assert "val/episode_return" in capfd.readouterr().out
    main(["predict", "--ckpt_path", alone, *QUIET])
    assert files() == ["runs/evaluation/episodes.pt"]


def test_a_run_resumes_from_a_file_alone_in_a_folder_of_its_own(original, alone, recwarn):
    before = Path(alone).read_bytes()
    main(["fit", "--ckpt_path", alone, "--trainer.max_epochs", "2"])
    assert Path(alone).read_bytes() == before
    (run,) = runs_in(Path())
    assert all(path.startswith(f"{run}/") for path in files())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert not [each for each in recwarn if "dirpath" in str(each.message)]
    # the same as where the run itself resumes
    shutil.copytree(original[0], "whole/runs/CartPole-v1/copy")
    main(["fit", "--ckpt_path", "whole/runs/CartPole-v1/copy/checkpoints/last.ckpt", "--trainer.max_epochs", "2"])
    one, other = (weights(path / "checkpoints" / "last.ckpt") for path in (run, Path("whole/runs/CartPole-v1/copy")))
    assert all(torch.equal(one[name], other[name]) for name in one)


def weights(path):
    """Of a checkpoint."""
    return AtomicCheckpointIO().load_agent_part(path)["state_dict"]


def test_an_evaluation_needs_no_memory_beside_the_file(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    pl.seed_everything(0, verbose=False)
    data = DQNDataModule(epoch_env_steps=150, eval_episodes=1)
    trainer = quiet_trainer(plugins=[AtomicCheckpointIO(max_inline_bytes=0)])
    trainer.fit(DQN(data.observation_space, data.action_space), data)
    trainer.save_checkpoint("agent.ckpt")
    (memory,) = tmp_path.glob("memory-*")
    memory.unlink()
    assert "test/episode_return" in watch("test", "--ckpt_path", "agent.ckpt", *QUIET).metrics
    watch("fit", "--init_from", "agent.ckpt", *QUIET, *ONE_EPOCH, "--trainer.logger", "false")
    assert "is missing" in error_line(capfd, "fit", "--ckpt_path", "agent.ckpt", *QUIET)


def test_weights_alone_are_tested_but_no_fit_resumes_from_them(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    data = DQNDataModule(epoch_env_steps=150, eval_episodes=1)
    trainer = quiet_trainer()
    trainer.fit(DQN(data.observation_space, data.action_space), data)
    trainer.save_checkpoint("agent.ckpt", weights_only=True)
    assert "test/episode_return" in watch("test", "--ckpt_path", "agent.ckpt", *QUIET).metrics
    line = error_line(capfd, "fit", "--ckpt_path", "agent.ckpt", *QUIET, "--trainer.logger", "false")
    assert "save_weights_only" in line
    assert "--init_from" in line


def test_a_new_run_starts_from_weights_with_all_else_new(original, alone):
    seen = watch("fit", "--init_from", alone, *SMALL, *ONE_EPOCH, "--model.optimizer.lr", "0.01")
    saved = weights(alone)
    assert all(torch.equal(seen.start[name], saved[name]) for name in saved)
    assert (seen.env_steps, seen.lr) == (0, 0.01)
    (run,) = runs_in(Path())
    content = AtomicCheckpointIO().load_checkpoint(run / "checkpoints" / "last.ckpt")
    assert content["manifest"]["model.optimizer.lr"] == 0.01
    # 200 env steps, of which those from the 128th on make an update
    assert content["global_step"] == 73
    assert not torch.equal(content["state_dict"]["policy_net.output.weight"], saved["policy_net.output.weight"])


@pytest.mark.parametrize("name", ["best", "last"])
def test_weights_of_the_newest_run_are_found_by_name(original, tmp_path, monkeypatch, name):
    shutil.copytree(original[0], tmp_path / "runs" / "CartPole-v1" / "copy")
    monkeypatch.chdir(tmp_path)
    seen = watch("fit", "--init_from", name, *SMALL, *ONE_EPOCH)
    saved = weights(original[0] / "checkpoints" / f"{name}.ckpt")
    assert all(torch.equal(seen.start[key], saved[key]) for key in saved)


REJECTED = {
    "--init_from agent.ckpt --ckpt_path agent.ckpt": ["--ckpt_path", "--init_from"],
    "--init_from nowhere.ckpt": ["--init_from", "nowhere.ckpt"],
    "--init_from best": ["--init_from best"],
    "--init_from text.ckpt": ["--init_from", "text.ckpt"],
    "--init_from agent.ckpt --model.network.hidden_sizes [8]": ["model.network.hidden_sizes=[8]", "[16]"],
    "--init_from agent.ckpt --model C51": ["model=lightning_dqn.C51", "lightning_dqn.DQN"],
    "--init_from agent.ckpt --data.env_id Acrobot-v1": ["observation_space=Box(", "(6,)", "(4,)", "env_id=CartPole-v1"],
}


@pytest.mark.parametrize(("words", "parts"), REJECTED.items(), ids=REJECTED)
def test_weights_that_do_not_fit_are_an_error_of_one_line_that_leaves_no_folder(alone, capfd, words, parts):
    Path("text.ckpt").write_text("no checkpoint")
    line = error_line(capfd, "fit", *SMALL, *words.split())
    assert all(part in line for part in parts)
    assert files() == ["text.ckpt"]


def test_another_environment_is_named_first_at_a_resume_and_a_test(alone, capfd):
    line = error_line(capfd, "fit", "--ckpt_path", alone, "--data.env_id", "Acrobot-v1")
    assert "data.env_id=Acrobot-v1" in line
    assert "CartPole-v1" in line
    line = error_line(capfd, "test", "--ckpt_path", alone, "--data.env_id", "Acrobot-v1", *QUIET)
    assert "kind" not in line
    assert "env_id=CartPole-v1" in line


def test_a_module_of_the_user_is_imported_on_trust_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    pl.seed_everything(0, verbose=False)
    data = DQNDataModule(env_id="user_module:Dict-v0", epoch_env_steps=150, eval_episodes=1)
    module = user_module.Bonus(data.observation_space, data.action_space, network=user_module.Net)
    trainer = quiet_trainer()
    trainer.fit(module, data)
    trainer.save_checkpoint("agent.ckpt")
    line = error_line(capfd, "test", "--ckpt_path", "agent.ckpt", *QUIET)
    assert "--trust user_module" in line
    seen = watch("test", "--ckpt_path", "agent.ckpt", "--trust", "user_module", *QUIET)
    assert "test/episode_return" in seen.metrics
    words = ("--trust", "user_module", "--trainer.max_epochs", "2", "--trainer.logger", "false", *QUIET)
    assert watch("fit", "--ckpt_path", "agent.ckpt", *words).lr == 1e-4
