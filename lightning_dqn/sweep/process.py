"""Runs the trials' processes, one after the other, and passes on the signals that would stop a sweep."""

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

# what says in a log why a process ended: a line of `exit_with_error`, or the end of a traceback
REASON = re.compile(r"error: (.*)|((?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?:: .*)?)")


class TrialProcess:
    """The process of the trial under way.

    It has a process group of its own, with its other ranks. A Ctrl-C reaches only us, and the trial from us: once and
    not twice, which would make it leave without a checkpoint. A second one kills it, whatever it waits for.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "TrialProcess":
        """Take the signals over."""
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # ignored is what `nohup`, and a shell for its background jobs, give us
            if signal.getsignal(signum) != signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Give them back; a process that still runs ends."""
        if self._process is not None:
            self._pass_on(signal.SIGKILL)
            self._process.wait()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def run(self, command: list[str], environment: dict[str, str], log: Path) -> int:
        """Run a command to its end.

        Args:
            command: with its arguments.
            environment: of the process.
            log: file that takes all it says.

        Returns:
            Its exit code; of a process that was killed, the negative number of the signal.
        """
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
            if self.received is not None:
                self._pass_on(self.received)
            code = self._process.wait()
        self._process = None
        return code

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self._pass_on(signal.SIGKILL)
            return
        self.received = signum
        # past Python's buffers, in which the signal may have found us
        os.write(2, b"\nThe trial saves its state and stops; Ctrl-C once more kills it\n")
        self._pass_on(signum)

    def _pass_on(self, signum: int) -> None:
        """To the whole group; a trial knows nothing of a terminal that is closed."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM if signum == signal.SIGHUP else signum)


def reason(code: int, log: Path) -> str:
    """Why a process failed, in a line.

    Args:
        code: it ended with.
        log: what it said.
    """
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        return f"stopped by {signal.Signals(code - 128).name}"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for line in reversed(lines):
        found = REASON.fullmatch(line)
        if found:
            return found[1] or found[2]
    return lines[-1] if lines else f"exit code {code}"
