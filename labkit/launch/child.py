"""One rank as a child process of its supervisor: fork, environment, and how it reports why it ended."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import Any, NoReturn

from labkit.experiment import Experiment, safe_files
from labkit.experiment.failures import message_of, own_words
from labkit.experiment.fault import TaskFault
from labkit.experiment.run_directory import EXIT_STOPPED, RunDirectory
from labkit.netem.hosts import Hosts
from labkit.runs.processes import die_with_parent

# Accelerate takes settings from these, e.g. accumulation, and would change the training behind the experiment's back.
_OF_ACCELERATE = ("ACCELERATE_", "PARALLELISM_CONFIG_", "FSDP_")
# A kernel may itself have been started by torchrun or under MPI; its place there is none of the rank's business.
_FROM_OTHER_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")


@dataclass
class Child:
    """A forked rank. `exit_code` and `signal` are known once it has been reaped."""

    rank: int
    pid: int
    pipe: int
    ended: float | None = None
    exit_code: int | None = None
    signal: int | None = None
    terminated: float | None = None
    """When the supervisor sent SIGTERM (monotonic seconds)."""
    report: dict[str, Any] | None = None
    """What the rank said about its exception."""

    left_early: bool = False
    """It ended with an exit code that means well before it was done, or before anybody asked it to stop."""

    @property
    def running(self) -> bool:
        return self.ended is None

    @property
    def failed(self) -> bool:
        return self.left_early or self.exit_code not in (0, EXIT_STOPPED, None)

    @property
    def lost_peer(self) -> bool:
        """It failed only because another rank was gone."""
        return bool(self.report and self.report.get("lost_peer"))

    def reap(self) -> bool:
        """Note the end of the process without waiting; True if it has just ended."""
        if not self.running or os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        self.exit_code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.signal = -self.exit_code if self.exit_code < 0 else None
        self.ended = time.monotonic()
        self.report = _read_report(self.pipe)
        os.close(self.pipe)
        return True

    def send(self, number: int) -> None:
        """Signal the rank; it has not been reaped, so the pid is still its own."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass


def fork_rank(
    rank: int,
    directory: RunDirectory,
    experiment: Experiment,
    run: Callable[[], None],
    inherited: list[int],
    temporary: Path,
    hosts: Hosts | None = None,
) -> Child:
    """Fork; the child calls `run` and never returns. It closes the descriptors `inherited` from the supervisor.

    `temporary`: a private folder that is removed when the run has ended. `hosts`: the emulated network, if there is
    one; the child moves to its host.
    """
    parent = os.getpid()
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(writer)
        os.set_blocking(reader, False)
        return Child(rank, pid, reader)
    for descriptor in (reader, *inherited):
        os.close(descriptor)
    _become_rank(rank, parent, writer, directory, experiment, run, temporary, hosts)


def _become_rank(
    rank: int,
    parent: int,
    pipe: int,
    directory: RunDirectory,
    experiment: Experiment,
    run: Callable[[], None],
    temporary: Path,
    hosts: Hosts | None,
) -> NoReturn:
    code = 1
    try:
        die_with_parent(parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD, signal.SIGTERM})
        # Sockets of loader processes lie there: the folder goes with the run, and its path is short.
        multiprocessing.current_process()._config["tempdir"] = str(temporary)  # type: ignore[attr-defined]
        log = safe_files.open_to_append(directory.log(rank))
        os.dup2(log, 1)
        os.dup2(log, 2)
        if hosts is not None:
            hosts.join(rank)
        for name in list(os.environ):
            if name in _FROM_OTHER_LAUNCHERS or name.startswith(_OF_ACCELERATE):
                del os.environ[name]
        os.environ.update(environment(rank, experiment))
        run()
        code = 0
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == EXIT_STOPPED:
            code = EXIT_STOPPED  # the supervisor knows whether it was asked to
        # Also when somebody's code calls sys.exit(0) in the middle of training.
        _report(pipe, error, quiet=code == EXIT_STOPPED)
    finally:
        # Whatever somebody's code has made of them: a rank must never return into the supervisor's code.
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def environment(rank: int, experiment: Experiment) -> dict[str, str]:
    """What the distributed libraries read. Everything is bound to loopback, or to the interface of an emulated host,
    from which nothing leads out; the rendezvous is a file, not a port.
    """
    interface = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    if experiment.launch.network is not None:
        interface = experiment.launch.network.interface
    variables: dict[str, Any] = {
        "OMP_NUM_THREADS": experiment.launch.threads_per_rank,
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
        "TOKENIZERS_PARALLELISM": "false",
    }
    ranks = experiment.layout.world_size
    if ranks > 1 and not experiment.launch.isolated:
        # Accelerate recognises a distributed run by these; the file store makes address and port unused.
        variables |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    return {name: str(value) for name, value in variables.items()}


def _report(pipe: int, error: BaseException, quiet: bool = False) -> None:
    """Tell the supervisor about the exception through a pipe: that works on a full disk too. `quiet`: not the log."""
    text = "".join(traceback.format_exception(error))
    # The pipe holds 64 KiB, and JSON may take six bytes for a character.
    report = {
        "type": type(error).__name__[:200],
        "message": _words(error)[:2000],
        "traceback": text[-6000:],
        "lost_peer": _lost_peer(error),
        "task": str(error) if isinstance(error, TaskFault) else None,
        "disk_full": isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG),
    }
    os.set_blocking(pipe, False)
    try:
        os.write(pipe, json.dumps(report).encode())
        if not quiet:
            print(text, file=sys.stderr, flush=True)  # noqa: T201  (the log of the rank)
    except (OSError, ValueError):  # somebody's code may have closed the log
        pass


def _words(error: BaseException) -> str:
    """Return the message of an exception; for a SystemExit without a code, the code that it stands for."""
    if isinstance(error, SystemExit) and error.code is None:
        return "0"
    return own_words(error)


def _lost_peer(error: BaseException) -> bool:
    """Did this rank fail only because another one was gone? Told by what gloo and NCCL say then."""
    text = f"{type(error).__name__} {message_of(error)}".lower()
    signs = ("connection closed by peer", "connection reset by peer", "broken pipe", "distbackenderror", "gloo", "nccl")
    return not isinstance(error, OSError) and any(sign in text for sign in signs)


def _read_report(pipe: int) -> dict[str, Any] | None:
    try:
        data = json.loads(os.read(pipe, 1 << 16))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
