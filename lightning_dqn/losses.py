"""The equations of Q-learning as pure functions of tensors: what `module.DQN` asks of each batch.

Shapes: B batch, A actions. `discount` is gamma^k (1 - terminated) for the k rewards already summed in `reward`, so one
line serves one step, n steps, cut-off tails and terminal states.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def chosen_q_values(q_values: Tensor, action: Tensor) -> Tensor:
    """Q(s, a) of the action that was taken.

    Args:
        q_values: (B, A) values of all actions.
        action: (B,) indices in 0 .. A-1, int64.

    Returns:
        (B,) values.
    """
    return q_values.gather(1, action.unsqueeze(1)).squeeze(1)


def q_target(reward: Tensor, discount: Tensor, next_target_q: Tensor) -> Tensor:
    """The DQN target (Mnih et al. 2015, Algorithm 1), without gradient.

    Args:
        reward: (B,) sum of the discounted rewards on the way.
        discount: (B,) weight of the value at the end of the way; 0 where the episode terminated.
        next_target_q: (B, A) target-net values of the next observation.

    Returns:
        (B,) targets.
    """
    # y = r + gamma^k (1 - terminated) max_a' Q-(s', a')
    return (reward + discount * next_target_q.amax(1)).detach()


def double_q_target(reward: Tensor, discount: Tensor, next_target_q: Tensor, next_policy_q: Tensor) -> Tensor:
    """The Double DQN target (van Hasselt et al. 2016, eq. 4): the policy net picks, the target net judges.

    Args:
        reward: (B,) sum of the discounted rewards on the way.
        discount: (B,) weight of the value at the end of the way; 0 where the episode terminated.
        next_target_q: (B, A) target-net values of the next observation.
        next_policy_q: (B, A) policy-net values of the next observation.

    Returns:
        (B,) targets.
    """
    # y = r + gamma^k (1 - terminated) Q-(s', argmax_a' Q(s', a'))
    return (reward + discount * chosen_q_values(next_target_q, next_policy_q.argmax(1))).detach()


def weighted_huber(q_value: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Huber loss with delta 1 (error clipping of Mnih et al. 2015), weighted, then averaged over the batch.

    Args:
        q_value: (B,) Q(s, a), with gradient.
        target: (B,) its target.
        weight: (B,) importance weights, 1 for uniform sampling.

    Returns:
        The scalar loss.
    """
    # L = mean_i w_i h(Q_i - y_i),  h(x) = x^2 / 2 for |x| <= 1, |x| - 1/2 beyond
    return (weight * F.huber_loss(q_value, target, reduction="none", delta=1.0)).mean()


def weighted_mse(q_value: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Half the squared error, weighted, then averaged over the batch: the Huber loss without its straight part.

    Args:
        q_value: (B,) Q(s, a), with gradient.
        target: (B,) its target.
        weight: (B,) importance weights, 1 for uniform sampling.

    Returns:
        The scalar loss.
    """
    # L = mean_i w_i (Q_i - y_i)^2 / 2
    return (weight * 0.5 * (q_value - target).square()).mean()


@torch.no_grad()
def lambda_returns(reward: Tensor, discount: Tensor, ended: Tensor, next_value: Tensor, td_lambda: float) -> Tensor:
    """Returns of Q(lambda) in a rollout (Peng and Williams 1996, as in Gallici et al. 2024, eq. 6), without gradient.

    Args:
        reward: (T, N) of each step.
        discount: (T, N) weight of the value behind it; 0 where the episode terminated.
        ended: (T, N) whether the episode ended there, by itself or by a cut.
        next_value: (T, N) max_a Q(s_{t+1}, a), of the last observation where an episode ended.
        td_lambda: how much later rewards count against the value, in [0, 1]: 0 is one step, 1 the whole rollout.

    Returns:
        (T, N) returns.
    """
    # R_t = r_t + gamma (1 - terminated) ((1 - lambda) max_a Q(s_{t+1}, a) + lambda R_{t+1}), with
    # R_{t+1} = max_a Q(s_{t+1}, a) behind an episode's end and behind the rollout
    returns = list((reward + discount * next_value).unbind())
    carried, values = (td_lambda * discount * ~ended).unbind(), next_value.unbind()
    for t in range(len(returns) - 2, -1, -1):
        returns[t] = torch.addcmul(returns[t], carried[t], returns[t + 1] - values[t])
    return torch.stack(returns)


@torch.no_grad()
def move_towards(target: list[Tensor], source: list[Tensor], tau: float) -> None:
    """Polyak average in place (Lillicrap et al. 2016, Algorithm 1).

    Args:
        target: tensors that move.
        source: tensors of the same shapes that they move to.
        tau: share of the way, in (0, 1]; 1 copies.
    """
    # theta- <- (1 - tau) theta- + tau theta
    torch._foreach_lerp_(target, source, tau)
