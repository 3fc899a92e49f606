"""The schedules and the record of a run, one concern a file."""

from lightning_dqn.callbacks.epsilon_decay import EpsilonDecay as EpsilonDecay
from lightning_dqn.callbacks.soft_target_update import SoftTargetUpdate as SoftTargetUpdate
