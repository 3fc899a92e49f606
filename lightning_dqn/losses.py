"""The equations of Q-learning as pure functions of tensors.

Shapes: B batch, A actions, Z atoms or quantiles. `discount` is gamma^k (1 - terminated) for the k rewards already
summed in `reward`, so one line serves one step, n steps, cut-off tails and terminal states.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class TDLoss(NamedTuple):
    """Results of the loss of one minibatch.

    Attributes:
        loss: () what is minimised, the mean of the weighted rows.
        q_value: (B,) Q(s, a), the mean of the return where its distribution is learnt.
        td_error: (B,) Q(s, a) less its target.
        priority: (B,) priority of each row, 0 or more (Schaul et al. 2016).
    """

    loss: Tensor
    q_value: Tensor
    td_error: Tensor
    priority: Tensor


def gather_actions(values: Tensor, action: Tensor) -> Tensor:
    """Select the entries of one action per row: Q(s, a), or its distribution.

    Args:
        values: (B, A) values of all actions, or (B, A, Z).
        action: (B,) indices in 0 .. A-1, int64.

    Returns:
        (B,) values, or (B, Z).
    """
    if values.ndim == 2:
        return values.gather(1, action.unsqueeze(1)).squeeze(1)
    return values.gather(1, action[:, None, None].expand(-1, 1, values.shape[2])).squeeze(1)


def mask_actions(q_values: Tensor, action_mask: Tensor | None) -> Tensor:
    """Set the Q-values of actions that are not allowed to a very low value.

    Args:
        q_values: (B, A) values of all actions.
        action_mask: (B, A) which of them are allowed; None for all.

    Returns:
        (B, A) values, very low where the mask is false, but finite: an infinity times a discount of 0 is no number.
    """
    if action_mask is None:
        return q_values
    return q_values.masked_fill(~action_mask, max(-1e9, torch.finfo(q_values.dtype).min))


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
    """The Double DQN target (van Hasselt et al. 2016, eq. 4): the policy net selects, the target net evaluates.

    Args:
        reward: (B,) sum of the discounted rewards on the way.
        discount: (B,) weight of the value at the end of the way; 0 where the episode terminated.
        next_target_q: (B, A) target-net values of the next observation.
        next_policy_q: (B, A) policy-net values of the next observation.

    Returns:
        (B,) targets.
    """
    # y = r + gamma^k (1 - terminated) Q-(s', argmax_a' Q(s', a'))
    return (reward + discount * gather_actions(next_target_q, next_policy_q.argmax(1))).detach()


def munchausen_bonus(q_values: Tensor, action: Tensor, *, temperature: float, alpha: float = 0.9) -> Tensor:
    """The Munchausen reward: the scaled and clipped log-probability of the action (Vieillard et al. 2020, eq. 2).

    Args:
        q_values: (B, A) target-net values of the observation.
        action: (B,) what was done there.
        temperature: of the softmax policy.
        alpha: share of the log-probability, which is cut at -1.

    Returns:
        (B,) bonuses in [-alpha, 0].
    """
    # alpha [T ln pi(a | s)]_{-1}^0,  pi = softmax(Q- / T)
    log_policy = (q_values / temperature).log_softmax(1)
    return alpha * (temperature * gather_actions(log_policy, action)).clamp(-1.0, 0.0)


def soft_value(next_values: Tensor, next_q: Tensor, *, temperature: float) -> Tensor:
    """Value of an observation under the softmax policy, its entropy included (Vieillard et al. 2020, eq. 1).

    Args:
        next_values: (B, A) target-net values, or (B, A, Z) quantiles.
        next_q: (B, A) target-net values that the policy follows.
        temperature: of the softmax policy.

    Returns:
        (B,) values, or (B, Z).
    """
    # sum_a' pi(a' | s') (Q-(s', a') - T ln pi(a' | s'))
    log_policy = (next_q / temperature).log_softmax(1)
    if next_values.ndim > next_q.ndim:
        log_policy = log_policy.unsqueeze(2)
    return (log_policy.exp() * (next_values - temperature * log_policy)).sum(1)


def munchausen_target(
    reward: Tensor, discount: Tensor, next_target_q: Tensor, target_q: Tensor, action: Tensor, *, temperature: float
) -> Tensor:
    """The Munchausen-DQN target (Vieillard et al. 2020, eq. 2), without gradient.

    Args:
        reward: (B,) reward of one step.
        discount: (B,) weight of the value behind it; 0 where the episode terminated.
        next_target_q: (B, A) target-net values of the next observation.
        target_q: (B, A) target-net values of the observation.
        action: (B,) what was done there.
        temperature: of the softmax policy.

    Returns:
        (B,) targets.
    """
    # y = r + alpha [T ln pi(a | s)]_{-1}^0 + gamma (1 - terminated) sum_a' pi(a' | s') (Q-(s', a') - T ln pi(a' | s'))
    bonus = munchausen_bonus(target_q, action, temperature=temperature)
    return (reward + bonus + discount * soft_value(next_target_q, next_target_q, temperature=temperature)).detach()


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
    """Half the squared error, weighted, then averaged over the batch: the Huber loss with an infinite delta.

    Args:
        q_value: (B,) Q(s, a), with gradient.
        target: (B,) its target.
        weight: (B,) importance weights, 1 for uniform sampling.

    Returns:
        The scalar loss.
    """
    # L = mean_i w_i (Q_i - y_i)^2 / 2
    return (weight * 0.5 * (q_value - target).square()).mean()


LOSSES = {"huber": weighted_huber, "mse": weighted_mse}


def categorical_projection(atoms: Tensor, probability: Tensor, support: Tensor) -> Tensor:
    """Project a distribution onto the support, by linear interpolation (Bellemare et al. 2017, eq. 7).

    Args:
        atoms: (B, Z) returns of the probabilities, clamped to the support.
        probability: (B, Z) of each atom.
        support: (Z,) evenly spaced atoms, rising.

    Returns:
        (B, Z) probabilities on the support.
    """
    # m_i = sum_j [1 - |[T z_j]_Vmin^Vmax - z_i| / dz]_0^1 p_j
    spacing = (support[-1] - support[0]) / (len(support) - 1)
    clipped = atoms.clamp(support[0], support[-1])
    nearness = (1 - (clipped.unsqueeze(1) - support[:, None]).abs() / spacing).clamp(0, 1)
    return (nearness * probability.unsqueeze(1)).sum(2)


def quantile_huber(quantiles: Tensor, levels: Tensor, target: Tensor, *, kappa: float = 1.0) -> Tensor:
    """Quantile regression with a Huber loss (Dabney et al. 2018, QR-DQN, eq. 10), of each row.

    Args:
        quantiles: (B, Z) estimates of quantiles of the return, with gradient.
        levels: (B, Z) or (Z,) which quantiles they are, in [0, 1].
        target: (B, Z') samples, or quantiles, of the return.
        kappa: where the Huber loss turns straight, positive.

    Returns:
        (B,) losses: the sum over estimates, the mean over targets.
    """
    # rho(u) = |tau - 1{u < 0}| h_kappa(u) / kappa,  u = y_j - theta_i
    error = target.unsqueeze(1) - quantiles.unsqueeze(2)
    huber = F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=kappa) / kappa
    tilt = (levels.unsqueeze(-1) - (error.detach() < 0).to(error.dtype)).abs()
    return (tilt * huber).mean(2).sum(1)


@torch.no_grad()
def lambda_returns(reward: Tensor, discount: Tensor, ended: Tensor, next_value: Tensor, td_lambda: float) -> Tensor:
    """Returns of Q(lambda) in a rollout (Peng and Williams 1996, as in Gallici et al. 2024, eq. 6), without gradient.

    Args:
        reward: (T, N) of each step.
        discount: (T, N) weight of the value behind it; 0 where the episode terminated.
        ended: (T, N) whether the episode ended there, terminated or truncated.
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
def polyak_update(target: list[Tensor], source: list[Tensor], tau: float) -> None:
    """Polyak average in place (Lillicrap et al. 2016, Algorithm 1).

    Args:
        target: tensors that move.
        source: tensors of the same shapes that they move to.
        tau: share of the way, in (0, 1]; 1 copies.
    """
    # theta- <- (1 - tau) theta- + tau theta
    for moved, goal in zip(target, source, strict=True):
        moved.lerp_(goal, tau)
