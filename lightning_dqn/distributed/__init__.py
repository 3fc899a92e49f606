"""Distributed training: synchronization of ranks, and resharding for another world size."""

from lightning_dqn.distributed.rank_check import RankCheck as RankCheck
