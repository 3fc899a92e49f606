"""The Atari workload of all systems: `configs/atari.yaml` with a smaller memory.

Stable-Baselines3 uses the settings of RL Zoo, which differ in pressing FIRE at the start of an episode and in a maximum
gradient norm of 10. Imports nothing heavy.
"""

from typing import Any

ENV_ID = "ALE/Pong-v5"
# the wrappers of Stable-Baselines3 skip frames
RAW_ENV_ID = "PongNoFrameskip-v4"
ENV_KWARGS: dict[str, Any] = {"repeat_action_probability": 0.0, "episodic_life": True}
FRAME_STACK = 4
SIZE = 84
NUM_ACTIONS = 6

NUM_ENVS = 4
ENV_STEPS_PER_UPDATE = 4
BATCH_SIZE = 32
MEMORY_CAPACITY = 100_000
LEARNING_RATE = 1e-4
GAMMA = 0.99
TARGET_ENV_STEPS = 1_000
# the final epsilon, so that the network is evaluated in most steps, as in 90% of a run
EPSILON = 0.01

# large enough that draws come from RAM, not from caches
LEARNING_STARTS = 5_000
# warm-up in env steps, which includes the first updates and any compilation
WARMUP_ENV_STEPS = 6_000
# minimum mean change of a weight, which 100 updates of Adam exceed by far; 0 without learning
LEAST_MOVED = 1e-5
