"""How checkpoints get to the disk and back: whole, safe to open, and with large memories in a file beside them.

Read `plugin` (called by Lightning), then `plain` (which values may be in a checkpoint), `sidecar` (large memories) and
`folder` (temporaries, and which files may be removed).
"""

from lightning_dqn.checkpoint_io.folder import sweep as sweep
from lightning_dqn.checkpoint_io.plugin import AtomicCheckpointIO as AtomicCheckpointIO
from lightning_dqn.resume.content import CheckpointError as CheckpointError
