"""The checkpoint plugin: what it saves, rejects, shares and removes, on small checkpoints and in one short fit."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
from collections import Counter, OrderedDict, deque, namedtuple
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import quiet_trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from safetensors import safe_open
from torch import nn

from lightning_dqn import DQN, DQNDataModule, EpsilonDecay, SoftTargetUpdate
from lightning_dqn.resume import folder
from lightning_dqn.resume.checkpoint_io import AtomicCheckpointIO
from lightning_dqn.resume.content import CheckpointError
from lightning_dqn.resume.folder import remove_stale_files
from lightning_dqn.resume.serializable import check_serializable

ROWS = ("DQNDataModule", "train", "memory", "rows")
# every dtype a memory has, an odd number of bytes, none at all, and no dimension at all
TENSORS = {
    "observation": torch.arange(7 * 3 * 5, dtype=torch.uint8).reshape(7, 3, 5),
    "action": torch.arange(7),
    "reward": torch.tensor([0.1, -0.0, float("nan"), float("inf"), 1e-45, 2.0, 3.0]),
    "terminated": torch.tensor([True, False, True]),
    "nothing": torch.zeros(0, 4),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "half": torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
}


def checkpoint(tensors=TENSORS, epoch=3):
    """As Lightning makes it, in small."""
    return {
        "epoch": epoch,
        "state_dict": OrderedDict(weight=torch.ones(2, 2)),
        "DQNDataModule": {"train": {"memory": {"rows": dict(tensors), "cursor": 5}, "env_steps": 9}},
    }


def memories(path):
    """Names of the files beside checkpoints."""
    return sorted(entry.name for entry in path.iterdir() if entry.name.startswith("memory-"))


def same_bits(one, other):
    """Whether two tensors are equal in dtype, shape and every bit."""
    as_bytes = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(*as_bytes)


@pytest.fixture
def beside():
    """Puts every memory beside its checkpoint."""
    return AtomicCheckpointIO(max_inline_bytes=0)


@pytest.mark.parametrize(("max_inline_bytes", "files"), [(0, 1), (10_000, 0)], ids=["beside", "inline"])
def test_a_memory_comes_back_bitwise(tmp_path, max_inline_bytes, files):
    plugin, saved = AtomicCheckpointIO(max_inline_bytes=max_inline_bytes), checkpoint()
    plugin.save_checkpoint(saved, tmp_path / "new" / "last.ckpt")
    assert len(memories(tmp_path / "new")) == files
    loaded = AtomicCheckpointIO().load_checkpoint(str(tmp_path / "new" / "last.ckpt"))
    rows = loaded["DQNDataModule"]["train"]["memory"].pop("rows")
    assert rows.keys() == TENSORS.keys()
    assert all(same_bits(rows[name], tensor) for name, tensor in TENSORS.items())
    assert loaded["DQNDataModule"] == {"train": {"memory": {"cursor": 5}, "env_steps": 9}}
    assert torch.equal(loaded["state_dict"]["weight"], torch.ones(2, 2))
    # and who gave it still has it as it was
    assert saved.keys() == checkpoint().keys()
    assert all(saved["DQNDataModule"]["train"]["memory"]["rows"][name] is tensor for name, tensor in TENSORS.items())


def test_the_limit_is_the_largest_memory_that_travels_inside(tmp_path):
    hundred = {"observation": torch.zeros(90, dtype=torch.uint8), "reward": torch.zeros(10, dtype=torch.uint8)}
    for limit, files in ((100, 0), (99, 1)):
        AtomicCheckpointIO(max_inline_bytes=limit).save_checkpoint(checkpoint(hundred), tmp_path / "last.ckpt")
        assert len(memories(tmp_path)) == files
    with pytest.raises(ValueError, match="max_inline_bytes=-1"):
        AtomicCheckpointIO(max_inline_bytes=-1)


@pytest.mark.parametrize("missing", [{}, {"DQNDataModule": {}}, {"DQNDataModule": {"train": None}}])
def test_a_checkpoint_without_a_memory_is_saved_as_it_is(tmp_path, beside, missing):
    beside.save_checkpoint({"epoch": 1, **missing}, tmp_path / "weights.ckpt")
    assert beside.load_checkpoint(tmp_path / "weights.ckpt") == {"epoch": 1, **missing, "lightning_dqn": {"schema": 2}}


def test_a_memory_of_a_subclass_of_the_data_module_is_saved_beside_the_checkpoint_too(tmp_path, beside):
    saved = checkpoint()
    saved["Prices.MyData"] = saved.pop("DQNDataModule")
    beside.save_checkpoint(saved, tmp_path / "last.ckpt")
    assert len(memories(tmp_path)) == 1
    rows = beside.load_checkpoint(tmp_path / "last.ckpt")["Prices.MyData"]["train"]["memory"]["rows"]
    assert all(same_bits(rows[name], tensor) for name, tensor in TENSORS.items())


def test_safetensors_reads_a_memory_and_every_tensor_in_it_is_aligned(tmp_path, beside):
    beside.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    (name,) = memories(tmp_path)
    with safe_open(tmp_path / name, framework="pt") as file:
        rows = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dict
    assert rows.keys() == TENSORS.keys()
    assert all(same_bits(rows[name], tensor) for name, tensor in TENSORS.items())
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in rows.values())
    assert name == f"memory-{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()[:16]}.safetensors"
    entry = torch.load(tmp_path / "last.ckpt", weights_only=True)["lightning_dqn"]
    assert entry["memory"].keys() == {"at", "file", "sha256"}


MAPPED = """
import resource, sys
from lightning_dqn.resume.checkpoint_io import AtomicCheckpointIO

def kilobytes():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 1024

before = kilobytes()
loaded = AtomicCheckpointIO().load_checkpoint(sys.argv[1])
print(kilobytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux shows how much RAM a process has")
@pytest.mark.integration
def test_loading_a_memory_takes_no_ram_until_it_is_used(tmp_path, beside):
    beside.save_checkpoint(checkpoint({"observation": torch.zeros(2**27, dtype=torch.uint8)}), tmp_path / "last.ckpt")
    command = [sys.executable, "-c", MAPPED, str(tmp_path / "last.ckpt")]
    # 128 MB of memory
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) < 20_000


def test_writing_into_a_mapped_memory_leaves_its_file_alone(tmp_path, beside):
    beside.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    loaded = beside.load_checkpoint(tmp_path / "last.ckpt")["DQNDataModule"]["train"]["memory"]["rows"]
    loaded["action"] += 1
    again = beside.load_checkpoint(tmp_path / "last.ckpt")["DQNDataModule"]["train"]["memory"]["rows"]
    assert loaded["action"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert again["action"].tolist() == [0, 1, 2, 3, 4, 5, 6]


def hung_on(value, kind=torch.Tensor):
    """A tensor, or an OrderedDict, with a value as an attribute: it is pickled with it."""
    carrier = torch.zeros(2) if kind is torch.Tensor else OrderedDict(a=1)
    carrier.note = value
    return carrier


class Subclass(torch.Tensor):
    """A tensor of another type."""


PolicyTargetParams = namedtuple("PolicyTargetParams", "first second")
PLAIN = [None, True, 1 - (1 << 2039), (1 << 2039) - 1, float("nan"), 1j, "\ud800ä", b"\x00\xff", torch.Size([2])]
PLAIN += [torch.float16, torch.device("cpu"), {1: {(2, "x"): 3.5}}, OrderedDict(a=[()]), {1, 2}]
PLAIN += [nn.Parameter(torch.ones(1))]
PLAIN += [torch.eye(2).to_sparse(), hung_on([1]), hung_on({"a": 1}, OrderedDict)]
OTHERS = [np.float64(1), np.float32(1), np.bool_(True), np.int64(1), np.str_("a"), np.zeros(2), Path("a"), deque([1])]
OTHERS += [1 << 2039, PolicyTargetParams(1, 2), frozenset({1}), range(3), int, len, np.dtype("int8")]
OTHERS += [torch.zeros(2).as_subclass(Subclass)]
OTHERS += [hung_on(np.float64(1)), hung_on(np.float64(1), OrderedDict), {np.int64(1): 1}, [{"a": (np.float64(1),)}]]


@pytest.mark.parametrize(
    ("value", "accepted"), [*((v, True) for v in PLAIN), *((v, False) for v in OTHERS)], ids=lambda v: repr(v)[:40]
)
def test_what_is_rejected_at_save_is_what_torch_would_reject_at_load(value, accepted):
    buffer = io.BytesIO()
    torch.save({"value": value}, buffer)
    buffer.seek(0)
    if accepted:
        check_serializable({"value": value})
        torch.load(buffer, weights_only=True)
    else:
        with pytest.raises(TypeError, match=r"^value.* is (of type|over 2039 bits)"):
            check_serializable({"value": value})
        with pytest.raises(Exception, match="Weights only load failed"):
            torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"callbacks": {"X": {"y": [1, 2, np.float64(3)]}}}, "callbacks.X.y[2] is of type numpy.float64"),
        ({"optimizer_states": [{"state": {0: {"step": np.int64(1)}}}]}, "optimizer_states[0].state[0].step is of type"),
        ({"loops": {np.str_("a"): 1}}, "loops['a'] (the key) is of type numpy.str_".replace("'a'", repr(np.str_("a")))),
        ({"state_dict": {"w": hung_on(Path("a"))}}, "state_dict.w.note is of type pathlib."),
    ],
    ids=["callback", "optimizer", "key", "attribute"],
)
def test_an_error_names_the_key_path_and_writes_nothing(tmp_path, value, where):
    with pytest.raises(TypeError) as error:
        AtomicCheckpointIO().save_checkpoint(value, tmp_path / "last.ckpt")
    assert str(error.value).startswith(where)
    assert list(tmp_path.iterdir()) == []


def test_equal_memories_share_a_file_that_lives_as_long_as_one_of_their_checkpoints(tmp_path, beside):
    beside.save_checkpoint(checkpoint(), tmp_path / "best.ckpt")
    beside.save_checkpoint(checkpoint(epoch=4), tmp_path / "last.ckpt")
    (shared,) = memories(tmp_path)
    beside.remove_checkpoint(tmp_path / "best.ckpt")
    assert memories(tmp_path) == [shared]
    beside.save_checkpoint(checkpoint({"action": torch.zeros(3)}), tmp_path / "last.ckpt")
    (other,) = memories(tmp_path)
    assert other != shared
    beside.remove_checkpoint(str(tmp_path / "last.ckpt"))
    beside.remove_checkpoint(tmp_path / "never_there.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_copies_and_links_of_a_checkpoint_keep_its_memory(tmp_path, beside):
    beside.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "a copy under any name")
    beside.save_checkpoint(checkpoint({"action": torch.zeros(3)}), tmp_path / "last.ckpt")
    assert remove_stale_files(tmp_path) == []
    assert beside.load_checkpoint(tmp_path / "a copy under any name")["DQNDataModule"]["train"]["memory"]["rows"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "link.ckpt").symlink_to(tmp_path / "last.ckpt")
    assert beside.load_checkpoint(elsewhere / "link.ckpt")["DQNDataModule"]["train"]["memory"]["rows"]
    beside.remove_checkpoint(elsewhere / "link.ckpt")
    assert beside.load_checkpoint(tmp_path / "last.ckpt")["epoch"] == 3


def test_saving_over_a_link_replaces_the_link_and_not_what_it_shows(tmp_path, beside):
    beside.save_checkpoint(checkpoint(epoch=1), tmp_path / "best.ckpt")
    (tmp_path / "last.ckpt").symlink_to("best.ckpt")
    beside.save_checkpoint(checkpoint({"action": torch.zeros(3)}, epoch=2), tmp_path / "last.ckpt")
    epochs = [beside.load_checkpoint(tmp_path / name)["epoch"] for name in ("best.ckpt", "last.ckpt")]
    assert epochs == [1, 2]


def test_a_newer_schema_is_rejected_and_its_memory_left_alone(tmp_path, beside, monkeypatch):
    monkeypatch.setattr("lightning_dqn.resume.checkpoint_io.SCHEMA", 3)
    beside.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"last\.ckpt: written in schema 3 .* reads up to 2; upgrade it"):
        beside.load_checkpoint(tmp_path / "last.ckpt")
    assert remove_stale_files(tmp_path) == []
    assert len(memories(tmp_path)) == 1


def test_a_checkpoint_of_version_0_1_is_rejected_by_name_and_its_files_are_left_alone(tmp_path, beside):
    (tmp_path / "share-0123456789abcdef.pt").write_text("")
    entry = {"schema": 1, "memory": {"file": "memory-0123456789abcdef.bin"}, "shares": ["share-0123456789abcdef.pt"]}
    torch.save({"epoch": 1, "lightning_dqn": entry}, tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match=r"old\.ckpt: written by lightning_dqn 0\.1, .*train anew"):
        beside.load_checkpoint(tmp_path / "old.ckpt")
    assert remove_stale_files(tmp_path) == []
    beside.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    beside.save_checkpoint(checkpoint({"action": torch.zeros(3)}), tmp_path / "last.ckpt")
    assert len(memories(tmp_path)) == 1


def test_weights_only_can_not_be_switched_off(tmp_path, beside):
    beside.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="weights_only=False"):
        beside.load_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert beside.load_checkpoint(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 3


def test_file_urls_are_paths_and_options_for_remote_ones_are_rejected(tmp_path, beside):
    beside.save_checkpoint(checkpoint(), f"file://{tmp_path}/last.ckpt")
    assert beside.load_checkpoint(f"file://{tmp_path}/last.ckpt")["epoch"] == 3
    with pytest.raises(TypeError, match="storage_options"):
        beside.save_checkpoint(checkpoint(), tmp_path / "last.ckpt", storage_options={"key": "secret"})


@pytest.fixture(scope="module")
def dead():
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_sweep_removes_files_of_ended_processes_and_nothing_else(tmp_path, beside, dead):
    beside.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    keep = {path.name for path in tmp_path.iterdir()} | {
        "messages.tmp",
        "memory-1.safetensors",
        ".saving-x.tmp",
        "a.ckpt",
    }
    for name in keep - {"last.ckpt", *memories(tmp_path)}:
        (tmp_path / name).write_text("mine")
    # the second is of an earlier process that had the number of this one
    stale = [f".saving-{dead}-00000000-00000000.tmp", f".saving-{os.getpid()}-00000000-00000000.tmp"]
    stale.append("memory-0123456789abcdef.safetensors")
    for name in stale:
        (tmp_path / name).write_text("left behind")
    assert {path.name for path in remove_stale_files(tmp_path)} == set(stale)
    assert {path.name for path in tmp_path.iterdir()} == keep
    assert remove_stale_files(tmp_path / "not there") == []


def test_a_sweep_keeps_files_of_running_processes(tmp_path, dead):
    under_way = f".saving-{os.getppid()}-00000000-00000000.tmp"
    for name in (under_way, f".saving-{dead}-00000000-00000000.tmp", "memory-0123456789abcdef.safetensors"):
        (tmp_path / name).write_text("")
    assert [path.name for path in remove_stale_files(tmp_path)] == [f".saving-{dead}-00000000-00000000.tmp"]
    (tmp_path / under_way).unlink()
    # which is its own, of a save under way in another thread
    folder.temporary(tmp_path).write_text("")
    assert remove_stale_files(tmp_path) == []


def test_lightning_s_resume_on_slurm_counts_checkpoints_only(tmp_path, beside):
    beside.save_checkpoint(checkpoint(), tmp_path / "hpc_ckpt_7.ckpt")
    folder.temporary(tmp_path).write_text("")
    assert _CheckpointConnector.hpc_save_path(str(tmp_path)).endswith("hpc_ckpt_8.ckpt")


def test_no_other_folder_is_used(tmp_path, beside, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "not there"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    beside.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    assert beside.load_checkpoint(tmp_path / "last.ckpt")["epoch"] == 3


def make_trainer(path, plugin, max_epochs, *callbacks):
    """A trainer that saves the last and the two best checkpoints."""
    monitor = {"monitor": "val/episode_return", "mode": "max", "save_top_k": 2, "save_last": True}
    callbacks = [SoftTargetUpdate(), EpsilonDecay(), *callbacks]
    return quiet_trainer(ModelCheckpoint(path, **monitor), plugins=[plugin], callbacks=callbacks, max_epochs=max_epochs)


def make_pair():
    """A learner and its data side: 200 env steps an epoch."""
    data = DQNDataModule(epoch_env_steps=200, eval_episodes=2, memory_capacity=1_000)
    return DQN(data.observation_space, data.action_space), data


@pytest.mark.parametrize("max_inline_bytes", [0, 2**20], ids=["beside", "inline"])
def test_every_checkpoint_of_a_fit_loads_with_weights_only_and_a_fit_resumes_from_it(tmp_path, max_inline_bytes):
    plugin = AtomicCheckpointIO(max_inline_bytes=max_inline_bytes)
    others = EarlyStopping("val/episode_return", patience=9), Timer(duration="00:01:00:00")
    make_trainer(tmp_path, plugin, 4, *others).fit(*make_pair())
    written = sorted(tmp_path.glob("*.ckpt"))
    assert len(written) == 3
    needed = Counter()
    for path in written:
        entry = torch.load(path, weights_only=True)["lightning_dqn"]
        needed.update([entry["memory"]["file"]] if "memory" in entry else [])
        memory = plugin.load_checkpoint(path)["DQNDataModule"]["train"]["memory"]
        # so many as were written, of 1,000 transitions and the newest row
        assert len(memory["rows"]["action"]) == min(memory["steps"] + 1, 1_001) > 200
    assert memories(tmp_path) == sorted(needed)
    assert len(list(tmp_path.iterdir())) == 3 + len(needed)
    model, data = make_pair()
    trainer = make_trainer(tmp_path, plugin, 5)
    trainer.fit(model, data, ckpt_path=tmp_path / "last.ckpt")
    # 1000 env steps, of which those from the 128th on learn
    assert (data.env_steps, trainer.global_step) == (1_000, 1_000 - 127)


class Careless(pl.Callback):
    """Has a state that isinstance takes for a float."""

    def state_dict(self):
        return {"scores": [1.0, np.float64(2)]}


def test_a_state_that_would_not_load_is_rejected_at_the_first_save(tmp_path):
    trainer = make_trainer(tmp_path, AtomicCheckpointIO(), 1, Careless())
    with pytest.raises(TypeError, match=r"^callbacks\.Careless\.scores\[1\] is of type numpy\.float64: "):
        trainer.fit(*make_pair())
    assert list(tmp_path.iterdir()) == []
