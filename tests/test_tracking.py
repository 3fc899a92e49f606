"""Weights & Biases: what is logged, read back with wandb's own reader, and that it never stands in a run's way."""

import hashlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import imageio.v2 as imageio
import pytest
import yaml
from conftest import DEFAULT_FIT, clean_environment, read_offline_run, run_cli
from test_cli import METRICS

from lightning_dqn.cli.tracking import wandb_unavailable

pytestmark = pytest.mark.integration

FAKE_KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(scope="module", params=["plain", "tty"])
def run(request, default_runs):
    """A default fit with no credentials anywhere, once into pipes and once in a terminal."""
    return default_runs[request.param]


@pytest.fixture(scope="module")
def records(run):
    assert run.exit_code == 0, run.text
    return read_offline_run(run.folder)


@pytest.fixture(scope="module")
def rows(records):
    """The history: what was logged, row by row."""
    return [record["history"]["item"] for record in records if record["type"] == "history"]


@pytest.fixture(scope="module")
def closed_port():
    """A port of this machine at which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_default_fit_without_credentials_asks_nothing_and_reports_in_one_line_that_it_is_offline(run):
    assert run.exit_code == 0, run.text
    for question in ("Enter your choice", "Create a W&B account", "API key", "wandb.ai/authorize"):
        assert question not in run.text
    reported = [line for line in run.text.splitlines() if line.startswith("W&B is offline")]
    assert reported == ["W&B is offline: no credentials are configured. `wandb sync` uploads the run later."]


def test_the_offline_run_has_every_metric(rows):
    assert set().union(*rows) >= METRICS


def test_every_row_of_the_offline_run_has_env_steps(rows):
    for row in rows:
        assert row["env_steps"] > 0, row
    # 2 epochs of 250 env steps, each with one evaluation at its end
    assert [row["env_steps"] for row in rows if "val/episode_return" in row] == [250, 500]
    # a log every 50 iterations, which are env steps here
    assert [row["env_steps"] for row in rows if "train/epsilon" in row] == list(range(50, 501, 50))


def test_updates_in_the_offline_run_begin_after_the_warmup(rows):
    for row in rows:
        if "updates" in row:
            # one update after each env step from the 128th on
            assert row["updates"] == max(0, row["env_steps"] - 127), row
        assert ("train/loss" in row) == ("train/epsilon" in row and row["env_steps"] >= 128), row


def test_env_steps_are_the_x_axis_of_everything(records):
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    assert [metric for metric in metrics if metric.get("name") == "env_steps"]
    # a later definition replaces an earlier one
    assert [metric["step_metric"] for metric in metrics if metric.get("glob_name") == "*"][-1] == "env_steps"


def test_the_offline_run_has_the_resolved_configuration(run, records):
    logged = {}
    for record in records:
        if record["type"] == "config":
            logged.update(record["config"].get("update", {}))
    written = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert written["data"]["epoch_env_steps"] == 250
    assert written["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-4
    assert written["epsilon"]["init_args"] == {
        "start": 0.9,
        "end": 0.05,
        "decay_env_steps": 1000,
        "schedule": "exponential",
    }
    for name, value in written.items():
        assert logged[name] == value, name


def test_the_offline_run_has_the_plot_of_each_evaluation_and_of_the_end(run, rows):
    logged = [row for row in rows if row.get("episodes._type") == "images/separated"]
    assert [row["env_steps"] for row in logged] == [250, 500, 500]
    (files,) = run.folder.glob("wandb/offline-run-*/files")
    last = files / logged[-1]["episodes.filenames"][0]
    assert last.read_bytes() == (run.folder / "episodes.png").read_bytes()
    assert imageio.imread(last).shape[:2] == (logged[-1]["episodes.height"], logged[-1]["episodes.width"])


def test_the_offline_run_has_the_video(run, rows):
    (logged,) = [row for row in rows if row.get("agent._type") == "videos"]
    (video,) = (run.folder / "videos").glob("*.mp4")
    assert logged["agent.videos"][0]["sha256"] == hashlib.sha256(video.read_bytes()).hexdigest()
    (files,) = run.folder.glob("wandb/offline-run-*/files")
    assert (files / logged["agent.videos"][0]["path"]).read_bytes() == video.read_bytes()


def test_a_key_without_a_network_makes_the_run_offline_in_one_line(tmp_path, closed_port):
    env = clean_environment(tmp_path, WANDB_API_KEY=FAKE_KEY, WANDB_BASE_URL=f"http://127.0.0.1:{closed_port}")
    run = run_cli(tmp_path, env, *DEFAULT_FIT, "--trainer.max_epochs", "1", "--video.episodes", "0")
    assert run.exit_code == 0, run.text
    assert run.seconds < 60
    reported = [line for line in run.text.splitlines() if "W&B is offline" in line]
    assert reported == [
        "W&B is offline: 127.0.0.1 does not answer (ConnectionError). `wandb sync` uploads the run later."
    ]
    rows = [record["history"]["item"] for record in read_offline_run(run.folder) if record["type"] == "history"]
    assert [row["env_steps"] for row in rows if "val/episode_return" in row] == [250]
    for path in run.folder.rglob("*"):
        assert not path.is_file() or FAKE_KEY.encode() not in path.read_bytes(), path


@pytest.fixture
def credentials(tmp_path, monkeypatch):
    """This process without any; returns a function that writes some for a host into a netrc file."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(path))
    return lambda host: path.write_text(f"machine {host}\n  login user\n  password {FAKE_KEY}\n")


@pytest.mark.parametrize(
    ("host", "reason"),
    [("example.org", "no credentials are configured"), ("127.0.0.1", "127.0.0.1 does not answer (ConnectionError)")],
)
def test_credentials_in_netrc_count_as_a_key_for_their_host(credentials, monkeypatch, closed_port, host, reason):
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port}")
    credentials(host)
    assert wandb_unavailable() == reason


@pytest.mark.parametrize(("status", "down"), [(200, False), (404, False), (503, True)])
def test_a_server_is_used_unless_it_states_that_it_is_down(credentials, monkeypatch, status, down):
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
        assert bool(wandb_unavailable()) == down
