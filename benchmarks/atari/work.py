"""What every system is given to do on Atari: `configs/atari.yaml` with less in the memory.

The peer's settings are those of its Zoo, which are the same but for FIRE, which it presses itself at the start of an
episode, and for the norm of its gradient, which it keeps below 10. Imports nothing heavy.
"""

from typing import Any

ENV_ID = "ALE/Pong-v5"
# the peer's wrappers skip frames themselves
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
# what a run ends with, so that the network is asked in every step, as in nine tenths of a run
EPSILON = 0.01

# enough in the memory that draws come from RAM and not from caches
LEARNING_STARTS = 5_000
# rates are taken after so many env steps, which include the first updates and so any compilation
WARMUP_ENV_STEPS = 6_000
# mean movement of a weight, which any 100 updates of Adam exceed by far: a loop that doesn't learn stays at 0
LEAST_MOVED = 1e-5
