"""The memory, and how rows of it are chosen.

Read `memory` (what is stored, and how transitions are made of it), `storage`, `frames` and `returns` (where
observations lie, stacks of them, and sums of rewards), `samplers` (uniform), then `prioritized` and what it stands on:
`sum_tree` in plain numpy, and `compiled_tree`, the same made cheap. `dealing` distributes rows over another number of
ranks when a run is resumed.
"""

from lightning_dqn.replay.memory import ReplayMemory as ReplayMemory
from lightning_dqn.replay.prioritized import PrioritizedSampler as PrioritizedSampler
from lightning_dqn.replay.samplers import Sampler as Sampler
from lightning_dqn.replay.samplers import SamplerCallable as SamplerCallable
from lightning_dqn.replay.samplers import UniformSampler as UniformSampler
from lightning_dqn.replay.samplers import probe_sampler as probe_sampler
from lightning_dqn.replay.transition import AnyTransition as AnyTransition
from lightning_dqn.replay.transition import MaskedTransition as MaskedTransition
from lightning_dqn.replay.transition import Transition as Transition
