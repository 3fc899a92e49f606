"""Plain forms of arguments: what stays, and digests of the rest."""

import enum
import subprocess
import sys

import numpy as np
import pytest
import torch

from lightning_dqn.resume.plain_form import plain_form
from lightning_dqn.resume.serializable import check_serializable


class Level(enum.IntEnum):
    EASY = 1


class Name(enum.StrEnum):
    HERE = "here"


class Thing:
    pass


def same(one, other):
    """Whether two plain values are equal in types too."""
    return repr(one) == repr(other)


@pytest.mark.parametrize(
    "value",
    [None, True, 3, -(2**2038), 0.5, -0.0, float("nan"), "a", [1, (2, [])], {"a": {1: 2, (0, "b"): None, None: 1.5}}],
    ids=repr,
)
def test_plain_values_stay(value):
    assert same(plain_form(value), value)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float64(0.5), 0.5),
        (np.float32(-0.0), -0.0),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (Level.EASY, 1),
        (Name.HERE, "here"),
        ({np.int64(1): (np.float64(2), [np.bool_(False)])}, {1: (2.0, [False])}),
    ],
    ids=repr,
)
def test_numpy_scalars_and_enums_become_python_values(value, plain):
    assert same(plain_form(value), plain)


OTHERS = {
    "array": np.arange(3),
    "other dtype": np.arange(3, dtype=np.int32),
    "other shape": np.arange(3)[None],
    "other content": np.array([0, 1, 3]),
    "object array": np.array([1, "a", Thing()], object),
    "other object array": np.array([2, "a", Thing()], object),
    "dates": np.array(["2020-01-01"], "M8[D]"),
    "records": np.zeros(2, [("a", "i4"), ("b", "f8")]),
    "empty": np.zeros((0, 4)),
    "scalar": np.array(3),
    "long double": np.longdouble(3),
    "tensor": torch.arange(3),
    "other tensor": torch.tensor([0, 1, 3]),
    "half": torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
    "sparse": torch.eye(2).to_sparse(),
    "bytes": b"a",
    "complex": 1j,
    "large": 1 << 2039,
    "set": {"a", "b", (1, 2)},
    "other set": {"a", "b"},
    "object": Thing(),
    "class": Thing,
    "function": same,
    "other function": plain_form,
    "object as key": {Thing(): 1},
}


def test_the_rest_becomes_digests_that_differ_and_can_be_saved():
    forms = plain_form(OTHERS)
    digests = [form["digest"] for form in forms.values()]
    assert len(set(digests)) == len(OTHERS)
    assert forms["array"]["digest"].startswith("numpy.ndarray sha256:")
    check_serializable(forms)


def test_the_order_of_memory_does_not_matter():
    array = np.arange(200_000.0).reshape(2, 100_000)
    views = [array.copy(order="F"), np.repeat(array, 2, axis=1)[:, ::2], array[:, ::-1].copy()[:, ::-1]]
    assert all(plain_form(view) == plain_form(array) for view in views)
    assert plain_form(array[:, ::-1]) != plain_form(array)


@pytest.mark.integration
def test_digests_are_the_same_in_every_process():
    import_self = "from tests.test_plain import OTHERS, plain_form; print(plain_form(OTHERS))"
    command = [sys.executable, "-c", import_self]
    shown = {
        subprocess.run(
            command,
            env={"PYTHONHASHSEED": str(seed), "PYTHONPATH": ":".join(sys.path)},
            text=True,
            capture_output=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(shown) == 1


def test_containers_within_themselves_end():
    cycle = [1]
    cycle.append({"again": cycle})
    array = np.empty(1, object)
    array[0] = [array]
    frozen = plain_form({"cycle": cycle, "array": array})
    assert frozen["cycle"][0] == 1
    assert frozen["cycle"][1]["again"]["digest"].startswith("builtins.list sha256:")


LARGE = """
import resource
import numpy as np
from lightning_dqn.resume.plain_form import plain_form

array = np.ones((2**11, 2**13))  # 128 MB
kilobytes = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = kilobytes()
for view in (array, array.T, array[:, ::2]):
    plain_form({"prices": view})
print(kilobytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems count in other units")
@pytest.mark.integration
def test_a_large_array_is_hashed_without_a_copy():
    shown = subprocess.run([sys.executable, "-c", LARGE], text=True, capture_output=True, check=True).stdout
    assert int(shown) < 20_000
