"""The environment of a run: configuration errors, W&B, secrets and the output folder."""

import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import gymnasium as gym
import pytest
import yaml
from conftest import ANSI, clean_environment, run_cli

from lightning_dqn.cli import main

SMALL = ("--data.epoch_env_steps", "200", "--trainer.max_epochs", "1", "--data.eval_episodes", "2")
QUIET = ("--video.episodes", "0", "--trainer.enable_model_summary", "false")
NO_LOGGER = ("--trainer.logger", "false")
FAKE_KEY = "0123456789abcdef" * 2 + "01234567"

MODULE = '''
import os
import pathlib

import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

RAISED = ConnectionError if os.environ.get("SERVER") == "down" else TypeError


class Guarded(CartPoleEnv):
    """CartPole behind a token; leaves a note when it is made and when it is stepped."""

    def __init__(self, api_token=None, server=None, render_mode=None):
        pathlib.Path("made").touch()
        if api_token != os.environ.get("EXPECTED_TOKEN"):
            raise RAISED(f"wrong token {api_token!r} of {server}")
        self.api_token = api_token
        super().__init__(render_mode=render_mode)

    def step(self, action):
        pathlib.Path("stepped").touch()
        return super().step(action)


gym.register("Guarded-v0", Guarded, max_episode_steps=500)
'''


@pytest.fixture
def guarded(tmp_path, monkeypatch):
    """A module `guarded` that registers Guarded-v0, in the current folder."""
    (tmp_path / "guarded.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    gym.registry.pop("Guarded-v0", None)
    sys.modules.pop("guarded", None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.memory_capacity", "127"),
        ("data.gamma", "1.01"),
        ("data.num_workers", "1"),
        ("model.optimizer.lr", ".nan"),
        ("target_update.tau", "1.01"),
    ],
)
def test_a_wrong_option_is_rejected_before_an_environment_is_made(guarded, capfd, key, value):
    with pytest.raises(SystemExit) as ended:
        main(["fit", *SMALL, *NO_LOGGER, "--data.env_id", "guarded:Guarded-v0", f"--{key}", value])
    assert ended.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert key.rpartition(".")[2] in line
    assert not (guarded / "made").exists()
    assert not (guarded / "runs").exists()


def fit_in_a_terminal(folder, env, *words):
    """Exit code and all that is shown to somebody who does not touch the keyboard."""
    import pexpect  # noqa: PLC0415  it has no Windows form

    command = ["-m", "lightning_dqn", "fit", *SMALL, *QUIET, *words]
    child = pexpect.spawn(sys.executable, command, cwd=folder, env=env, encoding="utf-8", timeout=120)
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus, ANSI.sub("", child.before).replace("\r\n", "\n")


def fit_with_pipes(folder, env, *words):
    run = run_cli(folder, env, "fit", *SMALL, *QUIET, *words)
    return run.exit_code, run.text


@pytest.fixture
def rejecting_server():
    """A W&B server that is there, and knows nobody."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def do_POST(self):
            body = b'{"errors": [{"message": "user is not logged in"}]}'
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.do_POST()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def silent_server():
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.faults
@pytest.mark.parametrize("fit", [fit_in_a_terminal, fit_with_pipes], ids=["tty", "pipes"])
@pytest.mark.parametrize("fault", ["no-key", "no-network", "silent-server", "rejected-key", "short-key"])
def test_without_weights_and_biases_training_continues_offline(tmp_path, fit, fault, rejecting_server, silent_server):
    settings = {
        "no-key": {},
        "no-network": {"WANDB_API_KEY": FAKE_KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"},
        "silent-server": {"WANDB_API_KEY": FAKE_KEY, "WANDB_BASE_URL": silent_server},
        "rejected-key": {"WANDB_API_KEY": FAKE_KEY, "WANDB_BASE_URL": rejecting_server},
        "short-key": {"WANDB_API_KEY": "short", "WANDB_BASE_URL": rejecting_server},
    }
    exit_code, shown = fit(tmp_path, clean_environment(tmp_path, **settings[fault]))
    assert exit_code == 0, shown
    assert "Finished: 200 env steps" in shown
    reported = [line for line in shown.splitlines() if line.startswith("W&B is offline: ")]
    assert len(reported) == 1, shown
    assert list(tmp_path.glob("runs/*/*/wandb/offline-run-*/*.wandb"))
    for question in ("Enter your choice", "Create a W&B account", "paste", "wandb.ai/authorize"):
        assert question not in shown
    assert FAKE_KEY not in shown


# secrets

TOKEN = "hunter2-0xDEADBEEF"


def files_with(folder, text):
    """Files of which any byte string, name or link holds a text."""
    return [
        path
        for path in folder.rglob("*")
        if text in path.name or (path.is_file() and text.encode() in path.read_bytes())
    ]


@pytest.mark.faults
@pytest.mark.parametrize("way", ["argument", "dict", "config"])
def test_a_secret_is_in_no_file_of_a_run(guarded, way):
    home = guarded / "home"
    home.mkdir()
    env = clean_environment(home, EXPECTED_TOKEN=TOKEN, GAME_TOKEN=TOKEN)
    # W&B looks into repositories: one with a tracked configuration that was changed since
    config = guarded / "mine.yaml"
    config.write_text("data: {env_id: 'guarded:Guarded-v0'}\n")
    for words in (["init", "-q"], ["add", "mine.yaml"], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qma"]):
        subprocess.run(["git", *words], cwd=guarded, env=env, check=True)
    arguments = "{server: here, api_token: {from_env: GAME_TOKEN}}"
    given = {
        "argument": ("--data.env_kwargs.api_token", "{from_env: GAME_TOKEN}"),
        "dict": ("--data.env_kwargs", arguments),
        "config": (),
    }[way]
    if way == "config":
        config.write_text(f"data: {{env_id: 'guarded:Guarded-v0', env_kwargs: {arguments}}}\n")
    loggers = "[WandbLogger, CSVLogger, TensorBoardLogger]"
    run = run_cli(guarded, {**env, "WANDB_SAVE_CODE": "true"}, "fit", *SMALL, "--config", "mine.yaml", *given)
    assert run.exit_code == 0, run.text
    more = run_cli(guarded, env, "fit", *SMALL, *QUIET, "--config", "mine.yaml", *given, "--trainer.logger", loggers)
    assert more.exit_code == 0, more.text
    assert TOKEN not in run.text + more.text
    (written, _) = guarded.glob("runs/*/*/config.yaml")
    saved = yaml.safe_load(written.read_text())["data"]["env_kwargs"]
    assert saved == {"api_token": {"from_env": "GAME_TOKEN"}, **({"server": "here"} if way != "argument" else {})}
    # a resume, and several environments in processes of their own
    for words in (["fit", "--ckpt_path", "last", "--trainer.max_epochs", "2"], ["test", "--ckpt_path", "last"]):
        again = run_cli(guarded, env, *words, "--trust", "guarded", *QUIET)
        assert again.exit_code == 0, again.text
    parallel = ("--data.num_envs", "2", "--data.vectorization", "async")
    several = run_cli(guarded, env, "fit", *SMALL, *QUIET, "--config", "mine.yaml", *given, *parallel)
    assert several.exit_code == 0, several.text
    assert files_with(guarded, TOKEN) == []


@pytest.mark.faults
@pytest.mark.parametrize("server", ["up", "down"], ids=["TypeError", "ConnectionError"])
def test_an_environment_that_raises_with_its_arguments_writes_no_secret(guarded, server):
    home = guarded / "home"
    home.mkdir()
    # the first environment is made before W&B begins to record what is printed, the second one after that
    module = (guarded / "guarded.py").read_text()
    again = 'again = pathlib.Path("made").exists()'
    module = module.replace("        pathlib", f"        {again}\n        pathlib", 1).replace(
        "if api", "if again and api"
    )
    (guarded / "guarded.py").write_text(module)
    env = clean_environment(home, EXPECTED_TOKEN="another", GAME_TOKEN=TOKEN, SERVER=server)
    token = ("--data.env_kwargs", "{server: here, api_token: {from_env: GAME_TOKEN}}")
    for more in ((), ("--data.num_envs", "2", "--data.vectorization", "async")):
        (guarded / "made").unlink(missing_ok=True)
        run = run_cli(guarded, env, "fit", *SMALL, *QUIET, "--data.env_id", "guarded:Guarded-v0", *token, *more)
        assert run.exit_code != 0
        assert "wrong token" in run.text
        assert "of here" in run.text
        assert TOKEN not in run.text
        assert list(guarded.glob("runs/*/*/wandb/offline-run-*"))
    assert files_with(guarded, TOKEN) == []


@pytest.mark.parametrize(
    ("given", "path"),
    [
        (("--data.env_kwargs.api_token", TOKEN), "env_kwargs.api_token"),
        (("--data.env_kwargs", f"{{server: {{auth: {{password: {TOKEN}}}}}}}"), "env_kwargs.server.auth.password"),
    ],
)
def test_a_secret_given_by_value_is_rejected_before_anything_is_made_or_written(guarded, capfd, given, path):
    with pytest.raises(SystemExit) as ended:
        main(["fit", *SMALL, *QUIET, "--data.env_id", "guarded:Guarded-v0", *given])
    assert ended.value.code == 2
    shown = capfd.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert f"{path}: " in line
    assert "{from_env: NAME}" in line
    assert TOKEN not in shown.out + shown.err
    assert not (guarded / "made").exists()
    assert files_with(guarded, TOKEN) == []


@pytest.fixture(params=["under-a-file", "full", "read-only", "full-device-link"])
def no_room(request, tmp_path):
    """A folder to which nothing can be written, in one of four ways."""
    folder = tmp_path / "root"
    if request.param == "under-a-file":
        folder.write_text("a file")
        yield folder / "runs"
        return
    folder.mkdir()
    if request.param == "full-device-link":
        (folder / "Guarded").symlink_to("/dev/full")
        yield folder / "Guarded"
        return
    options = {"full": "size=64k", "read-only": "ro"}[request.param]
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("only root may mount")
    if request.param == "full":
        (folder / "filler").write_bytes(bytes(60 * 1024))
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_folder_that_takes_nothing_is_rejected_before_the_first_step(guarded, no_room, capfd):
    root = "--trainer.default_root_dir", str(no_room)
    with pytest.raises(SystemExit) as ended:
        main(["fit", *SMALL, *NO_LOGGER, "--data.env_id", "guarded:Guarded-v0", *root])
    assert ended.value.code == 2
    shown = capfd.readouterr()
    assert "Traceback" not in shown.err
    (line,) = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert f"trainer.default_root_dir={no_room}" in line
    assert not (guarded / "made").exists()
    assert not (guarded / "stepped").exists()
    if no_room.is_dir():
        assert {path.name for path in no_room.iterdir()} <= {"filler"}, "no litter"


# two at once


@pytest.mark.faults
def test_identical_runs_started_at_once_have_separate_folders(tmp_path):
    command = [sys.executable, "-m", "lightning_dqn", "fit", *SMALL, *QUIET, "--trainer.logger", "CSVLogger"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = clean_environment(tmp_path)
    children = [subprocess.Popen(command, cwd=tmp_path, env=env, **pipes) for _ in range(4)]
    shown = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0] * 4, shown
    folders = sorted(tmp_path.glob("runs/*/*"))
    assert len(folders) == 4
    for folder in folders:
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
        assert {"config.yaml", "episodes.png", "metrics.csv"} <= {path.name for path in folder.iterdir()}
    rows = {(folder / "config.yaml").read_text() for folder in folders}
    assert len(rows) == 1
    lines = [set(re.findall(r"runs/\S+/last\.ckpt", text)) for text in shown]
    assert len(set.union(*lines)) == 4, "each says its own"
