"""The simulation of many ranks: what calls cost, and what it costs to wait for the slowest."""

import math

import numpy as np
import pytest

from benchmarks.scaling import report
from benchmarks.scaling.model import (
    ITERATIONS,
    Cost,
    Gloo,
    Network,
    drawing,
    fit,
    halved_at,
    message_s,
    share,
    simulate,
    steps,
)
from benchmarks.scaling.trace import BATCH, UPDATE, Trace

US = 1e-6
# a hop of 10 us, 100 us of each call, 1 GB/s
GLOO = Gloo(10 * US, {kind: Cost(100 * US, 1e-9) for kind in ("all_reduce", "all_gather", "broadcast")})
HERE = Network("here", 0.0, math.inf, nccl=False, source="")
DEVICES = Network("devices", 10 * US, 1e9, nccl=True, source="")


def a_trace(gaps, events):
    """A rank that was busy so many seconds before each event, (I, E), and never waited."""
    gaps = np.array(gaps, np.float64)
    entered = np.cumsum(gaps, 1)
    return Trace(events, np.zeros(len(gaps)), entered, entered)


# 2 ms of play; two updates of 1 ms, which send 1,000 bytes 600 us after they begin
EVENTS = [(BATCH, 0), *[("all_reduce", 1000), (UPDATE, 0)] * 2, ("broadcast", 8), ("all_gather", 32)]
STEADY = [0.0, 600 * US, 400 * US, 600 * US, 400 * US, 500 * US, 1500 * US]


def rng():
    return np.random.default_rng(0)


def test_a_network_adds_to_each_hop_and_bounds_the_bandwidth():
    # 2 (4 - 1) hops of 10 + 50 us; 1.5 x 1,000 bytes at 8 ns, not at the 1 ns of this machine
    ethernet = Network("ethernet", 50 * US, 1.25e8, nccl=False, source="")
    assert message_s("all_reduce", 1000, 4, ethernet, GLOO) == pytest.approx((100 + 6 * 60 + 12) * US)


def test_devices_take_a_tree_where_a_ring_is_too_long_and_meet_on_cpus():
    # a call of 10 us; 4 ranks: a ring of 6 hops and 1.5 us, a tree of 4 hops and 2 us
    assert message_s("all_reduce", 1000, 4, DEVICES, GLOO) == pytest.approx((10 + 40 + 2) * US)
    # 1 MB: 60 + 1,500 us by the ring, 40 + 2,000 by the tree
    assert message_s("all_reduce", 1_000_000, 4, DEVICES, GLOO) == pytest.approx((10 + 60 + 1500) * US)
    # once down the ring
    assert message_s("broadcast", 1000, 4, DEVICES, GLOO) == pytest.approx((10 + 30 + 1) * US)
    # gloo's, with the hops of that network
    assert message_s("all_gather", 1000, 4, DEVICES, GLOO) == pytest.approx((100 + 3 * 20 + 3) * US)


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "broadcast"])
def test_the_fit_finds_the_latency_and_the_bandwidth_that_timings_were_made_of(kind):
    noise = np.random.default_rng(1)
    measured = {
        size: (80 + steps(kind, 2) * 25 + share(kind, 2) * size / 500) * US * noise.uniform(0.9, 1.1, 301)
        for size in (64, 4_096, 65_536, 1_048_576, 6_750_000)
    }
    cost = fit(kind, 25 * US, measured)
    assert cost.fixed_s == pytest.approx(80 * US, rel=0.05)
    assert 1 / cost.byte_s == pytest.approx(500e6, rel=0.05)
    # as late as the noise makes them, for calls of about that size
    assert np.abs(cost.late(5_000)).max() < 0.11 * (80 + 50 + 4_096 / 500) * US
    assert cost.late(8_000_000).std() > 10 * cost.late(64).std()


@pytest.mark.parametrize(
    ("world", "messages_us"),
    [
        # two all-reduces of 121 us, a broadcast of 110.008 us, a meeting of 110.032 us
        (2, 2 * 121 + 110.008 + 110.032),
        # of 161.5, 120.016 and 130.096 us
        (4, 2 * 161.5 + 120.016 + 130.096),
    ],
)
def test_an_iteration_of_equal_ranks_is_what_they_compute_and_say(world, messages_us):
    found = simulate(a_trace([STEADY], EVENTS), world, drawing(world, HERE, GLOO, rng()), rng())
    assert found.compute_s == pytest.approx(4000 * US)
    assert found.message_s == pytest.approx(messages_us * US)
    assert found.iteration_s == pytest.approx((4000 + messages_us) * US)
    # nobody waits for anybody
    assert found.waiting_s == pytest.approx(0.0, abs=1e-12)
    # an update is its 1 ms and its all-reduce
    all_reduce_s = message_s("all_reduce", 1000, world, HERE, GLOO)
    assert found.latency_s == pytest.approx(1000 * US + all_reduce_s)
    assert found.latency_p99_s == pytest.approx(found.latency_s)
    # one env step a rank in 4 ms and the messages, of both updates
    figures = report.Work(1.0, 2).figures(found, world, alone_s=4000 * US)
    assert figures["env_steps_per_s"] == pytest.approx(world / (4000e-6 + messages_us * US))
    assert figures["updates_per_s"] == pytest.approx(2 / (4000e-6 + messages_us * US))
    assert figures["efficiency"] == pytest.approx(4000 / (4000 + messages_us))


def test_one_rank_sends_nothing():
    def nobody(kind, size):
        raise AssertionError(kind)

    alone = a_trace([[1000 * US, 1000 * US, 2000 * US]], [(UPDATE, 0), (UPDATE, 0), (BATCH, 0)])
    found = simulate(alone, 1, nobody, rng())
    assert (found.iteration_s, found.message_s) == (pytest.approx(4000 * US), 0.0)
    assert found.waiting_s == pytest.approx(0.0, abs=1e-12)
    assert found.latency_s == pytest.approx(1000 * US)


def test_the_slowest_rank_decides():
    # half of all iterations take 3 ms longer: of two ranks, one at least in three quarters of them
    slow = [*STEADY[:-1], STEADY[-1] + 3000 * US]
    found = simulate(a_trace([STEADY, slow], EVENTS), 2, lambda kind, size: np.zeros(1), rng())
    assert found.compute_s == pytest.approx(5500 * US, rel=0.03)
    assert found.iteration_s == pytest.approx((4000 + 0.75 * 3000) * US, rel=0.03)
    assert found.waiting_s == pytest.approx(750 * US, rel=0.1)
    # of 64 nearly always
    of_many = simulate(a_trace([STEADY, slow], EVENTS), 64, lambda kind, size: np.zeros(1), rng())
    assert of_many.iteration_s == pytest.approx(7000 * US, rel=1e-6)


def test_calls_come_back_as_late_as_measured_ones():
    late = Gloo(10 * US, {"all_reduce": Cost(100 * US, 1e-9, {1000: np.array([0.0, 40 * US])})})
    seconds = drawing(2, HERE, late, rng())("all_reduce", 1000)
    assert seconds.shape == (ITERATIONS,)
    assert set(np.round(seconds / US)) == {121, 161}


def test_half_is_lost_where_efficiency_falls_below_it():
    assert halved_at({1: 1.0, 2: 0.8, 4: 0.5, 8: 0.4, 16: 0.3}) == 8
    assert halved_at({1: 1.0, 2: 0.8}) is None
