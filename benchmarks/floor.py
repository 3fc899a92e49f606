"""Upper bounds of a torch loop: the matrix products of an update, and an update without game and memory."""

import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.settings import TEXTBOOK, TEXTBOOK_LAYERS, Job, Result

BATCHES = 64


def products(job: Job) -> Result:
    """Updates/s of only the 11 matrix products of an update, with preallocated outputs."""
    torch.manual_seed(job.seed)
    jobs = _products(TEXTBOOK.batch_size)

    def update() -> None:
        for left, right, out in jobs:
            torch.mm(left, right, out=out)

    flops = sum(2 * left.shape[0] * left.shape[1] * right.shape[1] for left, right, _ in jobs)
    result = _rate(update, job.seconds)
    result["notes"] |= {"products": len(jobs), "mflop_per_update": flops / 1e6}
    return result


def _products(batch: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Factors and results: two forward passes, the weights' gradients, and the hidden layers' gradients."""
    weights = [torch.randn(inputs, outputs) for inputs, outputs in TEXTBOOK_LAYERS]
    activations = [torch.randn(batch, inputs) for inputs, _ in TEXTBOOK_LAYERS]
    gradients = [torch.randn(batch, outputs) for _, outputs in TEXTBOOK_LAYERS]
    forward = list(zip(activations, weights, strict=True))
    backward = [(x.t(), g) for x, g in zip(activations, gradients, strict=True)]
    # the observations need no gradient
    backward += [(g, w.t()) for g, w in zip(gradients[1:], weights[1:], strict=True)]
    return [(a, b, torch.empty(a.shape[0], b.shape[1])) for a, b in [*forward, *forward, *backward]]


def bare_update(job: Job) -> Result:
    """Updates/s of eager torch with fused AdamW only: no game, memory, Lightning or clipping."""
    torch.manual_seed(job.seed)
    policy_net, target_net = _network(), _network()
    target_net.load_state_dict(policy_net.state_dict())
    optimizer = torch.optim.AdamW(policy_net.parameters(), lr=TEXTBOOK.learning_rate, amsgrad=True, fused=True)
    policy: list[Tensor] = [*policy_net.parameters()]
    target: list[Tensor] = [*target_net.parameters()]
    batches = itertools.cycle(_batches())

    def update() -> None:
        observation, action, reward, discount, following = next(batches)
        with torch.no_grad():
            # y = r + gamma (1 - terminated) max_a' Q-(s', a')
            y = reward + discount * target_net(following).amax(1)
        loss = F.smooth_l1_loss(policy_net(observation).gather(1, action).squeeze(1), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(target, policy, TEXTBOOK.tau)

    return _rate(update, job.seconds)


def _network() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in TEXTBOOK_LAYERS:
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _batches() -> list[tuple[Tensor, ...]]:
    """Random minibatches, made in advance."""
    size = TEXTBOOK.batch_size
    return [
        (
            torch.randn(size, 4),
            torch.randint(2, (size, 1)),
            torch.ones(size),
            TEXTBOOK.gamma * (torch.rand(size) > 0.05),
            torch.randn(size, 4),
        )
        for _ in range(BATCHES)
    ]


def _rate(update: Callable[[], None], seconds: float) -> Result:
    """Calls per second after a warm-up."""
    for _ in range(200):
        update()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(50):
            update()
        count += 50
    elapsed = time.perf_counter() - start
    return {"figures": {"updates_per_s": count / elapsed}, "notes": {"seconds": elapsed, "updates": count}}
