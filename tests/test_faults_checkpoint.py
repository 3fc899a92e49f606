"""Faults that checkpoints must survive, with real ones: kills, full disks, bad files.

A state has a version: every number in it, in the checkpoint and in its memory, is that version, so that what was loaded
shows whether it is of one piece.
"""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_checkpoint_io import make_pair, make_trainer

from lightning_dqn.resume.checkpoint_io import AtomicCheckpointIO
from lightning_dqn.resume.content import CheckpointError
from lightning_dqn.resume.folder import remove_stale_files

MB = 2**20
LAYOUTS = pytest.mark.parametrize("max_inline_bytes", [2**40, 0], ids=["inline", "beside"])


def state(version, size):
    """A checkpoint of `size` bytes, four fifths of them memory."""
    # numpy's, since torch's own fill might start threads, which a forked child can't use
    weight, rows = (torch.from_numpy(np.full(count, version, np.int32)) for count in (size // 20, size // 5))
    return {"state_dict": {"weight": weight}, "DQNDataModule": {"train": {"memory": {"rows": {"reward": rows}}}}}


def version_of(path):
    """The version of a checkpoint, which must be of one piece."""
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    tensors = loaded["state_dict"]["weight"], loaded["DQNDataModule"]["train"]["memory"]["rows"]["reward"]
    (version,) = {int(value) for tensor in tensors for value in tensor.unique()}
    return version


def contents(path):
    """Names and bytes of all files in a folder."""
    return {entry.name: entry.read_bytes() for entry in path.iterdir()}


def save_for_ever(path, plugin, version, tmpdir, done):
    """Save one version after the other and tell which is done; runs until it is killed."""
    os.environ["TMPDIR"], tempfile.tempdir = tmpdir, None
    torch.set_num_threads(1)
    for following in itertools.count(version + 1):
        plugin.save_checkpoint(state(following, 50 * MB), path)
        done.send(following)


def other_file_system(path):
    """A folder on another file system than this one, if the machine has one."""
    for root in ("/dev/shm", "/run", "/tmp"):
        if os.access(root, os.W_OK) and Path(root).stat().st_dev != path.stat().st_dev:
            return tempfile.mkdtemp(dir=root)
    pytest.skip("all folders that can be written to are on one file system")


@pytest.mark.faults
@LAYOUTS
def test_a_kill_at_20_moments_of_a_save_leaves_a_whole_checkpoint(tmp_path, max_inline_bytes):
    path, swept = tmp_path / "last.ckpt", []
    tmpdir = other_file_system(tmp_path)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["lightning_dqn.resume.checkpoint_io"])
    plugin = AtomicCheckpointIO(max_inline_bytes=max_inline_bytes)
    plugin.save_checkpoint(state(0, 50 * MB), path)
    begun = time.monotonic()
    plugin.save_checkpoint(state(0, 50 * MB), path)
    duration, version = time.monotonic() - begun, 0
    for moment in range(20):
        done, announce = processes.Pipe(duplex=False)
        saver = processes.Process(target=save_for_ever, args=(path, plugin, version, tmpdir, announce), daemon=True)
        saver.start()
        # its first save is behind it, and what is measured begins
        assert done.poll(60)
        time.sleep(duration * (moment + 0.5) / 20)
        saver.kill()
        saver.join()
        assert saver.exitcode == -9
        announced = done.recv()
        while done.poll():
            announced = done.recv()
        # the last one that was done, or the one after it, renamed but not yet announced
        version = version_of(path)
        assert version in (announced, announced + 1), f"at moment {moment}"
        swept += remove_stale_files(tmp_path)
        files = {entry.name for entry in tmp_path.iterdir() if not entry.name.startswith("memory-")}
        assert (files, len(list(tmp_path.iterdir()))) == ({"last.ckpt"}, 2 if max_inline_bytes == 0 else 1)
        assert version_of(path) == version
    # otherwise no kill hit a save
    assert len(swept) >= 5
    assert list(Path(tmpdir).iterdir()) == []
    shutil.rmtree(tmpdir)


@contextlib.contextmanager
def no_file_beyond(size):
    """Lets no file of this process grow beyond a size, as a full disk would; only here, for pytest's log is one too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_too_much(folder, max_inline_bytes, size):
    """A small save, then one that does not fit; the old checkpoint stays to the byte and there is no other file."""
    path, plugin = folder / "last.ckpt", AtomicCheckpointIO(max_inline_bytes=max_inline_bytes)
    before = contents(folder)
    with pytest.raises(CheckpointError) as error:
        plugin.save_checkpoint(state(2, size), path)
    assert str(error.value).startswith(f"{path}: not saved (")
    assert "the previous checkpoint is unchanged. Free space" in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(folder) == before
    assert version_of(path) == 1
    return str(error.value)


@LAYOUTS
# the last of them leaves room for the memory and not for the checkpoint, whose weights are a fifth of the whole
@pytest.mark.parametrize("size", [0.01, 1, 7], ids=["nothing fits", "a part fits", "nearly all fits"])
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, max_inline_bytes, size):
    AtomicCheckpointIO(max_inline_bytes=max_inline_bytes).save_checkpoint(state(1, MB), tmp_path / "last.ckpt")
    with no_file_beyond(int(size * MB)):
        reported = save_too_much(tmp_path, max_inline_bytes, 10 * MB)
    assert "File too large" in reported


def test_a_full_disk_after_the_memory_keeps_the_old_pair(tmp_path):
    plugin, path = AtomicCheckpointIO(max_inline_bytes=0), tmp_path / "last.ckpt"
    plugin.save_checkpoint(state(1, MB), path)
    before, large = contents(tmp_path), state(2, MB)
    large["state_dict"]["weight"] = torch.zeros(2 * MB)
    with no_file_beyond(MB), pytest.raises(CheckpointError, match="not saved"):
        plugin.save_checkpoint(large, path)
    assert contents(tmp_path) == before
    # the same memory as the old one's: what a failed save takes back is not what the old checkpoint needs
    large["DQNDataModule"] = state(1, MB)["DQNDataModule"]
    with no_file_beyond(MB), pytest.raises(CheckpointError, match="not saved"):
        plugin.save_checkpoint(large, path)
    assert contents(tmp_path) == before


def test_a_target_that_can_not_be_replaced_leaves_nothing(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    with pytest.raises(CheckpointError, match=r"last\.ckpt: not saved \(Is a directory\)"):
        AtomicCheckpointIO(max_inline_bytes=0).save_checkpoint(state(1, MB), tmp_path / "last.ckpt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_fit_on_a_full_disk_ends_with_one_error_and_its_last_checkpoint(tmp_path):
    make_trainer(tmp_path, AtomicCheckpointIO(), 1).fit(*make_pair())
    before = contents(tmp_path)
    too_large = pytest.raises(CheckpointError, match=r"\.ckpt: not saved \(File too large\)")
    with no_file_beyond(100_000), too_large:
        make_trainer(tmp_path, AtomicCheckpointIO(), 2).fit(*make_pair(), ckpt_path=tmp_path / "last.ckpt")
    assert contents(tmp_path) == before


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_malicious_checkpoint_executes_nothing(tmp_path):
    trace, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "callbacks": {"x": Malicious(trace)}}, path)
    with pytest.raises(CheckpointError, match=r"evil\.ckpt: holds \w+\.mkdir, which is no plain value"):
        AtomicCheckpointIO().load_checkpoint(path)
    model, data = make_pair()
    with pytest.raises(CheckpointError, match="nothing of it was loaded or executed"):
        make_trainer(tmp_path, AtomicCheckpointIO(), 1).fit(model, data, ckpt_path=path)
    assert remove_stale_files(tmp_path) == []
    assert not trace.exists()
    # it would have
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_a_bare_pickle_executes_nothing(tmp_path):
    trace, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": Malicious(trace)}))
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        AtomicCheckpointIO().load_checkpoint(path)
    torch.save({"x": Malicious(trace)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert remove_stale_files(tmp_path) == []
    assert not trace.exists()


RECORD = {"at": ["rows"], "file": "memory-0123456789abcdef.safetensors", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("file", name) for name in ("../secret", "/etc/hostname", "last.ckpt", 3, ["memory"], None)),
        *(("at", path) for path in ("rows", [], [0], ["epoch"], ["nowhere"], ["rows", "deeper"], {"rows": 1}, None)),
    ],
    ids=repr,
)
def test_a_checkpoint_can_not_name_a_file_or_a_place_that_is_no_memory(tmp_path, key, value):
    (tmp_path / "run").mkdir()
    (tmp_path / "secret").write_text("secret")
    path = tmp_path / "run" / "last.ckpt"
    for memory in ({**RECORD, key: value}, {name: part for name, part in RECORD.items() if name != key}):
        torch.save({"epoch": 1, "rows": {}, "lightning_dqn": {"schema": 2, "memory": memory}}, path)
        with pytest.raises(CheckpointError, match=rf"last\.ckpt: lightning_dqn\.memory\.{key} in the checkpoint is"):
            AtomicCheckpointIO().load_checkpoint(path)
        assert remove_stale_files(path.parent) == []


def f32(**changed):
    """The entry of a tensor in the header of a safetensors file."""
    return {"dtype": "F32", "shape": [16], "data_offsets": [0, 64], **changed}


@pytest.mark.parametrize(
    "header",
    [
        {"a": f32(data_offsets=[0, 60])},
        {"a": f32(), "b": f32()},
        {"a": f32(shape=[4], data_offsets=[0, 16]), "b": f32(shape=[14], data_offsets=[8, 64])},
        {"a": f32(shape=[2**62, 2**62])},
        {"a": f32(shape=[-1])},
        {"a": f32(dtype="O")},
        {"a": f32(data_offsets=[64, 0])},
        {"a\nb": f32(shape=[4])},
        {"a": 3},
        [1, 2],
        {"a" * 2**20: f32()},
        b"no json",
        b"",
        b'{"a":' + b"[" * 100_000,
    ],
    ids=lambda header: str(header)[:40],
)
def test_a_forged_memory_with_the_right_hash_is_rejected(tmp_path, header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    for length in (len(text), 2**63, 2**64 - 1):
        content = length.to_bytes(8, "little") + text + bytes(64)
        record = {**RECORD, "sha256": hashlib.sha256(content).hexdigest()}
        (tmp_path / RECORD["file"]).write_bytes(content)
        torch.save({"rows": {}, "lightning_dqn": {"schema": 2, "memory": record}}, tmp_path / "last.ckpt")
        with pytest.raises(CheckpointError, match="not a safetensors file") as error:
            AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
        assert "\n" not in str(error.value)


def test_shards_that_name_each_other_do_not_hang(tmp_path):
    names = [f"share-{i:016x}.pt" for i in range(2)]
    for name in (*names, "last.ckpt"):
        torch.save({"lightning_dqn": {"schema": 2, "shares": names}}, tmp_path / name)
    assert remove_stale_files(tmp_path) == []
    AtomicCheckpointIO().remove_checkpoint(tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/last.ckpt", "https://a/b", "s3://a/b", "gs://a/b", "simplecache::s3://a/b"]
)
def test_a_remote_path_is_rejected(url):
    for use in (AtomicCheckpointIO().load_checkpoint, AtomicCheckpointIO().remove_checkpoint):
        with pytest.raises(CheckpointError, match=rf"^{url}: checkpoints are local files; copy it to this machine"):
            use(url)
    with pytest.raises(CheckpointError, match="local files"):
        AtomicCheckpointIO().save_checkpoint({}, url)


def test_a_truncated_checkpoint_is_rejected_in_one_line(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(state(1, 10_000), path)
    whole = path.read_bytes()
    lengths = {*range(0, len(whole), len(whole) // 97), 0, 1, 4, len(whole) - 1, len(whole) - 22}
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"last\.ckpt: damaged, or not a checkpoint \(.+\); use") as error:
            AtomicCheckpointIO().load_checkpoint(path)
        assert "\n" not in str(error.value), length
    path.write_bytes(whole)
    assert version_of(path) == 1


def test_a_flipped_bit_is_rejected_or_changes_nothing(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(state(1, 2_000), path)
    whole, rejected = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            # names, time stamps and padding of the archive may mean nothing
            assert version_of(path) == 1
        except CheckpointError:
            rejected += 1
    # at the least where the numbers lie
    assert rejected >= 2_000


@pytest.mark.parametrize(
    "content",
    [
        *([1, 2], {}, {"epoch": 1}, {"lightning_dqn": 3}, {"lightning_dqn": {}}, {"lightning_dqn": {"schema": "new"}}),
        *({"lightning_dqn": {"schema": 2, "shares": shares}} for shares in (3, [3], ["../last.ckpt"], {"a": 1})),
    ],
    ids=repr,
)
def test_what_is_no_checkpoint_of_this_package_is_rejected(tmp_path, content):
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt: .*use another"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")


def test_a_missing_checkpoint_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt: no such checkpoint"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")


def pair_beside(folder):
    """A checkpoint and its memory."""
    AtomicCheckpointIO(max_inline_bytes=0).save_checkpoint(state(1, 10_000), folder / "last.ckpt")
    (memory,) = folder.glob("memory-*")
    return folder / "last.ckpt", memory


@pytest.mark.parametrize("place", [0, 4_000, -1])
def test_a_memory_with_one_flipped_byte_is_rejected(tmp_path, place):
    path, memory = pair_beside(tmp_path)
    damaged = bytearray(memory.read_bytes())
    damaged[place] ^= 1
    memory.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=rf"{memory.name} is damaged"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_a_truncated_or_missing_memory_is_rejected(tmp_path):
    path, memory = pair_beside(tmp_path)
    for length in (memory.stat().st_size - 1, 0):
        os.truncate(memory, length)
        with pytest.raises(CheckpointError, match=rf"{memory.name} is damaged"):
            AtomicCheckpointIO().load_checkpoint(path)
    memory.unlink()
    with pytest.raises(CheckpointError, match=rf"{memory.name} is missing, .*: copy it with the checkpoint"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_training_on_a_mapped_memory_does_not_change_its_file(tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    plugin = AtomicCheckpointIO(max_inline_bytes=0)
    make_trainer(source, plugin, 1).fit(*make_pair())
    before = contents(source)
    model, data = make_pair()
    make_trainer(run, plugin, 2).fit(model, data, ckpt_path=source / "last.ckpt")
    assert data.env_steps == 400
    assert contents(source) == before
