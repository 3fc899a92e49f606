"""Deep Q-learning for people who train agents with PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_dqn.agent import Agent as Agent
    from lightning_dqn.agent import load_agent as load_agent
    from lightning_dqn.callbacks import EpsilonDecay as EpsilonDecay
    from lightning_dqn.callbacks import PriorityUpdate as PriorityUpdate
    from lightning_dqn.callbacks import SoftTargetUpdate as SoftTargetUpdate
    from lightning_dqn.datamodule import DQNDataModule as DQNDataModule
    from lightning_dqn.module import DQN as DQN
    from lightning_dqn.networks import MLP as MLP
    from lightning_dqn.networks import ImpalaCNN as ImpalaCNN
    from lightning_dqn.networks import MinAtarCNN as MinAtarCNN
    from lightning_dqn.networks import NatureCNN as NatureCNN
    from lightning_dqn.replay import UniformSampler as UniformSampler
    from lightning_dqn.sampling import PrioritizedSampler as PrioritizedSampler
    from lightning_dqn.variants import C51 as C51
    from lightning_dqn.variants import IQN as IQN
    from lightning_dqn.variants import PQN as PQN
    from lightning_dqn.variants import QRDQN as QRDQN

__version__ = "0.2.0"

# public name -> the module that defines it, imported at first use (PEP 562)
_MODULES = {
    "Agent": "agent",
    "load_agent": "agent",
    "EpsilonDecay": "callbacks",
    "PriorityUpdate": "callbacks",
    "SoftTargetUpdate": "callbacks",
    "DQNDataModule": "datamodule",
    "DQN": "module",
    "MLP": "networks",
    "ImpalaCNN": "networks",
    "MinAtarCNN": "networks",
    "NatureCNN": "networks",
    "UniformSampler": "replay",
    "PrioritizedSampler": "sampling",
    "C51": "variants",
    "IQN": "variants",
    "PQN": "variants",
    "QRDQN": "variants",
}
__all__ = ["__version__", *_MODULES]  # noqa: PLE0604  the names of the block above


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
