"""Two hosts on this machine, network namespaces that a veth pair joins, and runs that have a rank on each."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid

from conftest import clean_environment

# as a login shell of root would find it
IP = shutil.which("ip", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"]))
INTERFACE = "eth0"
# nobody has these: RFC 5737 keeps them for documentation
ADDRESSES = ("192.0.2.1", "192.0.2.2")


def obstacle():
    """Why there can be no hosts here; nothing where there can."""
    if not IP:
        return "there is no command `ip` (iproute2)"
    return "only root can make network namespaces" if os.geteuid() else ""


def ip(*words, check=True):
    """What a command of `ip` says."""
    done = subprocess.run([IP, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


class Host:
    """A network of its own: a loopback and one interface, whose other end is another host's."""

    def __init__(self, name, address):
        self.name = name
        self.address = address

    def start(self, words, *, cwd=None, env=None, output=None):
        """A process on this host, in a session of its own."""
        how = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, "start_new_session": True}
        return subprocess.Popen([IP, "netns", "exec", self.name, *words], cwd=cwd, env=env, **how)

    def pids(self):
        """Of all processes that live here."""
        return [int(pid) for pid in ip("netns", "pids", self.name, check=False).split()]

    def kill(self):
        """End all processes at once; the kernel still closes their connections."""
        end = time.monotonic() + 30
        while pids := self.pids():
            assert time.monotonic() < end, f"{self.name}: {pids} can't be killed"
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def connect(self, connected=True):
        """Plug the interface in, or pull it out, so that not a word of what happens here leaves the host."""
        ip("-n", self.name, "link", "set", INTERFACE, "up" if connected else "down")

    def sent_bytes(self):
        """Bytes that have left by the interface."""
        [shown] = json.loads(ip("-n", self.name, "-s", "-j", "link", "show", INTERFACE))
        return shown["stats64"]["tx"]["bytes"]

    def remove(self):
        """Leave nothing of it."""
        try:
            self.kill()
        finally:
            ip("netns", "del", self.name, check=False)


@contextlib.contextmanager
def two_hosts():
    """Two hosts that reach each other and nothing else; gone with all that runs there, whatever happens."""
    unique = uuid.uuid4().hex[:8]
    hosts = [Host(f"lightning-dqn-{unique}-{n}", address) for n, address in enumerate(ADDRESSES)]
    one, other = hosts
    with contextlib.ExitStack() as stack:
        for host in hosts:
            stack.callback(host.remove)
            ip("netns", "add", host.name)
        ends = "name", INTERFACE, "netns", one.name, "type", "veth", "peer", "name", INTERFACE, "netns", other.name
        ip("link", "add", *ends)
        for host in hosts:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            ip("-n", host.name, "link", "set", "lo", "up")
            host.connect()
        yield hosts


class TwoHostRun:
    """`python -m lightning_dqn` with a rank on each host, started by a torchrun on each.

    Args:
        hosts: two.
        folder: that both work in.
        name: of this start; the outputs are called so.
        words: of the command line.
        rendezvous: of torchrun, static or c10d.
    """

    def __init__(self, hosts, folder, name, words, rendezvous="static"):
        # gloo would ask for the address of the machine's name, which does not lead to this interface
        env = clean_environment(folder, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME=INTERFACE)
        self.hosts = hosts
        self.outputs = [folder / f"{name}-{rank}.txt" for rank in range(2)]
        self.agents = []
        for rank, host in enumerate(hosts):
            meeting = {
                "static": f"--node_rank {rank} --master_addr {ADDRESSES[0]} --master_port 29500",
                "c10d": f"--rdzv_backend c10d --rdzv_endpoint {ADDRESSES[0]}:29500 --rdzv_id {name} "
                f"--rdzv_conf is_host={1 - rank} --local_addr {host.address}",
            }[rendezvous]
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
            command = [*torchrun, *meeting.split(), "-m", "lightning_dqn", *words]
            with self.outputs[rank].open("w") as output:
                self.agents.append(host.start(command, cwd=folder, env=env, output=output))

    @property
    def texts(self):
        """The output of each host."""
        return [output.read_text() for output in self.outputs]

    def wait(self, timeout_s=180):
        """Until both have ended: their exit codes, and the seconds that each took from now."""
        begun = time.monotonic()
        ended = {}
        while len(ended) < 2:
            seconds = time.monotonic() - begun
            assert seconds < timeout_s, "\n".join(self.texts)
            for rank, agent in enumerate(self.agents):
                if rank not in ended and agent.poll() is not None:
                    ended[rank] = agent.returncode, seconds
            time.sleep(0.05)
        return [ended[rank] for rank in range(2)]

    def wait_for(self, condition, timeout_s=180):
        """What a condition finds, once it finds something, while both run."""
        end = time.monotonic() + timeout_s
        while not (found := condition()):
            assert time.monotonic() < end, "\n".join(self.texts)
            assert [agent.poll() for agent in self.agents] == [None, None], "\n".join(self.texts)
            time.sleep(0.02)
        return found

    def kill(self):
        """End what is left of it."""
        for host in self.hosts:
            host.kill()
        for agent in self.agents:
            agent.wait()
