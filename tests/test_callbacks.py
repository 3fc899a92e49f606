"""What callbacks show and keep during a run: plot, progress bar, statistics, summary, video."""

import base64
import contextlib
import re
import signal
import textwrap

import gymnasium as gym
import imageio.v2 as imageio
import lightning.pytorch as pl
import numpy as np
import pytest
from gymnasium import spaces
from lightning.pytorch.loggers.logger import Logger

from lightning_dqn import DQN, DQNDataModule, EpsilonDecay, SoftTargetUpdate
from lightning_dqn.monitoring import episode_plot
from lightning_dqn.monitoring.agent_video import AgentVideo
from lightning_dqn.monitoring.episode_plot import EpisodePlot, durations_figure
from lightning_dqn.monitoring.episode_statistics import EpisodeStatistics
from lightning_dqn.monitoring.run_progress_bar import RunProgressBar
from lightning_dqn.monitoring.run_summary import RunSummary

PNG = b"\x89PNG\r\n\x1a\n"


class InMemory(Logger):
    """Keeps what is logged, with its step."""

    name = version = "memory"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append({**metrics, "step": step})


class Watcher(pl.Callback):
    """Calls a function after every iteration."""

    def __init__(self, look):
        self.look = look

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.look(trainer)


def train(folder, *callbacks, logger=False, max_epochs=2, progress_bar=False, **options):
    """Train in Python, 200 env steps an epoch; the trainer, with the data module in it."""
    pl.seed_everything(0, verbose=False)
    data = DQNDataModule(**{"epoch_env_steps": 200, "eval_episodes": 2, "iterations_per_chunk": 1, **options})
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_epochs=max_epochs,
        callbacks=[SoftTargetUpdate(), EpsilonDecay(), *callbacks],
        logger=logger,
        log_every_n_steps=50,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress_bar,
    )
    trainer.fit(DQN(data.observation_space, data.action_space), datamodule=data)
    return trainer


def test_the_plot_shows_every_duration_and_the_mean_of_the_last_hundred():
    durations = [10 + (7 * i) % 90 for i in range(250)]
    means = []
    for i in range(99, 250):
        total = 0
        for duration in durations[i - 99 : i + 1]:
            total += duration
        means.append(total / 100)
    axes = durations_figure(durations, 100, "Result").axes[0]
    raw, mean = axes.get_lines()
    assert axes.get_title() == "Result"
    assert "Episode" in axes.get_xlabel()
    assert "env steps" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["episode", "mean of 100"]
    # the first episode is number 1, the first full window ends with number 100
    assert raw.get_xydata().tolist() == [[i + 1, duration] for i, duration in enumerate(durations)]
    assert mean.get_xdata().tolist() == list(range(100, 251))
    assert mean.get_ydata() == pytest.approx(means)


@pytest.mark.parametrize(("episodes", "curves"), [(0, 1), (1, 1), (99, 1), (100, 2)])
def test_the_mean_is_drawn_from_the_first_full_window_on(episodes, curves):
    lines = durations_figure([20] * episodes, 100, "Training...").axes[0].get_lines()
    assert len(lines) == curves
    assert lines[0].get_ydata().tolist() == [20] * episodes
    if curves == 2:
        assert lines[1].get_xydata().tolist() == [[100, 20]]


@pytest.fixture(scope="module")
def plotted(tmp_path_factory):
    """A run with a plot: its trainer, all figures that were drawn, and the pictures that lay there meanwhile."""
    folder = tmp_path_factory.mktemp("plotted")
    figures, pictures = [], {}

    def look(trainer):
        path = folder / "episodes.png"
        if path.exists():
            pictures[trainer.datamodule.env_steps] = path.read_bytes()

    def keep(*args):
        figures.append(durations_figure(*args))
        return figures[-1]

    with pytest.MonkeyPatch.context() as patch:
        # the real figure, kept to be looked at
        patch.setattr(episode_plot, "durations_figure", keep)
        trainer = train(folder, EpisodePlot(min_seconds=0.1, window=5), Watcher(look))
    return trainer, figures, pictures


def test_the_plot_states_training_while_it_runs_and_result_at_its_end(plotted):
    _, figures, _ = plotted
    titles = [figure.axes[0].get_title() for figure in figures]
    assert len(titles) > 2, "after each of 2 epochs, and at the end"
    assert set(titles[:-1]) == {"Training..."}
    assert titles[-1] == "Result"


def test_the_plot_shows_the_episodes_of_the_run(plotted):
    trainer, figures, _ = plotted
    history = trainer.datamodule.episodes
    assert sum(history.lengths) <= 400
    drawn = [figure.axes[0].get_lines()[0].get_ydata().tolist() for figure in figures]
    assert drawn[-1] == history.lengths
    for earlier in drawn:
        assert earlier == history.lengths[: len(earlier)]
    windows = [history.lengths[i : i + 5] for i in range(len(history) - 4)]
    assert figures[-1].axes[0].get_lines()[1].get_ydata() == pytest.approx([sum(window) / 5 for window in windows])


def test_the_plot_file_is_complete_during_the_run(plotted):
    trainer, _, pictures = plotted
    assert min(pictures) < 200, "before the first epoch has ended"
    assert len(set(pictures.values())) > 1, "redrawn"
    for picture in set(pictures.values()):
        assert picture.startswith(PNG)
        assert imageio.imread(picture).shape[:2] == (400, 700)
    assert imageio.imread(trainer.default_root_dir + "/episodes.png").shape[:2] == (400, 700)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """A notebook that trains with a plot, executed: itself and the messages about pictures that its kernel sent."""
    folder = tmp_path_factory.mktemp("notebook")
    code = f"""
        import lightning.pytorch as pl
        from lightning_dqn import DQN, DQNDataModule, EpsilonDecay, SoftTargetUpdate
        from lightning_dqn.monitoring import EpisodePlot

        data = DQNDataModule(epoch_env_steps=100, steps_per_iteration=4, eval_episodes=1, iterations_per_chunk=1)
        callbacks = [SoftTargetUpdate(), EpsilonDecay(), EpisodePlot(min_seconds=0, window=3)]
        quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        trainer = pl.Trainer({str(folder)!r}, max_epochs=2, callbacks=callbacks, **quiet)
        trainer.fit(DQN(data.observation_space, data.action_space), datamodule=data)
    """.replace("pl.Trainer(", "pl.Trainer(default_root_dir=")
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    cell = nbformat.v4.new_code_cell(textwrap.dedent(code))
    displayed = []

    class Client(nbclient.NotebookClient):
        def process_message(self, msg, cell, cell_index):
            if "image/png" in msg["content"].get("data", {}):
                displayed.append(msg)
            return super().process_message(msg, cell, cell_index)

    book = nbformat.v4.new_notebook(cells=[cell])
    Client(book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return folder, book.cells[0].outputs, displayed


@pytest.mark.integration
def test_a_notebook_shows_one_picture_that_is_replaced_in_place(notebook):
    folder, outputs, displayed = notebook
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    assert [output["output_type"] for output in shown] == ["display_data"]
    assert displayed[0]["msg_type"] == "display_data"
    assert {message["msg_type"] for message in displayed[1:]} == {"update_display_data"}
    assert len({message["content"]["transient"]["display_id"] for message in displayed}) == 1
    pictures = [base64.b64decode(message["content"]["data"]["image/png"]) for message in displayed]
    # 2 epochs of 100 / 4 iterations: a drawing after each, one after each evaluation, and the result
    assert len(pictures) == 2 * 25 + 2 + 1
    assert pictures[0] != pictures[-1]
    assert base64.b64decode(shown[0]["data"]["image/png"]) == pictures[-1] == (folder / "episodes.png").read_bytes()


# the progress bar

BAR = re.compile(r"Training: +(\d+)%\|[^|]*\| (\d+)/(\d+) env steps \[(\S+?)<(\S+?)(?:, (.*))?\]")


@pytest.fixture(scope="module")
def bars(default_runs):
    """What the progress bar of a fit showed in a terminal, one state after the other."""
    states = [BAR.match(part) for part in re.split(r"[\r\n]", default_runs["tty"].out)]
    return [state for state in states if state]


@pytest.mark.integration
def test_the_progress_bar_counts_the_env_steps_of_the_whole_run_and_shows_the_time_left(bars):
    assert len(bars) > 2
    for percentage, done, total in (bar.group(1, 2, 3) for bar in bars):
        # 2 epochs of 250
        assert total == "500"
        assert int(percentage) == round(100 * int(done) / 500)
    done = [int(bar[2]) for bar in bars]
    assert done == sorted(done)
    assert done[-1] == 500
    between = [bar for bar in bars if 0 < int(bar[2]) < 500]
    assert between
    for bar in between:
        assert re.fullmatch(r"\d\d:\d\d", bar[4])
        assert re.fullmatch(r"\d\d:\d\d", bar[5])


@pytest.mark.integration
def test_the_progress_bar_shows_return_epsilon_and_speed(bars):
    shown = [dict(entry.split("=") for entry in bar[6].split(", ")) for bar in bars if bar[6]]
    assert shown
    for bar, values in zip([bar for bar in bars if bar[6]], shown, strict=True):
        # epsilon(t) = .05 + .85 e^(-t/1000), shown with three digits
        assert float(values["epsilon"]) == pytest.approx(0.05 + 0.85 * np.exp(-int(bar[2]) / 1000), abs=6e-4)
        assert float(values["updates/s"]) >= 0
    assert float(shown[-1]["return"]) >= 8, "no CartPole episode is shorter"
    assert float(shown[-1]["val"]) >= 8


@pytest.mark.integration
def test_nothing_else_is_written_on_the_line_of_the_progress_bar(default_runs):
    for run in default_runs.values():
        for part in re.split(r"[\r\n]", run.text):
            assert not part.startswith("Training:") or part.rstrip().endswith("]"), part


def test_the_speed_in_the_progress_bar_leaves_evaluation_out(tmp_path, capfd):
    memory, bar = InMemory(), RunProgressBar()
    # after each iteration, even though this is no terminal
    bar.refresh_seconds = 0.0
    train(tmp_path, bar, EpisodeStatistics(), logger=memory, progress_bar=True, max_epochs=1, eval_episodes=50)
    states = [BAR.match(part) for part in re.split(r"[\r\n]", capfd.readouterr().err)]
    last = [state[6] for state in states if state and "val=" in (state[6] or "")][-1]
    slowest = min(row["updates_per_second"] for row in memory.rows if row.get("updates_per_second"))
    assert float(re.search(r"updates/s=(\d+)", last)[1]) > 0.2 * slowest


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run of 2 epochs of 200 env steps with statistics over 5 episodes: its data module and what was logged."""
    memory = InMemory()
    trainer = train(tmp_path_factory.mktemp("logged"), EpisodeStatistics(window=5), logger=memory)
    return trainer.datamodule, memory.rows


def test_training_return_and_length_are_means_over_the_window(logged):
    data, rows = logged
    rows = [row for row in rows if "train/epsilon" in row]
    assert [row["env_steps"] for row in rows] == list(range(50, 401, 50))
    for row in rows:
        ended = [i for i, at in enumerate(data.episodes.env_steps) if at <= row["env_steps"]][-5:]
        assert row["train/episode_return"] == pytest.approx(sum(data.episodes.returns[i] for i in ended) / len(ended))
        assert row["train/episode_length"] == pytest.approx(sum(data.episodes.lengths[i] for i in ended) / len(ended))
    assert len(data.episodes) > 5


def test_every_row_has_the_env_step(logged):
    _, rows = logged
    for row in rows:
        if "env_steps" in row:
            assert row["step"] == row["env_steps"]
            # one update after each env step from the 128th on
            assert row["updates"] == max(0, row["env_steps"] - 127)
        if "train/epsilon" in row:
            assert row["train/epsilon"] == pytest.approx(0.05 + 0.85 * np.exp(-row["env_steps"] / 1000))
    assert [row["env_steps"] for row in rows if "val/episode_return" in row] == [200, 400]


def test_losses_are_logged_once_there_are_updates(logged):
    _, rows = logged
    for row in rows:
        if "train/epsilon" in row:
            for name in ("train/loss", "train/q_value", "train/td_error"):
                assert (name in row) == (row["env_steps"] >= 128)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    # Huber's loss of the mean error at most, since it grows no faster
    errors = [row["train/td_error"] for row in rows if "train/td_error" in row]
    for loss, error in zip(losses, errors, strict=True):
        assert 0 < loss < error


def test_speed_is_counted_from_log_to_log(tmp_path):
    memory = InMemory()
    train(tmp_path, EpisodeStatistics(), logger=memory, max_epochs=1)
    rows = [row for row in memory.rows if "train/epsilon" in row]
    for row, before in zip(rows[1:], rows, strict=False):
        # updates and env steps of the same seconds
        updates, env_steps = row["updates"] - before["updates"], row["env_steps"] - before["env_steps"]
        assert row["updates_per_second"] == pytest.approx(row["env_steps_per_second"] * updates / env_steps)


def test_nothing_is_logged_of_episodes_before_the_first_has_ended(tmp_path):
    memory = InMemory()
    # MountainCar's episodes last 200 env steps, unless the top is reached
    train(tmp_path, EpisodeStatistics(), logger=memory, env_id="MountainCar-v0", max_epochs=1, epoch_env_steps=250)
    for row in memory.rows:
        if "train/epsilon" in row:
            assert ("train/episode_return" in row) == (row["env_steps"] >= 200)
    assert memory.rows[-2]["train/episode_return"] == -200


def test_the_summary_of_a_run_in_python_has_its_clocks_and_its_last_return(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = train(tmp_path, EpisodePlot(), RunSummary())
    lines = capsys.readouterr().out.splitlines()
    # 400 - 127 updates
    assert re.fullmatch(r"Finished: 400 env steps, 273 updates in 0 min \d+ s", lines[0])
    last = float(trainer.callback_metrics["val/episode_return"])
    assert re.fullmatch(rf"  return +last {last:.1f} \(mean of 2 greedy episodes\)", lines[1])
    assert re.fullmatch(r"  plot +episodes\.png", lines[2])
    assert len(lines) == 3, "no checkpoint, no video, nothing to replay"


def test_the_summary_of_an_interrupted_run_states_how_far_it_came(tmp_path, capsys):
    def interrupt(trainer):
        if trainer.datamodule.env_steps == 150:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    try:
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            train(tmp_path, RunSummary(), Watcher(interrupt))
    finally:
        signal.signal(signal.SIGINT, before)
    # 150 - 127 updates
    assert capsys.readouterr().out.startswith("Stopped: 150 env steps, 23 updates in 0 min ")


class Blind(gym.Env):
    """Five env steps an episode, and nothing to see."""

    metadata = {"render_modes": []}  # noqa: RUF012  Gymnasium's own way
    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 5
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(2, np.float32), 1.0, self.left == 0, False, {}


class Brittle(Blind):
    """Says that it can be drawn, but lacks what it draws with."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012  Gymnasium's own way

    def render(self):
        raise gym.error.DependencyNotInstalled("the pen is missing")


class Visible(Brittle):
    """Draws 64 x 48 pixels."""

    def render(self):
        return np.full((48, 64, 3), 40 * self.left, np.uint8)


@pytest.fixture
def toys():
    """Environments of this file, registered for the time of a test."""
    for toy in (Blind, Brittle, Visible):
        gym.register(f"{toy.__name__}-v0", toy)
    yield
    for toy in (Blind, Brittle, Visible):
        gym.registry.pop(f"{toy.__name__}-v0")


@pytest.mark.parametrize("env_id", ["Blind-v0", "Brittle-v0"])
def test_an_environment_that_cannot_be_rendered_is_reported_in_one_line(toys, tmp_path, messages, capsys, env_id):
    train(tmp_path, AgentVideo(), RunSummary(), env_id=env_id, max_epochs=1)
    (reported,) = [line for line in messages if "video" in line.lower()]
    assert reported.startswith("No video: ")
    assert env_id in reported
    assert "\n" not in reported
    assert capsys.readouterr().out.startswith("Finished: 200 env steps"), "the run continues"
    assert not list(tmp_path.rglob("*.mp4"))


def test_the_video_has_the_size_and_speed_of_the_environment(toys, tmp_path, messages):
    train(tmp_path, AgentVideo(episodes=2), env_id="Visible-v0", max_epochs=1)
    videos = sorted((tmp_path / "videos").glob("*.mp4"))
    assert len(videos) == 2
    for video in videos:
        with imageio.get_reader(video) as film:
            assert film.get_meta_data()["size"] == (64, 48)
            assert film.get_meta_data()["fps"] == 10
            frames = np.stack([frame for frame in film]).astype(float)  # noqa: C416  list() asks for a length
        # one before the first of 5 env steps and one after each: 200, 160, ... 0, as far as the codec keeps them
        assert frames.mean(axis=(1, 2, 3)) == pytest.approx([200, 160, 120, 80, 40, 0], abs=8)
    assert not [line for line in messages if line.startswith("No video")]


def test_the_video_is_cut_after_so_many_env_steps_or_left_out(toys, tmp_path):
    train(tmp_path, AgentVideo(max_env_steps=3), env_id="Visible-v0", max_epochs=1)
    (video,) = (tmp_path / "videos").glob("*.mp4")
    with imageio.get_reader(video) as film:
        assert sum(1 for _ in film) == 1 + 3
    train(tmp_path / "without", AgentVideo(episodes=0), env_id="Visible-v0", max_epochs=1)
    assert not list((tmp_path / "without").rglob("*.mp4"))


def test_a_run_in_python_warns_of_nothing(tmp_path, recwarn):
    train(tmp_path, EpisodeStatistics(), max_epochs=1)
    # Python shows no deprecations to users
    shown = [warning for warning in recwarn if not issubclass(warning.category, DeprecationWarning)]
    assert [str(warning.message) for warning in shown] == []


class Board(Visible):
    """Shown as MinAtar's games are: a float a colour, and a pixel a cell."""

    def render(self):
        cells = np.zeros((10, 10, 3))
        cells[:5] = [1.0, 0.0, 0.0]
        return cells


gym.register("Board-v0", Board)


def test_a_film_of_a_board_has_cells_large_enough_to_be_seen(tmp_path):
    train(tmp_path, AgentVideo(), env_id="Board-v0", max_epochs=1)
    (video,) = (tmp_path / "videos").glob("*.mp4")
    with imageio.get_reader(video) as film:
        frame = film.get_data(0).astype(float)
    assert frame.shape == (160, 160, 3)
    assert abs(frame[40, 80] - [255, 0, 0]).max() < 30
    assert abs(frame[120, 80]).max() < 30
