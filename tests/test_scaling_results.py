"""What the simulation of many ranks is made of: traces of real runs, and results that say what was counted."""

import json

import numpy as np
import pytest
import torch
from conftest import quiet_trainer
from torch import distributed

from benchmarks.launch import answers
from benchmarks.scaling import report, tables
from benchmarks.scaling.__main__ import place
from benchmarks.scaling.model import NETWORKS
from benchmarks.scaling.trace import BATCH, COLLECTIVES, UPDATE, Recorder, Trace, TraceClock
from benchmarks.settings import Job
from lightning_dqn import DQN, DQNDataModule, EpsilonDecay, SoftTargetUpdate

US = 1e-6


def test_a_trace_tells_work_from_calls(monkeypatch):
    def nothing(*args, **kwargs):
        return None

    for name in ("all_reduce", "all_gather", "broadcast"):
        monkeypatch.setattr(distributed, name, nothing)
    recorder = Recorder()
    recorder.listen()
    times = iter(range(100))
    monkeypatch.setattr("benchmarks.scaling.trace.time.perf_counter", lambda: float(next(times)))
    recorder.running = True
    for _ in range(3):
        recorder.mark(BATCH)
        distributed.all_reduce(torch.zeros(10))
        recorder.mark(UPDATE)
        distributed.all_gather([torch.zeros(4)], torch.zeros(4))
    trace = recorder.trace()
    # between two meetings: a moment each for a mark, two for a call
    assert trace.events == [(BATCH, 0), ("all_reduce", 40), (UPDATE, 0), ("all_gather", 16)]
    assert trace.gaps.tolist() == [[1.0] * 4] * 2
    assert trace.iteration_s == 6.0
    # from the batch's mark to the update's
    assert trace.latencies().tolist() == [3.0, 3.0]
    assert Trace.from_json(json.loads(json.dumps(trace.as_json()))).gaps.tolist() == trace.gaps.tolist()


def test_iterations_that_differ_are_rejected():
    recorder = Recorder()
    recorder.running = True
    for marks in ((BATCH, UPDATE), (BATCH, UPDATE), (BATCH, UPDATE, UPDATE), (BATCH,)):
        for name in marks:
            recorder.mark(name)
    with pytest.raises(RuntimeError, match="iterations made different calls"):
        recorder.trace()


def test_a_real_run_of_one_rank_is_traced():
    data = DQNDataModule(env_id="CartPole-v1", num_envs=2, updates_per_iteration=3, epoch_env_steps=10_000)
    model = DQN(data.observation_space, data.action_space, compile=False)
    recorder = Recorder()
    clock = TraceClock(recorder, skipped=5, measured=20)
    quiet_trainer(max_epochs=-1, limit_val_batches=0, callbacks=[SoftTargetUpdate(), EpsilonDecay(), clock]).fit(
        model, data
    )
    trace = recorder.trace()
    assert trace.events == [*[(UPDATE, 0)] * 3, (BATCH, 0)]
    # between 20 batches
    assert len(trace.begun) == 19
    # an iteration begins where the last one ended
    assert trace.begun[1:].tolist() == trace.left[:-1, -1].tolist()
    assert (trace.latencies() > 0).all()
    # to within the step of an environment
    assert clock.env_steps == pytest.approx(2.0, abs=0.1)


@pytest.mark.ranks
def test_a_rank_that_nobody_answers_makes_the_calls_of_one_of_two(tmp_path):
    job = Job(work="vector", scratch=str(tmp_path))
    [answer] = answers("benchmarks.scaling.processes:answered", [job], 300, [place(0, 2, 29_500)])
    trace = Trace.from_json(answer["notes"]["trace"])
    # 17,410 weights of 4 bytes in each of 16 updates; whether to stop, a number; four numbers of the meeting
    update = [("all_reduce", 69_640), (UPDATE, 0)]
    assert trace.events == [(BATCH, 0), *update * 16, ("broadcast", 8), ("all_gather", 32)]
    assert (trace.gaps > 0).all()
    # each call sleeps
    calls = [i for i, (name, _) in enumerate(trace.events) if name in COLLECTIVES]
    assert (trace.left - trace.entered)[:, calls].min() > 2e-4


# one update, of 1 ms and 200 us of messages, then play of 1.5 ms and a meeting of 200 us
SHORT = [(BATCH, 0), ("all_reduce", 1000), (UPDATE, 0), ("all_gather", 32)]


def answer(begun, entered_us, left_us, events, share=1.0):
    """What a process brings back that did the same iteration twice."""
    times = [np.array([row] * 2, np.float64) * US for row in (entered_us, left_us)]
    trace = Trace(events, np.full(2, begun), *times)
    notes = {"trace": trace.as_json(), "cpu_share": share}
    return {"figures": {"iteration_ms": trace.iteration_s * 1e3, "env_steps": 16.0}, "notes": notes}


@pytest.fixture
def found():
    """Results of one workload; of two ranks the second comes 100 us later to the all-reduce."""
    first = answer(0.0, [0, 600, 1300, 2800], [0, 900, 1300, 3000], SHORT)
    second = answer(0.0, [0, 700, 1300, 2800], [0, 900, 1300, 3000], SHORT)
    single = answer(0.0, [1000, 2500], [1000, 2500], [(UPDATE, 0), (BATCH, 0)])
    answered = answer(0.0, [0, 600, 1000, 2500], [0, 600, 1000, 2500], SHORT, share=0.5)
    spans = [{kind: {"64": [(0.0, 1e-4)] * 3, "65536": [(0.0, 2e-4)] * 3} for kind in COLLECTIVES} for _ in range(2)]
    measured = report.Measured(single, answered, [first, second])
    return json.loads(json.dumps(report.results({"vector": measured}, spans, 10 * US, {}, seed=0)))


def test_two_ranks_are_measured_in_the_terms_of_the_model(found):
    measured = {name: at["measured"] for name, at in found["workloads"]["vector"]["check"].items()}
    assert measured["iteration_ms"] == pytest.approx(3.0)
    assert measured["env_steps_per_s"] == pytest.approx(2 * 16 / 3e-3)
    assert measured["updates_per_s"] == pytest.approx(1 / 3e-3)
    assert measured["efficiency"] == pytest.approx(2.5 / 3.0)
    assert measured["update_ms"] == pytest.approx(1.3)
    # 2.5 and 2.6 ms; from when the last one came, 200 us each
    assert measured["compute_ms"] == pytest.approx(2.55)
    assert measured["messages_ms"] == pytest.approx(0.4)
    assert measured["waiting_ms"] == pytest.approx(0.05)


def test_the_check_states_how_far_the_prediction_is_off(found):
    check = found["workloads"]["vector"]["check"]
    # 1 ms, and what a call of 1,000 bytes takes where one of 64 takes 100 us and one of 65,536 takes 200
    predicted = check["update_ms"]["predicted"]
    assert 1.101 < predicted < 1.102
    assert check["update_ms"]["error"] == pytest.approx(predicted / 1.3 - 1)
    text = tables.check_table(found)
    assert "1.101 / 1.3 (-15%)" in text
    # nobody was late in the prediction
    assert "0 / 0.05 (-100%)" in text
    assert "a rank alone had 50% of its core's time" in text


def test_messages_are_counted_as_they_were_made(found):
    counted = found["workloads"]["vector"]["messages_per_iteration"]
    assert counted == [
        {"call": "all_reduce", "bytes": 1000, "count": 1},
        {"call": "all_gather", "bytes": 32, "count": 1},
    ]


def test_the_readme_s_table_states_where_half_is_lost_and_to_what(found):
    head, _, *lines = tables.markdown(found).splitlines()
    of_networks = lines[: len(NETWORKS)]
    assert len({line.count("|") for line in (head, *of_networks)}) == 1
    # 16 env steps in 2.5 ms
    assert all("| 6,400 (100%) |" in line for line in of_networks)
    assert of_networks[0].startswith("| CartPole, 16 envs, 16 updates | one machine |")
    # of 64: hops of 10 us, 126 of the all-reduce and 63 of the meeting, and 80 and 90 us besides; beside 2.5 ms
    assert "| never | 45%, 0% |" in of_networks[0]
    # 50 us more a hop: of 16 ranks 45 hops of 60 us, and the 170 us
    assert "| from 16 |" in of_networks[1]
    # 32 env steps in 3 ms, and 11,846 in 2.5 ms and twice 100 us
    assert "made 10,667 env steps/s (predicted: +11%), at 1.3 ms an update (predicted: -15%)." in " ".join(lines)
