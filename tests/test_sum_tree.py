"""The sum tree in both its forms, against a list and a loop."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dqn import PrioritizedSampler
from lightning_dqn.sampling.compiled_tree import CompiledTree, load_library, make_tree
from lightning_dqn.sampling.sum_tree import SumTree

FORMS = [SumTree, CompiledTree]
SMALLEST = float(np.nextafter(0, 1))


def leaf_of(leaves, point):
    """By a loop: the first leaf that is not 0 and whose end is above the point, or the last of them."""
    end, found = 0.0, -1
    for row, value in enumerate(leaves):
        if value > 0 and (found < 0 or point >= end):
            found = row
        end += value
    return found


@st.composite
def moves(draw, numbers):
    size = draw(st.integers(1, 40))
    rows = st.lists(st.integers(0, size - 1), min_size=1, max_size=12)
    move = st.one_of(
        st.tuples(st.just("fill"), rows, st.one_of(st.just(0.0), numbers)),
        st.tuples(st.just("change"), rows, st.lists(numbers, min_size=12, max_size=12)),
    )
    return size, draw(st.lists(move, max_size=25))


def play(tree, plain, move):
    """One change of a tree and of a list."""
    kind, rows, numbers = move
    if kind == "fill":
        tree.fill(np.array(rows), numbers)
        for row in rows:
            plain[row] = numbers
    else:
        tree.change(np.array(rows), np.array(numbers[: len(rows)]))
        for row, number in [(row, number) for row, number in zip(rows, numbers, strict=False) if plain[row] > 0]:
            plain[row] = number


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=150, deadline=None)
# whole numbers have exact sums, in whatever order
@given(drawn=moves(st.integers(1, 1000).map(float)), shares=st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_a_tree_is_a_list_and_a_loop(form, drawn, shares):
    size, sequence = drawn
    tree, plain = form(size), [0.0] * size
    for move in sequence:
        play(tree, plain, move)
        assert tree.leaves.tolist() == plain
        assert tree.total() == sum(plain)
        if tree.total() > 0:
            # between whole numbers too: no point is equal to an end that a sum would round
            points = np.array([*shares, 0.0, 1.0]) * tree.total()
            rows, values = tree.find(points)
            assert rows.tolist() == [leaf_of(plain, point) for point in points]
            assert values.tolist() == [plain[row] for row in rows]


@settings(max_examples=200, deadline=None)
@given(moves(st.floats(1e-9, 1e9)), st.lists(st.floats(0, 1), min_size=1, max_size=300))
def test_both_forms_are_the_same_bitwise(drawn, shares):
    size, sequence = drawn
    plain, compiled = (form(size) for form in FORMS)
    for kind, rows, numbers in sequence:
        for tree in (plain, compiled):
            if kind == "fill":
                tree.fill(np.array(rows), numbers)
            else:
                tree.change(np.array(rows), np.array(numbers[: len(rows)]))
        assert plain.nodes.tobytes() == compiled.nodes.tobytes()
        if plain.total() > 0:
            one, other = (tree.find(np.array(shares) * plain.total()) for tree in (plain, compiled))
            assert [part.tobytes() for part in one] == [part.tobytes() for part in other]
            assert [part.dtype for part in one] == [part.dtype for part in other]


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1e12)), min_size=1, max_size=70).filter(any))
def test_a_leaf_that_is_0_is_never_found_at_whatever_point(form, leaves):
    tree = form(len(leaves))
    tree.load(np.array(leaves))
    ends = np.cumsum(leaves)
    around = np.concatenate([ends, np.nextafter(ends, 0), np.nextafter(ends, np.inf), [0.0, tree.total(), SMALLEST]])
    rows, values = tree.find(np.minimum(around, tree.total()))
    assert (values > 0).all()
    assert [leaves[row] for row in rows] == values.tolist()


@pytest.mark.parametrize("form", FORMS)
def test_many_changes_leave_no_rounding_error_behind(form):
    rng = np.random.default_rng(0)
    tree, fresh = form(1000), SumTree(1000)
    tree.fill(np.arange(1000), 1.0)
    for _ in range(3_000):
        tree.change(rng.integers(1000, size=100), 10.0 ** rng.uniform(-9, 9, 100))
    fresh.load(tree.leaves)
    assert tree.nodes.tobytes() == fresh.nodes.tobytes()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("row", [-1, 5, 10**12])
def test_rows_that_are_none_are_rejected_and_nothing_is_written(form, row):
    tree = form(5)
    tree.fill(np.arange(5), 1.0)
    before = tree.nodes.copy()
    for change in (lambda: tree.fill(np.array([2, row]), 9.0), lambda: tree.change(np.array([2, row]), np.ones(2))):
        with pytest.raises(IndexError, match=r"\[0, 5\)"):
            change()
    assert tree.nodes.tobytes() == before.tobytes()


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without one, in a process that has not compiled yet."""
    load_library.cache_clear()
    monkeypatch.setenv("CXX", "/nowhere/g++")
    yield
    load_library.cache_clear()


def test_without_a_compiler_the_tree_is_plain_and_is_reported_in_one_line(no_compiler, caplog):
    with caplog.at_level(logging.INFO):
        assert type(make_tree(3)) is SumTree
    [line] = [record.getMessage() for record in caplog.records]
    assert "/nowhere/g++" in line
    assert "\n" not in line


@pytest.mark.parametrize("script", ["exit 1", "echo not a library > ${@: -1}"])
def test_a_compiler_that_fails_is_none(no_compiler, monkeypatch, tmp_path, script):
    broken = tmp_path / "g++"
    broken.write_text(f"#!/bin/bash\n{script}\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert type(make_tree(3)) is SumTree


def test_with_a_compiler_the_tree_is_compiled():
    assert type(make_tree(3)) is CompiledTree


def test_nothing_is_compiled_before_a_row_enters(monkeypatch):
    made = []
    monkeypatch.setattr("lightning_dqn.sampling.prioritized.make_tree", lambda size: made.append(size) or SumTree(size))
    sampler = PrioritizedSampler(10, 0)
    assert len(sampler) == 0
    sampler.drop_oldest(0)
    sampler.state_dict()
    assert made == []
    sampler.add(np.array([0]))
    assert made == [10]
