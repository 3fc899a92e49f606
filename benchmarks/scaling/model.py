"""The model: what a collective call costs among W ranks, and an iteration in which all wait for the slowest at each.

A call takes what its fixed part takes, a hop for each of its steps, and the bytes that pass a rank by the bandwidth:
fixed + steps * hop + share * bytes / bandwidth. Steps and shares are those of the algorithms in use:

- gloo's all-reduce is a ring, gloo/allreduce.cc: 2 (W - 1) steps of 1/W of the bytes; its all-gather one of (W - 1)
  steps, gloo/allgather.cc; its broadcast a binomial tree, gloo/broadcast.cc. The terms are those of Thakur,
  Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH" (2005).
- NCCL takes the better of a ring and a tree of 2 log2 W steps, as its own model does, nccl/src/graph/tuning.cc.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.scaling.trace import BATCH, UPDATE, Floats, Trace

# simulated of each prediction
ITERATIONS = 2_000
Draw = Callable[[str, int], Floats]


@dataclass(frozen=True)
class Network:
    """What lies between two ranks.

    Attributes:
        name: as the tables say it.
        hop_s: seconds that a message takes on its way, besides what software takes on loopback.
        bytes_per_s: of a link.
        nccl: whether gradients and Lightning's broadcast go from device to device, by NCCL; meetings never do.
        source: where the figures come from.
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
    """What one kind of call of gloo costs, fitted.

    Attributes:
        fixed_s: seconds besides hops and bytes.
        byte_s: seconds for each byte that passes a rank.
        late_s: how much later than fitted the measured calls came back, by their bytes.
    """

    fixed_s: float
    byte_s: float
    late_s: dict[int, Floats] = field(default_factory=dict)

    def late(self, size: int) -> Floats:
        """Of the calls whose size is nearest."""
        nearest = min(self.late_s, key=lambda known: abs(math.log(known / size)), default=None)
        return np.zeros(1) if nearest is None else self.late_s[nearest]


@dataclass(frozen=True)
class Gloo:
    """What messages cost on this machine, over loopback.

    Attributes:
        hop_s: seconds of a small message one way.
        costs: by kind of call.
    """

    hop_s: float
    costs: dict[str, Cost]


def steps(kind: str, world: int) -> int:
    """Messages that follow each other in one call of gloo's among so many ranks."""
    return {"all_reduce": 2 * (world - 1), "all_gather": world - 1, "broadcast": math.ceil(math.log2(world))}[kind]


def share(kind: str, world: int) -> float:
    """Bytes that pass a rank, for each that it says."""
    return steps(kind, world) / world if kind == "all_reduce" else steps(kind, world)


def fit(kind: str, hop_s: float, measured: dict[int, Sequence[float]]) -> Cost:
    """What a kind of call costs, from calls between two ranks: the line of least relative errors through the medians.

    Args:
        kind: of call.
        hop_s: of a small message.
        measured: seconds of the calls, from when the last rank came until the last one left, by their bytes.
    """
    sizes = np.array(list(measured), np.float64)
    medians = np.array([np.median(seconds) for seconds in measured.values()])
    terms = np.stack([np.ones_like(sizes), sizes * share(kind, 2)], 1) / medians[:, None]
    [constant, byte_s], *_ = np.linalg.lstsq(terms, np.ones_like(medians), rcond=None)
    # two numbers of noise where bytes hardly count
    if byte_s < 0:
        constant, byte_s = 1 / np.mean(1 / medians), 0.0
    late = {size: np.array(seconds) - np.median(seconds) for size, seconds in measured.items()}
    return Cost(max(0.0, float(constant) - steps(kind, 2) * hop_s), float(byte_s), late)


def message_s(kind: str, size: int, world: int, network: Network, gloo: Gloo) -> float:
    """Seconds from when the last rank comes to a call until it is done.

    Args:
        kind: of call.
        size: bytes that a rank says.
        world: ranks, W.
        network: between them.
        gloo: what its calls cost.
    """
    if network.nccl and kind != "all_gather":
        return _nccl_s(kind, size, world, network)
    cost = gloo.costs[kind]
    byte_s = max(cost.byte_s, 1 / network.bytes_per_s)
    return cost.fixed_s + steps(kind, world) * (gloo.hop_s + network.hop_s) + share(kind, world) * size * byte_s


def _nccl_s(kind: str, size: int, world: int, network: Network) -> float:
    """A call, as long as a hop, and what it takes on the way; a broadcast runs down the ring once."""
    if kind == "broadcast":
        return world * network.hop_s + size / network.bytes_per_s
    ring = steps(kind, world) * network.hop_s + share(kind, world) * size / network.bytes_per_s
    tree = 2 * math.ceil(math.log2(world)) * network.hop_s + 2 * size / network.bytes_per_s
    return network.hop_s + min(ring, tree)


@dataclass(frozen=True)
class Prediction:
    """What an iteration of W ranks would be.

    Attributes:
        iteration_s: seconds, in the mean.
        compute_s: of it, what a rank itself does.
        message_s: of it, what the calls take once all ranks have come.
        latency_s: of an update, from the end of the one before, or from the batch: mean.
        latency_p99_s: and what 99 of 100 updates stay below.
    """

    iteration_s: float
    compute_s: float
    message_s: float
    latency_s: float
    latency_p99_s: float

    @property
    def waiting_s(self) -> float:
        """Of an iteration, what a rank waits for slower ones."""
        return max(0.0, self.iteration_s - self.compute_s - self.message_s)


def simulate(trace: Trace, world: int, draw: Draw, rng: np.random.Generator) -> Prediction:
    """Play iterations in which every rank computes as in one that was measured, and all wait for the last at each call.

    Args:
        trace: of one rank, with calls that cost nothing.
        world: ranks, W.
        draw: seconds of a call in `ITERATIONS` iterations, (ITERATIONS,) or (1,), for its kind and bytes.
        rng: which iteration each rank has, and when.
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
    """What draws the seconds of calls: the model's, and on top how late measured ones were."""

    def draw(kind: str, size: int) -> NDArray[np.float64]:
        cost = message_s(kind, size, world, network, gloo)
        if network.nccl and kind != "all_gather":
            return np.full(ITERATIONS, cost)
        # early ones may have been of another size
        return np.maximum(cost + rng.choice(gloo.costs[kind].late(size), ITERATIONS), 0.0)

    return draw


def halved_at(efficiencies: dict[int, float]) -> int | None:
    """The first number of ranks that make less than half of so many single ones, if any."""
    return next((world for world, value in sorted(efficiencies.items()) if value < 0.5), None)
