"""Two hosts: a rank on each of two, and a network that can fail."""

import os
import re
import signal
from dataclasses import dataclass

import pytest
from hosts import TwoHostRun, ip, obstacle, two_hosts
from runs import differences, load, play

pytestmark = [pytest.mark.faults, pytest.mark.skipif(bool(obstacle()), reason=obstacle())]
# 200 iterations an epoch, each of two env steps and, but for the first 63, one update
EPOCH = 400
JOB = (
    "fit --trainer.accelerator cpu --trainer.devices 1 --trainer.num_nodes 2 --trainer.logger false --video.episodes 0 "
    f"--model.compile false --data.epoch_env_steps {EPOCH} --data.eval_episodes 2"
).split()
DDP = ["--trainer.strategy", "ddp"]
# start-up and saves have to be done within that time too
PATIENCE_SECONDS = 30
IMPATIENT = ["--trainer.strategy", "DDPStrategy", "--trainer.strategy.timeout", f"0:00:{PATIENCE_SECONDS}"]
# each host sends the other at least this for an update: a gradient of the MLP 4-128-128-2
GRADIENT_BYTES = 4 * (4 * 128 + 128 + 128 * 128 + 128 + 128 * 2 + 2)
# of a rank; torchrun shows one of its own for all but success
TRACEBACK = re.compile(r"^\[rank\d\]: ", re.M)


def terminate(run, hosts):
    run.agents[1].send_signal(signal.SIGTERM)


def press_ctrl_c(run, hosts):
    """As a terminal does, to all of its foreground; torchrun has its workers elsewhere, and passes it on."""
    os.killpg(run.agents[0].pid, signal.SIGINT)


def kill_first_host(run, hosts):
    hosts[0].kill()


def lose_second_host(run, hosts):
    """As if its power failed: it can't even say that it is gone."""
    hosts[1].connect(False)
    hosts[1].kill()


STOPS = {"SIGTERM": terminate, "SIGINT": press_ctrl_c, "death": kill_first_host, "silence": lose_second_host}


@dataclass
class Ended:
    """How a run ended, on both hosts in their order, and what it left."""

    codes: list[int]
    seconds: list[float]
    texts: list[str]
    sent_bytes: list[int]
    processes: list[list[int]]
    # the last checkpoint, and the shard of the second rank
    saved: list[dict]

    @property
    def env_steps(self):
        """Of each rank, and of both."""
        own = [state["DQNDataModule"]["train"] for state in self.saved]
        return own[0]["env_steps"], own[1]["env_steps"], own[0]["all_env_steps"]


class Runs:
    """A run that is stopped repeatedly, and resumes from its last checkpoint."""

    def __init__(self, hosts, folder):
        self.hosts = hosts
        self.folder = folder

    def last(self):
        """The last checkpoint, and when it was saved."""
        found = self.folder.glob("runs/*/*/checkpoints/last.ckpt")
        return next(((path, path.stat().st_mtime_ns) for path in found), None)

    def start(self, name, *words, max_epochs=5000, stop=None, rendezvous="static"):
        """Start or resume, and stop a quarter of an epoch after a new checkpoint, or nowhere."""
        there = self.last()
        words = [*JOB, "--trainer.max_epochs", str(max_epochs), *words]
        words += ["--ckpt_path", str(there[0])] if there else []
        before = [host.sent_bytes() for host in self.hosts]
        run = TwoHostRun(self.hosts, self.folder, name, words, rendezvous)
        try:
            if stop:
                run.wait_for(lambda: self.last() != there)
                then = self.hosts[0].sent_bytes()
                run.wait_for(lambda: self.hosts[0].sent_bytes() > then + EPOCH // 8 * GRADIENT_BYTES)
                stop(run, self.hosts)
            codes, seconds = zip(*run.wait(), strict=True)
            saved = load(self.last()[0])
            return Ended(
                list(codes),
                list(seconds),
                run.texts,
                [host.sent_bytes() - sent for host, sent in zip(self.hosts, before, strict=True)],
                [host.pids() for host in self.hosts],
                [saved, load(saved.pop("shares")[0])],
            )
        finally:
            run.kill()
            self.hosts[1].connect()


@pytest.fixture(scope="module")
def hosts():
    with two_hosts() as both:
        yield both


@pytest.fixture(scope="module")
def stopped(hosts, tmp_path_factory):
    """How a run ended that was stopped in every way, one after the other, and then went on to its end."""
    runs = Runs(hosts, tmp_path_factory.mktemp("stopped"))
    ends = {}
    for name, stop in STOPS.items():
        ends[name] = runs.start(name, *(IMPATIENT if name == "silence" else DDP), stop=stop)
    epochs = ends["silence"].env_steps[-1] // EPOCH + 1
    ends["end"] = runs.start("end", *DDP, max_epochs=epochs)
    return ends


@pytest.fixture(scope="module")
def unstopped(hosts, stopped, tmp_path_factory):
    """How a run of the same length ended that nobody disturbed, and whose hosts met in another way."""
    epochs = stopped["end"].saved[0]["epoch"] + 1
    return Runs(hosts, tmp_path_factory.mktemp("unstopped")).start("whole", *DDP, max_epochs=epochs, rendezvous="c10d")


def test_two_hosts_train_together(unstopped):
    assert unstopped.codes == [0, 0], unstopped.texts
    assert "Starting with 2 processes" in unstopped.texts[0]
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in unstopped.texts[1]
    one, other, both = unstopped.env_steps
    assert one == other == both / 2
    assert f"Finished: {both:,} env steps, {unstopped.saved[0]['global_step']:,} updates" in unstopped.texts[0]
    # each played for itself, and no gradient found another way than over the wire
    first, second = (saved["DQNDataModule"]["train"] for saved in unstopped.saved)
    assert {".rng.state.state", ".memory.rows.observation"} < set(differences(first, second))
    assert min(unstopped.sent_bytes) > unstopped.saved[0]["global_step"] * GRADIENT_BYTES > 10 * 2**20


# torchrun ends with 1 where it was sent a signal, and where a rank ended with its number; the second rank does not
@pytest.mark.parametrize(("signum", "codes"), [("SIGTERM", [1, 1]), ("SIGINT", [1, 0])])
def test_a_stop_of_one_host_is_a_stop_of_both_and_loses_nothing(stopped, signum, codes):
    end = stopped[signum]
    assert end.codes == codes
    assert end.processes == [[], []]
    # before torchrun's patience of 30 s is over
    assert max(end.seconds) < 30
    reported = re.findall(rf"Stopped by {signum} at ([\d,]+) env steps", end.texts[0])
    one, other, both = end.env_steps
    assert one == other == both / 2
    assert reported == [f"{both:,}"], end.texts
    assert not TRACEBACK.search("".join(end.texts))
    assert both % EPOCH > EPOCH // 8


def test_the_crash_of_a_host_ends_the_other_within_a_minute(stopped):
    end = stopped["death"]
    assert end.codes == [-signal.SIGKILL, 1]
    assert end.processes == [[], []]
    assert max(end.seconds) < 60
    assert "rank 1: a peer has exited" in end.texts[1]
    assert not TRACEBACK.search(end.texts[1])
    # nothing was saved from the middle of an epoch, and what was there is whole
    assert end.env_steps[-1] % EPOCH == 0


def test_an_unresponsive_host_ends_the_other_after_the_timeout(stopped):
    end = stopped["silence"]
    assert end.codes == [1, -signal.SIGKILL]
    assert end.processes == [[], []]
    assert PATIENCE_SECONDS - 5 < end.seconds[0] < 60
    assert "rank 0: a peer has exited or is unreachable" in end.texts[0]
    assert end.env_steps[-1] % EPOCH == 0


def test_all_that_was_stopped_resumes_exactly(stopped, unstopped):
    assert stopped["end"].codes == [0, 0], stopped["end"].texts
    previous = [end.env_steps[-1] for end in stopped.values()]
    for name, env_steps in zip([*STOPS, "end"][1:], previous, strict=False):
        assert f"Resumed at {env_steps} env steps" in stopped[name].texts[0]
    for one, other in zip(stopped["end"].saved, unstopped.saved, strict=True):
        assert list(differences(one, other)) == []
        # the second rank's share does not say which environment it is of
        assert play({**stopped["end"].saved[0], **one}) == play({**unstopped.saved[0], **other})
    assert unstopped.saved[0]["global_step"] > 500


def test_hosts_are_gone_with_all_that_runs_there_whatever_happens():
    seen = []

    def interrupted():
        with two_hosts() as hosts:
            sleeper = hosts[1].start(["sleep", "1000"])
            seen.extend([host.name for host in hosts])
            assert set(seen) <= set(ip("netns").split())
            while not hosts[1].pids():
                assert sleeper.poll() is None
            seen.append(sleeper)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    *names, sleeper = seen
    assert sleeper.wait(10) == -signal.SIGKILL
    assert not set(names) & set(ip("netns").split())
