"""Callbacks that report on a run without changing it."""

from lightning_dqn.monitoring.agent_video import AgentVideo as AgentVideo
from lightning_dqn.monitoring.episode_plot import EpisodePlot as EpisodePlot
from lightning_dqn.monitoring.episode_statistics import EpisodeStatistics as EpisodeStatistics
from lightning_dqn.monitoring.episode_writer import EpisodeWriter as EpisodeWriter
from lightning_dqn.monitoring.finite_check import FiniteCheck as FiniteCheck
from lightning_dqn.monitoring.run_progress_bar import RunProgressBar as RunProgressBar
from lightning_dqn.monitoring.run_summary import RunSummary as RunSummary
