"""Upper bounds of the update rate: the update alone on batches made in advance, without game and memory."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.atari import work
from benchmarks.atari.proof import moved, weights
from benchmarks.settings import Job, Result

BATCHES = 16


def eager(job: Job) -> Result:
    """Updates/s of plain torch with autograd and fused Adam; an update counts as 4 env steps."""
    torch.manual_seed(job.seed)
    policy_net, target_net = _network().to(job.device), _network().to(job.device)
    target_net.load_state_dict(policy_net.state_dict())
    optimizer = torch.optim.Adam(policy_net.parameters(), lr=work.LEARNING_RATE, fused=True)
    batches = itertools.cycle(_batches(job.device))

    def update() -> None:
        observation, action, reward, discount, following = next(batches)
        with torch.no_grad():
            # y = r + gamma (1 - terminated) max_a' Q-(s', a')
            y = reward + discount * target_net(following).amax(1)
        loss = F.smooth_l1_loss(policy_net(observation).gather(1, action[:, None]).squeeze(1), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return _rate(update, policy_net, job)


def compiled(job: Job) -> Result:
    """Updates/s of this package's compiled gradient and optimizer kernel in a bare loop."""
    from gymnasium import spaces  # noqa: PLC0415  # eager uses torch only

    from lightning_dqn import DQN, NatureCNN  # noqa: PLC0415
    from lightning_dqn.replay import Transition  # noqa: PLC0415
    from lightning_dqn.speed.compiled import compile_gradient  # noqa: PLC0415
    from lightning_dqn.speed.flat import make_optimizer  # noqa: PLC0415
    from lightning_dqn.speed.optimizers import fused_step  # noqa: PLC0415

    torch.manual_seed(job.seed)
    frames = spaces.Box(0, 255, (work.FRAME_STACK, work.SIZE, work.SIZE), "uint8")
    model = DQN(frames, spaces.Discrete(work.NUM_ACTIONS), network=NatureCNN).to(job.device)
    optimizer, flat = make_optimizer(
        lambda params: torch.optim.Adam(params, lr=work.LEARNING_RATE), model.policy_net, model.target_net
    )
    assert flat is not None
    policy, target = flat
    ones, rows = torch.ones(work.BATCH_SIZE, device=job.device), torch.arange(work.BATCH_SIZE, device=job.device)
    drawn = [Transition(*batch, ones, rows) for batch in _batches(job.device)]
    gradient = compile_gradient(model.td_loss, policy, target, drawn[0], [])
    step, batches = fused_step(optimizer), itertools.cycle(drawn)

    def update() -> None:
        policy.vector.grad = gradient(policy.values, target.values, *next(batches))[0]
        step()

    return _rate(update, model.policy_net, job)


class _Pixels(nn.Module):
    """uint8 to floats in [0, 1], in the channels_last format."""

    def forward(self, observation: Tensor) -> Tensor:
        return observation.contiguous(memory_format=torch.channels_last).float() / 255


def _network() -> nn.Sequential:
    # Mnih et al. 2015, Methods; 84 x 84 pixels become 7 x 7
    return nn.Sequential(
        _Pixels(),
        nn.Conv2d(work.FRAME_STACK, 32, 8, 4),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, 2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(7 * 7 * 64, 512),
        nn.ReLU(),
        nn.Linear(512, work.NUM_ACTIONS),
    )


def _batches(device: str) -> list[tuple[Tensor, ...]]:
    """Random minibatches, made in advance: observation, action, reward, discount, next observation."""
    frames = work.BATCH_SIZE, work.FRAME_STACK, work.SIZE, work.SIZE
    batches = [
        (
            torch.randint(256, frames, dtype=torch.uint8),
            torch.randint(work.NUM_ACTIONS, frames[:1]),
            torch.randint(-1, 2, frames[:1]).float(),
            work.GAMMA * (torch.rand(frames[:1]) > 0.01),
            torch.randint(256, frames, dtype=torch.uint8),
        )
        for _ in range(BATCHES)
    ]
    return [tuple(part.to(device) for part in batch) for batch in batches]


def _rate(update: Callable[[], None], net: nn.Module, job: Job) -> Result:
    """Calls per second after a warm-up, and 4 times as many env steps."""
    finish: Callable[[], Any] = torch.cuda.synchronize if job.device == "cuda" else lambda: None
    before = weights(net)
    # without gradients the moments of Adam become denormal numbers, which are slow
    torch.set_flush_denormal(True)
    for _ in range(100):
        update()
    finish()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < job.seconds:
        for _ in range(10):
            update()
        count += 10
    finish()
    elapsed = time.perf_counter() - start
    rate = count / elapsed
    return {
        "figures": {"env_steps_per_s": work.ENV_STEPS_PER_UPDATE * rate, "updates_per_s": rate},
        "notes": {"seconds": elapsed, "updates": count, "weights_moved": moved(before, weights(net))},
    }
