"""Snapshots of vector environments, to the bit and without pickle: what lets a run go on where it was stopped.

Beside the way of the data, at its start: the data side takes one for a checkpoint and puts it back at a resume.
"""

from lightning_dqn.snapshots.encoding import CannotSnapshotError, snapshot
from lightning_dqn.snapshots.proof import prove
from lightning_dqn.snapshots.restoring import CannotRestoreError, restore

__all__ = ["CannotRestoreError", "CannotSnapshotError", "prove", "restore", "snapshot"]
