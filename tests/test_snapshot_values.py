"""What snapshots are made of: any plain value comes back as it was, in place, and all else is refused by name."""

import itertools
import random
import socket
import threading
from collections import OrderedDict, deque
from enum import Enum

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import through_a_checkpoint, toys

from lightning_dqn.snapshots import CannotRestoreError, CannotSnapshotError, restore, snapshot


def restored(value, blank=None):
    """What `value` of one environment is in another, made with `blank` in its stead."""
    again = toys(blank)
    restore(again, through_a_checkpoint(snapshot(toys(value))))
    return again.envs[0].value


def same(a, b):
    """Equal in types and values, to the bit and in order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple, deque, set, frozenset, dict)):
        items, others = ([*(x.items() if isinstance(x, dict) else x)] for x in (a, b))
        equal = len(items) == len(others) and all(map(same, items, others))
        return equal and getattr(a, "maxlen", 0) == getattr(b, "maxlen", 0)
    if isinstance(a, np.ndarray):
        fields = ("dtype", "shape", "strides")
        equal = all(getattr(a, field) == getattr(b, field) for field in fields)
        return equal and (same([*a.flat], [*b.flat]) if a.dtype == object else a.tobytes() == b.tobytes())
    if isinstance(a, (float, np.generic)):
        return np.asarray(a).dtype == np.asarray(b).dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    return a == b


DTYPES = ["bool", "int8", "uint16", "int64", "uint64", "float16", "float32", "float64", "complex64", "U3", "S2", ">i4"]
numpy_scalars = st.sampled_from(
    [
        *(np.float64(-0.0), np.float16(np.inf), np.longdouble("0.1"), np.complex64(1j)),
        *(np.int64(-(2**63)), np.uint8(255), np.bool_(True), np.str_("é"), np.str_(""), np.bytes_(b"x")),
        np.datetime64("2020-01-01"),
    ]
)
arrays = st.builds(
    lambda dtype, shape, order: np.arange(np.prod(shape)).reshape(shape).astype(dtype, order=order),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.sampled_from("CF"),
)
hashable = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.complex_numbers(allow_nan=False),
    numpy_scalars,
)
keys = st.one_of(hashable, st.tuples(hashable, hashable))
values = st.recursive(
    st.one_of(hashable, st.sampled_from([float("nan"), np.float32(np.nan)]), arrays),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
        st.builds(deque, st.lists(inner, max_size=4), st.sampled_from([None, 3])),
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values)
def test_any_nested_plain_value_comes_back_as_it_was(value):
    assert same(restored(value), value)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**70), 2**70)), st.lists(st.tuples(st.integers(-3, 3), st.floats(-1, 1))))
def test_sets_come_back_in_their_order_or_are_refused(numbers, pairs):
    value = (set(numbers), frozenset(pairs))
    try:
        back = restored(value)
    except CannotSnapshotError:
        assert any([*type(part)([*part])] != [*part] for part in value)
    else:
        assert same(back, value)


def test_structured_and_object_arrays_come_back():
    records = np.zeros(3, dtype=[("position", "<f4", (2,)), ("alive", "?")])
    records["alive"][1] = True
    objects = np.array([None, "a", [1, 2]], dtype=object)
    back = restored({"records": records, "objects": objects})
    assert same(back["records"], records)
    assert same(back["objects"], objects)


def test_two_names_for_one_list_stay_two_names_for_one_list():
    inner = [1]
    cycle = {"inner": inner, "both": (inner, inner)}
    cycle["self"] = cycle
    back = restored(cycle)
    back["inner"].append(2)
    assert back["both"] == ([1, 2], [1, 2])
    assert back["self"] is back


def test_a_view_of_an_array_stays_a_view():
    board = np.arange(24).reshape(4, 6)
    middle = board[1:-1, ::-2]
    back = restored({"middle": middle, "board": board, "flat": board.ravel()})
    assert same(back["middle"], middle)
    back["board"][1, 5] = 100
    assert back["middle"][0, 0] == 100
    assert back["flat"][11] == 100
    # memory that nobody else can reach is not shared
    assert board[1, 5] == 11


def test_arrays_in_any_order_keep_their_layout():
    image = np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1)
    for value in (image, image.astype(np.float32), np.asfortranarray(np.ones((2, 3))), np.broadcast_to(1.0, (2, 2))):
        assert same(restored(value), value)
        assert restored(value).flags.writeable == value.flags.writeable


@pytest.mark.parametrize("name", ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"])
def test_numpy_generators_go_on_and_spawn_the_same(name):
    generator = np.random.Generator(getattr(np.random, name)(np.random.SeedSequence([1, 2], spawn_key=(5,))))
    generator.spawn(2)
    generator.integers(0, 9, size=3, dtype=np.uint8)
    sharing = np.random.Generator(generator.bit_generator)
    back, back_sharing = restored([generator, sharing])
    assert back.integers(2**60, size=5).tolist() == generator.integers(2**60, size=5).tolist()
    assert back_sharing.random() == sharing.random()
    assert back.spawn(1)[0].random() == generator.spawn(1)[0].random()


def test_generators_of_older_kinds_go_on():
    numpy_generator, python_generator = np.random.RandomState(3), random.Random(3)
    # the second of a pair of normal numbers is kept for the next call
    numpy_generator.standard_normal(3)
    python_generator.gauss(0, 1)
    back, python_back, normal = restored([numpy_generator, python_generator, numpy_generator.standard_normal])
    assert [back.standard_normal(), normal()] == numpy_generator.standard_normal(2).tolist()
    assert [python_back.gauss(0, 1) for _ in range(3)] == [python_generator.gauss(0, 1) for _ in range(3)]


class Phase(Enum):
    DAY = 1
    NIGHT = 2


class Agent:
    """A part of an environment that is no plain value."""

    def __init__(self, x):
        self.x = x
        self.friend = None


def test_objects_are_put_back_in_place_with_who_knows_whom():
    def parts():
        return {"agents": [Agent(0), Agent(1)], "phase": Phase.DAY, "reduce": np.max, "add": np.add, "kind": Agent}

    there, here = parts(), parts()
    one, two = there["agents"]
    one.friend, two.friend, one.x, two.path = two, two, 7, [1, 2]
    there["phase"] = Phase.NIGHT
    there["moves"] = one
    kept = list(here["agents"])
    back = restored(there, here)
    assert back["agents"] == kept
    assert back["moves"] is back["agents"][0]
    assert back["agents"][0].friend is back["agents"][1] is back["agents"][1].friend
    assert back["agents"][0].x == 7
    assert back["agents"][1].path == [1, 2]
    assert back["phase"] is Phase.NIGHT
    assert (back["reduce"], back["add"], back["kind"]) == (np.max, np.add, Agent)


def counting():
    """A function with a count in its closure."""
    count = 0

    def count_on():
        nonlocal count
        count += 1
        return count

    return count_on


def test_what_a_function_closes_over_is_put_back():
    function = counting()
    function()
    function()
    back = restored(function, counting())
    assert back() == 3
    assert function() == 3


def test_what_a_function_keeps_elsewhere_is_put_back():
    def remembering():
        def function(x, seen=[], *, marks={}):  # noqa: B006
            seen.append(x)
            marks[x] = True
            function.calls = len(seen)

        return function

    function, blank = remembering(), remembering()
    function(1)
    back = restored({"f": function, "seen": function.__defaults__[0]}, {"f": blank})
    back["f"](2)
    assert back["f"].calls == 2
    assert back["f"].__kwdefaults__ == {"marks": {1: True, 2: True}}
    assert back["seen"] == [1, 2]


class Slotted:
    """An object whose state is no attribute in `__dict__`."""

    __slots__ = ("__dict__", "count")

    def __init__(self):
        self.count = 0


class Sequence(list):
    """A list that may do as it likes."""


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (socket.socket, "socket.socket"),
        (threading.Lock, "_thread.lock"),
        (lambda: iter([1, 2]), "list_iterator"),
        (lambda: (i for i in range(3)), "generator"),
        (itertools.count, "itertools.count"),
        # their order is another one in the next process
        (lambda: {"a", "b"}, "builtins.set"),
        (Slotted, "Slotted"),
        (Sequence, "Sequence"),
        (lambda: memoryview(b"a"), "memoryview"),
        (lambda: [].append, "builtin_function_or_method"),
        (lambda: np.frombuffer(bytearray(4), np.uint8), "numpy.ndarray"),
        (lambda: np.array([{}, 1], dtype=object)[1:], "numpy.ndarray"),
        (lambda: np.zeros(2, dtype=[("a", "i4")])[0], "numpy.void"),
        (lambda: torch.zeros(1), "torch.Tensor"),
    ],
)
def test_what_can_not_be_written_down_is_refused_by_name(make, kind):
    value = make()
    envs = toys(None, {"deep": [0, value]})
    with pytest.raises(CannotSnapshotError) as refusal:
        snapshot(envs)
    assert "SyncVectorEnv.envs[1].value['deep'][1]" in str(refusal.value)
    assert kind in str(refusal.value)
    assert "plain values" in str(refusal.value)
    if isinstance(value, socket.socket):
        value.close()


def test_state_in_a_closure_that_can_not_be_written_down_is_refused():
    numbers = iter(range(3))
    with pytest.raises(CannotSnapshotError, match=r"envs\[0\]\.value\.numbers is a builtins\.range_iterator"):
        snapshot(toys(lambda: next(numbers)))


def test_an_object_without_a_counterpart_is_refused_and_nothing_is_written():
    again = toys([])
    again.reset(seed=1)
    before = snapshot(again)
    with pytest.raises(CannotRestoreError, match=r"value\[0\]: the snapshot has .*Agent there, .* have nothing"):
        restore(again, snapshot(toys([Agent(0)])))
    again.reset(seed=1)
    assert snapshot(again)["nodes"] == before["nodes"]


def test_stored_bytes_are_never_taken_for_objects():
    envs = toys(np.array([1]))
    state = snapshot(envs)
    forged = {**state, "nodes": state["nodes"].replace('"<i8"', '"|O"')}
    assert forged["nodes"] != state["nodes"]
    with pytest.raises(CannotRestoreError, match="forged"):
        restore(envs, forged)
