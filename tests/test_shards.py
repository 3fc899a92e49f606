"""Checkpoints of several ranks: a shard beside the checkpoint for each rank but the first, whole together or gone."""

import errno
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dqn.resume.checkpoint_io import AtomicCheckpointIO
from lightning_dqn.resume.content import CheckpointError
from lightning_dqn.resume.folder import remove_stale_files
from lightning_dqn.sampling.prioritized import PrioritizedSampler


def content(rank, epoch=0):
    """What a rank has, in small."""
    rows = {"action": torch.arange(5) + 10 * rank + 100 * epoch}
    return {"DQNDataModule": {"train": {"memory": {"rows": rows}, "env_steps": rank}}, "generators": {"rank": rank}}


def save(plugin, path, *, ranks=3, epoch=0, folder=None):
    """A checkpoint of so many ranks, saved as they save it together."""
    shards = [str(plugin.save_shard(content(rank, epoch), folder or path.parent)) for rank in range(1, ranks)]
    plugin.save_checkpoint({**content(0, epoch), "epoch": epoch, "shares": shards}, path)


def parts(folder):
    """Names of all files but the checkpoints."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".ckpt"))


def ranks_in(plugin, path):
    """Whose shards a checkpoint has, each as its rank finds it."""
    loaded = plugin.load_checkpoint(path)
    found = [loaded, *(plugin.load_checkpoint(shard) for shard in loaded["shares"])]
    return [shard["generators"]["rank"] for shard in found]


@pytest.fixture(params=[0, 10_000], ids=["memories beside", "memories inside"])
def plugin(request):
    return AtomicCheckpointIO(max_inline_bytes=request.param)


def test_every_rank_finds_its_own_shard(tmp_path, plugin):
    save(plugin, tmp_path / "last.ckpt")
    loaded = plugin.load_checkpoint(tmp_path / "last.ckpt")
    found = [loaded, *(plugin.load_checkpoint(path) for path in loaded["shares"])]
    assert [shard["generators"]["rank"] for shard in found] == [0, 1, 2]
    rows = [shard["DQNDataModule"]["train"]["memory"]["rows"]["action"].tolist() for shard in found]
    assert rows == [[10 * rank + i for i in range(5)] for rank in range(3)]
    # a shard for each rank but the first; every memory in a file of its own, or none
    assert len(parts(tmp_path)) == 2 + (3 if plugin.max_inline_bytes == 0 else 0)


def test_a_checkpoint_that_is_replaced_takes_its_shards_along(tmp_path, plugin):
    save(plugin, tmp_path / "best.ckpt", epoch=1)
    kept = parts(tmp_path)
    for epoch in (2, 3):
        save(plugin, tmp_path / "last.ckpt", epoch=epoch)
        assert len(parts(tmp_path)) == 2 * len(kept)
        assert set(kept) < set(parts(tmp_path))
    plugin.remove_checkpoint(tmp_path / "last.ckpt")
    assert parts(tmp_path) == kept
    # and one of a single rank in its place needs none
    plugin.save_checkpoint({"epoch": 4}, tmp_path / "best.ckpt")
    assert parts(tmp_path) == []


def test_shards_follow_their_checkpoint_into_another_folder(tmp_path, plugin):
    here, there = tmp_path / "here", tmp_path / "there"
    save(plugin, here / "last.ckpt")
    before = parts(here)
    save(plugin, there / "other.ckpt", folder=here)
    assert parts(here) == before
    assert ranks_in(plugin, there / "other.ckpt") == [0, 1, 2]
    assert {path.parent.name for path in there.glob("share-*")} == {"there"}


def test_a_save_that_fails_leaves_the_old_checkpoint_with_all_its_shards(tmp_path, plugin, monkeypatch):
    save(plugin, tmp_path / "last.ckpt", epoch=1)
    before = parts(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shards = [str(plugin.save_shard(content(rank, 2), tmp_path)) for rank in (1, 2)]
    assert len(parts(tmp_path)) > len(before)
    # the shards are there, and the checkpoint that needs them is not written
    monkeypatch.setattr("lightning_dqn.resume.checkpoint_io.torch.save", full)
    with pytest.raises(CheckpointError, match="No space left"):
        plugin.save_checkpoint({**content(0, 2), "epoch": 2, "shares": shards}, tmp_path / "last.ckpt")
    monkeypatch.undo()
    assert parts(tmp_path) == before
    assert plugin.load_checkpoint(tmp_path / "last.ckpt")["epoch"] == 1
    assert ranks_in(plugin, tmp_path / "last.ckpt") == [0, 1, 2]


def test_shards_that_can_not_follow_leave_nothing_behind(tmp_path, plugin, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    save(plugin, here / "last.ckpt")
    before = parts(here)
    shards = [str(plugin.save_shard(content(rank, 2), here)) for rank in (1, 2)]
    names, moved = set(parts(here)) - set(before), []

    def second_is_one_too_many(source, target):
        moved.append(source)
        target.write_bytes(source.read_bytes()[:10])
        if len(moved) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lightning_dqn.resume.folder._link_or_copy", second_is_one_too_many)
    with pytest.raises(CheckpointError, match="No space left"):
        plugin.save_checkpoint({**content(0, 2), "epoch": 2, "shares": shards}, there / "hpc.ckpt")
    monkeypatch.undo()
    assert parts(there) == []
    # what did not follow is left to remove_stale_files at the next start, and no more than that
    assert set(before) <= set(parts(here)) <= set(before) | names
    remove_stale_files(here)
    assert parts(here) == before
    assert ranks_in(plugin, here / "last.ckpt") == [0, 1, 2]


@pytest.mark.parametrize("one_file_system", [True, False])
def test_shards_follow_without_a_copy_where_they_can(tmp_path, plugin, monkeypatch, one_file_system):
    here, there = tmp_path / "here", tmp_path / "there"
    shard = plugin.save_shard(content(1), here)
    inode = shard.stat().st_ino

    def across(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    if not one_file_system:
        monkeypatch.setattr(os, "link", across)
    plugin.save_checkpoint({**content(0), "epoch": 0, "shares": [str(shard)]}, there / "hpc.ckpt")
    assert ((there / shard.name).stat().st_ino == inode) == one_file_system
    assert ranks_in(plugin, there / "hpc.ckpt") == [0, 1]
    assert parts(here) == []


def test_shards_of_ranks_that_died_before_their_checkpoint_are_removed(tmp_path, plugin):
    save(plugin, tmp_path / "last.ckpt")
    before = parts(tmp_path)
    lost = plugin.save_shard(content(1, 5), tmp_path)
    assert lost in remove_stale_files(tmp_path)
    assert parts(tmp_path) == before


def test_a_shard_that_is_missing_or_damaged_raises_where_it_is_needed(tmp_path, plugin):
    save(plugin, tmp_path / "last.ckpt")
    one, other = plugin.load_checkpoint(tmp_path / "last.ckpt")["shares"]
    os.unlink(one)
    with open(other, "r+b") as file:
        file.seek(200)
        file.write(b"nonsense")
    # the first rank, an evaluation and a download need neither
    assert plugin.load_checkpoint(tmp_path / "last.ckpt")["epoch"] == 0
    with pytest.raises(CheckpointError, match=r"share-.* is missing, .* copy it with the checkpoint"):
        plugin.load_checkpoint(one)
    with pytest.raises(CheckpointError, match="share-"):
        plugin.load_checkpoint(other)


@settings(deadline=None, max_examples=40)
@given(
    priorities=st.lists(st.lists(st.floats(0.01, 100), min_size=1, max_size=30), min_size=2, max_size=4),
    beta=st.floats(0, 1),
    minibatches=st.integers(1, 3),
)
def test_importance_weights_of_shards_are_those_of_the_whole_minibatch(priorities, beta, minibatches):
    samplers = []
    for seed, numbers in enumerate(priorities):
        sampler = PrioritizedSampler(len(numbers), seed, alpha=1.0)
        sampler.add(np.arange(len(numbers)))
        sampler.update_priorities(np.arange(len(numbers)), np.array(numbers))
        sampler.beta = beta
        samplers.append(sampler)
    drawn = [sampler.draw(4 * minibatches, minibatches) for sampler in samplers]
    gathered = np.stack([sampler.local_stats(minibatches) for sampler in samplers])
    weights = [
        weight.view(minibatches, 4).numpy() * sampler.apply_global_stats(gathered)[:, None]
        for sampler, (_, weight) in zip(samplers, drawn, strict=True)
    ]
    # the same from the definition: every shard gives as many rows, so a row's chance is p_i / (W sum of its shard)
    size = sum(map(len, priorities))
    for update in range(minibatches):
        raw = []
        for numbers, (rows, _) in zip(priorities, drawn, strict=True):
            mass = sum(numbers) + len(numbers) * 1e-6
            for row in rows.reshape(minibatches, 4)[update]:
                chance = (numbers[row] + 1e-6) / (len(priorities) * mass)
                raw.append((size * chance) ** -beta)
        expected = np.array(raw) / max(raw)
        np.testing.assert_allclose(np.concatenate([part[update] for part in weights]), expected, rtol=1e-4)


def test_new_rows_of_a_shard_enter_with_the_largest_priority_of_all():
    one, other = PrioritizedSampler(4, 0, alpha=1.0), PrioritizedSampler(4, 1, alpha=1.0)
    for sampler, error in ((one, 2.0), (other, 7.0)):
        sampler.add(np.arange(2))
        sampler.update_priorities(np.arange(2), np.full(2, error))
        sampler.draw(2)
    gathered = np.stack([one.local_stats(1), other.local_stats(1)])
    one.apply_global_stats(gathered)
    one.add(np.array([2]))
    assert one._tree.leaves[2] == pytest.approx(7.0, abs=1e-3)


def test_a_shard_that_has_drawn_nothing_reports_it_in_as_many_numbers():
    sampler = PrioritizedSampler(4, 0)
    assert sampler.local_stats(3).tolist() == [1.0, np.inf, np.inf, np.inf]
