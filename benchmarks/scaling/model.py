"""Models the time of a collective call of W ranks, and of an iteration in which each call waits for the slowest.

The time of a call is fixed + steps * hop + share * bytes / bandwidth, with share * bytes the bytes through a rank.
Steps and shares are those of the algorithms in use:

- gloo's all-reduce is a ring, gloo/allreduce.cc: 2 (W - 1) steps of 1/W of the bytes; its all-gather one of (W - 1)
  steps, gloo/allgather.cc; its broadcast a binomial tree, gloo/broadcast.cc. The terms are those of Thakur,
  Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH" (2005).
- NCCL uses the faster of a ring and a tree of 2 log2 W steps, as in its own model, nccl/src/graph/tuning.cc.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.scaling.trace import BATCH, UPDATE, Floats, Trace

# simulated iterations per prediction
ITERATIONS = 2_000
Draw = Callable[[str, int], Floats]


@dataclass(frozen=True)
class Network:
    """The network between two ranks.

    Attributes:
        name: name in the tables.
        hop_s: latency of a message in s, in addition to that of the software over loopback.
        bytes_per_s: bandwidth of a link.
        nccl: whether gradients and Lightning's broadcast use NCCL; the synchronization of env steps never does.
        source: source of the figures.
    """

    name: str
    hop_s: float
    bytes_per_s: float
    nccl: bool
    source: str


NETWORKS = (
    Network("one machine", 0.0, math.inf, nccl=False, source="gloo over loopback, measured here"),
    Network(
        "10 Gbit/s Ethernet",
        50e-6,
        1.25e9,
        nccl=False,
        source="gloo; 50 us a hop on top of loopback's: assumed, between the 20 us of two tuned hosts back to back "
        "(Hurwitz & Feng, Hot Interconnects 2003) and the round trips of some 500 us in a cloud's zone (Jones, 2021)",
    ),
    Network(
        "100 Gbit/s, NCCL",
        10e-6,
        12.5e9,
        nccl=True,
        source="NCCL; 10 us a call and a hop: assumed, of the order of NCCL's own tables (nccl/src/graph/tuning.cc: 4 "
        "to 10 us a call, 3 to 10 us a hop between machines); the computation stays that of a core",
    ),
)


@dataclass(frozen=True)
class Cost:
    """The fitted cost of one kind of gloo call.

    Attributes:
        fixed_s: fixed time in s.
        byte_s: time per byte through a rank in s.
        late_s: measured minus fitted times in s, by bytes.
    """

    fixed_s: float
    byte_s: float
    late_s: dict[int, Floats] = field(default_factory=dict)

    def late(self, size: int) -> Floats:
        """Deviations of the calls of the nearest size."""
        nearest = min(self.late_s, key=lambda known: abs(math.log(known / size)), default=None)
        return np.zeros(1) if nearest is None else self.late_s[nearest]


@dataclass(frozen=True)
class Gloo:
    """The cost of gloo messages on this machine, over loopback.

    Attributes:
        hop_s: one-way time of a small message in s.
        costs: cost by kind of call.
    """

    hop_s: float
    costs: dict[str, Cost]


def steps(kind: str, world: int) -> int:
    """Sequential messages in one gloo call of `world` ranks."""
    return {"all_reduce": 2 * (world - 1), "all_gather": world - 1, "broadcast": math.ceil(math.log2(world))}[kind]


def share(kind: str, world: int) -> float:
    """Bytes through a rank per byte that it sends."""
    return steps(kind, world) / world if kind == "all_reduce" else steps(kind, world)


def fit(kind: str, hop_s: float, measured: dict[int, Sequence[float]]) -> Cost:
    """Fit the cost of a kind of call between two ranks: a line with least relative errors through the medians.

    Args:
        kind: kind of call.
        hop_s: one-way time of a small message in s.
        measured: times in s from the last entry to the last return of a call, by bytes.
    """
    sizes = np.array(list(measured), np.float64)
    medians = np.array([np.median(seconds) for seconds in measured.values()])
    terms = np.stack([np.ones_like(sizes), sizes * share(kind, 2)], 1) / medians[:, None]
    [constant, byte_s], *_ = np.linalg.lstsq(terms, np.ones_like(medians), rcond=None)
    # for small messages the difference is noise
    if byte_s < 0:
        constant, byte_s = 1 / np.mean(1 / medians), 0.0
    late = {size: np.array(seconds) - np.median(seconds) for size, seconds in measured.items()}
    return Cost(max(0.0, float(constant) - steps(kind, 2) * hop_s), float(byte_s), late)


def message_s(kind: str, size: int, world: int, network: Network, gloo: Gloo) -> float:
    """Seconds from the last rank's entry to the return of a call.

    Args:
        kind: kind of call.
        size: bytes that a rank sends.
        world: number of ranks, W.
        network: network between them.
        gloo: cost of gloo calls.
    """
    if network.nccl and kind != "all_gather":
        return _nccl_s(kind, size, world, network)
    cost = gloo.costs[kind]
    byte_s = max(cost.byte_s, 1 / network.bytes_per_s)
    return cost.fixed_s + steps(kind, world) * (gloo.hop_s + network.hop_s) + share(kind, world) * size * byte_s


def _nccl_s(kind: str, size: int, world: int, network: Network) -> float:
    """Time of an NCCL call, with one hop per step; a broadcast passes the ring once."""
    if kind == "broadcast":
        return world * network.hop_s + size / network.bytes_per_s
    ring = steps(kind, world) * network.hop_s + share(kind, world) * size / network.bytes_per_s
    tree = 2 * math.ceil(math.log2(world)) * network.hop_s + 2 * size / network.bytes_per_s
    return network.hop_s + min(ring, tree)


@dataclass(frozen=True)
class Prediction:
    """The predicted iteration of W ranks.

    Attributes:
        iteration_s: mean time in s.
        compute_s: compute time of a rank in it.
        message_s: time of the calls in it, after all ranks have entered.
        latency_s: mean time of an update, from the end of the previous one or from the batch.
        latency_p99_s: 99th percentile of it.
    """

    iteration_s: float
    compute_s: float
    message_s: float
    latency_s: float
    latency_p99_s: float

    @property
    def waiting_s(self) -> float:
        """Time in an iteration that a rank waits for slower ones."""
        return max(0.0, self.iteration_s - self.compute_s - self.message_s)


def simulate(trace: Trace, world: int, draw: Draw, rng: np.random.Generator) -> Prediction:
    """Simulate iterations: each rank computes as in a measured iteration, and each call waits for the last rank.

    Args:
        trace: trace of one rank whose calls return at once.
        world: number of ranks, W.
        draw: times of a call in s in `ITERATIONS` iterations, (ITERATIONS,) or (1,), from its kind and bytes.
        rng: draws the measured iteration of each rank.
    """
    gaps = trace.gaps
    rows = rng.integers(len(gaps), size=(ITERATIONS, world))
    clock, last = np.zeros(rows.shape), np.zeros(rows.shape)
    latencies, talked = [], np.zeros(ITERATIONS)
    for event, (name, size) in enumerate(trace.events):
        clock = clock + gaps[rows, event]
        if name == UPDATE:
            latencies.append(clock - last)
        if name in (BATCH, UPDATE):
            last = clock
        elif world > 1:
            took = draw(name, size)
            clock = np.broadcast_to((clock.max(1) + took)[:, None], rows.shape)
            talked += took
    of_all = np.concatenate([found.ravel() for found in latencies])
    return Prediction(
        iteration_s=float(clock.max(1).mean()),
        compute_s=float(gaps.sum(1)[rows].mean()),
        message_s=float(talked.mean()),
        latency_s=float(of_all.mean()),
        latency_p99_s=float(np.quantile(of_all, 0.99)),
    )


def drawing(world: int, network: Network, gloo: Gloo, rng: np.random.Generator) -> Draw:
    """A function that draws times of calls: those of the model plus measured deviations."""

    def draw(kind: str, size: int) -> NDArray[np.float64]:
        cost = message_s(kind, size, world, network, gloo)
        if network.nccl and kind != "all_gather":
            return np.full(ITERATIONS, cost)
        # the first updates may have another size
        return np.maximum(cost + rng.choice(gloo.costs[kind].late(size), ITERATIONS), 0.0)

    return draw


def halved_at(efficiencies: dict[int, float]) -> int | None:
    """The first number of ranks with less than half of the linear speedup, or None."""
    return next((world for world, value in sorted(efficiencies.items()) if value < 0.5), None)
