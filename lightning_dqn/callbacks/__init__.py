"""The schedules and the record of a run, one concern a file."""

from lightning_dqn.callbacks.agent_video import AgentVideo as AgentVideo
from lightning_dqn.callbacks.episode_plot import EpisodePlot as EpisodePlot
from lightning_dqn.callbacks.episode_statistics import EpisodeStatistics as EpisodeStatistics
from lightning_dqn.callbacks.episode_writer import EpisodeWriter as EpisodeWriter
from lightning_dqn.callbacks.epsilon_decay import EpsilonDecay as EpsilonDecay
from lightning_dqn.callbacks.finite_check import FiniteCheck as FiniteCheck
from lightning_dqn.callbacks.priorities import PriorityUpdate as PriorityUpdate
from lightning_dqn.callbacks.rank_check import RankCheck as RankCheck
from lightning_dqn.callbacks.run_progress_bar import RunProgressBar as RunProgressBar
from lightning_dqn.callbacks.run_summary import RunSummary as RunSummary
from lightning_dqn.callbacks.soft_target_update import SoftTargetUpdate as SoftTargetUpdate
from lightning_dqn.callbacks.stop_on_signal import StopOnSignal as StopOnSignal
