"""What greedy episodes amount to: the metric that `module.DQN` keeps while it is validated or tested."""

from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class EpisodeMetrics(Metric):
    """Mean, spread and extremes of the returns of episodes, and their mean length; over all devices."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("returns", [], dist_reduce_fx="cat")
        self.add_state("lengths", [], dist_reduce_fx="cat")
        self.returns: Any
        self.lengths: Any

    def update(self, episode_return: Tensor, episode_length: Tensor) -> None:
        """Count one episode, both of shape ()."""
        self.returns.append(episode_return.reshape(1))
        self.lengths.append(episode_length.reshape(1))

    def compute(self) -> dict[str, Tensor]:
        """The figures by their names."""
        returns, lengths = dim_zero_cat(self.returns), dim_zero_cat(self.lengths)
        return {
            "episode_return": returns.mean(),
            "episode_return_std": returns.std(correction=0),
            "episode_return_min": returns.min(),
            "episode_return_max": returns.max(),
            "episode_length": lengths.mean(),
        }
