"""The record that travels from the memory to the learner."""

from typing import NamedTuple

from torch import Tensor


class Transition(NamedTuple):
    """One batch, or U of them with a leading dimension: what the learner needs, and nothing it must look up.

    Attributes:
        observation: (U, B, ...) s.
        action: (U, B) a, as the environment takes it, int64.
        reward: (U, B) r_1 + gamma r_2 + ... of the k <= n rewards up to the episode's end.
        discount: (U, B) gamma^k (1 - terminated), the weight of the value of next_observation.
        next_observation: (U, B, ...) s' after those k steps.
        weight: (U, B) importance weight of the row in the loss.
        index: (U, B) row in the memory, for samplers that learn from the error.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_observation: Tensor
    weight: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a batch

    @property
    def action_mask(self) -> Tensor | None:
        """All actions are allowed."""
        return None

    @property
    def next_action_mask(self) -> Tensor | None:
        """All actions are allowed."""
        return None


class MaskedTransition(NamedTuple):
    """A `Transition` of an environment that does not allow every action everywhere.

    Attributes:
        action_mask: (U, B, A) which actions s allowed.
        next_action_mask: (U, B, A) which actions s' allows.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_observation: Tensor
    weight: Tensor
    index: Tensor  # type: ignore[assignment]  # as above
    action_mask: Tensor
    next_action_mask: Tensor


AnyTransition = Transition | MaskedTransition
