"""Where the memory of a run is stored, by its options, and the message about it."""

from types import SimpleNamespace

import pytest
import torch
from catch import Catch
from conftest import quiet_trainer

from lightning_dqn import DQN, DQNDataModule, MinAtarCNN
from lightning_dqn.storage.memory_size import MemorySize
from lightning_dqn.validation import replay_location


def data_module(**options):
    defaults = {"env_id": Catch.env_id, "frame_stack": 2, "memory_capacity": 500, "batch_size": 8}
    return DQNDataModule(**(defaults | {"epoch_env_steps": 60, "warmup_env_steps": 20, "eval_episodes": 1} | options))


def network(space, outputs):
    return MinAtarCNN(space, outputs, hidden_sizes=[8])


def trained(data):
    """The weights after a short fit."""
    torch.manual_seed(0)
    model = DQN(data.observation_space, data.action_space, network=network)
    quiet_trainer().fit(model, data)
    return torch.cat([parameter.detach().flatten() for parameter in model.policy_net.parameters()])


def test_the_size_of_a_memory_is_reported_at_the_start(messages):
    trained(data_module())
    # 500 frames of 7,056 bytes, and 24 more a row
    assert "memory: 500 transitions, 3.54 MB in RAM" in messages


def test_a_run_learns_the_same_from_a_file(tmp_path, messages):
    in_ram, in_file = trained(data_module()), trained(data_module(memory_folder=str(tmp_path)))
    assert torch.equal(in_ram, in_file)
    assert f"memory: 500 transitions, 3.53 MB in a file in {tmp_path} and 12 kB in RAM" in messages
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        ({"memory_folder": "/nowhere"}, r"memory_folder=/nowhere: no such folder"),
        ({"memory_device": "tpu"}, r"memory_device=tpu: must be one of auto, cpu, cuda"),
        ({"memory_device": "cuda", "memory_folder": "/tmp"}, "use only one of them"),
        ({"memory_capacity": 10**10}, r"memory_capacity=10000000000: needs 70,\d{3},000,000,000 bytes"),
    ],
)
def test_a_place_that_cannot_be_is_rejected_at_once(options, reported):
    with pytest.raises(ValueError, match=reported):
        data_module(**options)


def test_a_memory_of_many_processes_is_looked_at_shard_by_shard(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "1000")
    data = data_module(memory_capacity=10**10)
    # alone, as it turns out when the run begins
    with pytest.raises(ValueError, match=r"memory_capacity=10000000000: needs 70,"):
        trained(data)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
def test_a_device_that_is_not_there_is_rejected_at_once():
    with pytest.raises(ValueError, match=r"memory_device=cuda: torch finds no such device"):
        data_module(memory_device="cuda")


def test_a_memory_on_a_gpu_that_the_trainer_does_not_use_is_rejected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(MemorySize, "check", lambda _: None)
    data = data_module(memory_device="cuda")
    with pytest.raises(ValueError, match=r"memory_device=cuda: the trainer learns on cpu; use auto"):
        trained(data)


@pytest.mark.parametrize(
    ("learner", "options", "room", "place"),
    [
        ("cuda:1", {}, True, "cuda:1"),
        ("cuda:1", {}, False, None),
        ("cuda:1", {"memory_device": "cpu"}, True, None),
        ("cuda:1", {"env_id": "CartPole-v1", "frame_stack": 1}, True, None),
        ("cpu", {}, True, None),
    ],
)
def test_images_are_stored_on_the_gpu_that_learns_if_it_has_room(learner, options, room, place, monkeypatch):
    data = data_module(**options)
    # a trainer, as far as it is asked: there may be no GPU
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(learner)))

    def check(_):
        if not room:
            raise ValueError("no room")

    monkeypatch.setattr(MemorySize, "check", check)
    assert replay_location(data) == (place and torch.device(place), None)
