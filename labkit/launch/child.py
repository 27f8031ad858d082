"""One rank as a child process of its supervisor: its fork, its environment, and its report of why it ended."""

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
from labkit.experiment.failures import message_of, original_message
from labkit.experiment.fault import TaskFault
from labkit.experiment.run_directory import EXIT_STOPPED, RunDirectory
from labkit.netem.hosts import Hosts
from labkit.runs.processes import die_with_parent

# Accelerate reads settings from these (e.g. gradient accumulation), which would silently override the experiment.
_ACCELERATE_PREFIXES = ("ACCELERATE_", "PARALLELISM_CONFIG_", "FSDP_")
# The kernel may itself have been started by torchrun or under MPI; its rank there does not concern labkit's ranks.
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")


@dataclass
class Child:
    """A forked rank. `exit_code` and `signal` are set once it has been reaped."""

    rank: int
    pid: int
    pipe: int
    ended: float | None = None
    exit_code: int | None = None
    signal: int | None = None
    terminated: float | None = None
    """When the supervisor sent SIGTERM (monotonic seconds)."""
    report: dict[str, Any] | None = None
    """The report that the rank sent about its exception."""

    left_early: bool = False
    """Whether it ended with an exit code of success before it was done, or of a stop that nobody requested."""

    @property
    def running(self) -> bool:
        return self.ended is None

    @property
    def failed(self) -> bool:
        return self.left_early or self.exit_code not in (0, EXIT_STOPPED, None)

    @property
    def lost_peer(self) -> bool:
        """Whether it failed only because another rank was gone."""
        return bool(self.report and self.report.get("lost_peer"))

    def reap(self) -> bool:
        """Record the end of the process, without blocking; return True if it has just ended."""
        if not self.running or os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        self.exit_code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.signal = -self.exit_code if self.exit_code < 0 else None
        self.ended = time.monotonic()
        self.report = _read_report(self.pipe)
        os.close(self.pipe)
        return True

    def send(self, number: int) -> None:
        """Send signal `number` to the rank; it has not been reaped, so the pid is still its own."""
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
    """Fork a rank and return its handle; the child calls `run` and never returns.

    The child closes the descriptors `inherited` from the supervisor. `temporary`: a private folder that is removed when
    the run has ended. `hosts`: the emulated network, if there is one; the child enters the namespace of its host.
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
        # Loader processes create their sockets there: the folder is removed with the run, and its path is short.
        multiprocessing.current_process()._config["tempdir"] = str(temporary)  # type: ignore[attr-defined]
        log = safe_files.open_to_append(directory.log(rank))
        os.dup2(log, 1)
        os.dup2(log, 2)
        if hosts is not None:
            hosts.join(rank)
        for name in list(os.environ):
            if name in _LAUNCHER_VARIABLES or name.startswith(_ACCELERATE_PREFIXES):
                del os.environ[name]
        os.environ.update(environment(rank, experiment))
        run()
        code = 0
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == EXIT_STOPPED:
            code = EXIT_STOPPED  # the supervisor knows whether it requested the stop
        # Also if the user's code calls sys.exit(0) in the middle of training.
        _send_report(pipe, error, quiet=code == EXIT_STOPPED)
    finally:
        # Even if the user's code has closed these streams: a rank must never return into the supervisor's code.
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def environment(rank: int, experiment: Experiment) -> dict[str, str]:
    """Return the environment variables that the distributed libraries read in a rank.

    Every socket is bound to loopback, or to the interface of an emulated host, which is not connected to the outside;
    the rendezvous is a file, not a port.
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
        # Accelerate recognises a distributed run by these; address and port are unused because the store is a file.
        variables |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    return {name: str(value) for name, value in variables.items()}


def _send_report(pipe: int, error: BaseException, quiet: bool = False) -> None:
    """Report the exception to the supervisor through a pipe, which works even if the disk is full.

    The traceback is also printed to the log of the rank, unless `quiet`.
    """
    text = "".join(traceback.format_exception(error))
    # The pipe holds 64 KiB, and JSON may need six bytes per character.
    report = {
        "type": type(error).__name__[:200],
        "message": _exception_message(error)[:2000],
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
    except (OSError, ValueError):  # the user's code may have closed the log
        pass


def _exception_message(error: BaseException) -> str:
    """Return the message of an exception; for a SystemExit without a code, the code that it stands for."""
    if isinstance(error, SystemExit) and error.code is None:
        return "0"
    return original_message(error)


def _lost_peer(error: BaseException) -> bool:
    """Return whether this rank failed only because another was gone, judged by the words of gloo and NCCL errors."""
    text = f"{type(error).__name__} {message_of(error)}".lower()
    signs = ("connection closed by peer", "connection reset by peer", "broken pipe", "distbackenderror", "gloo", "nccl")
    return not isinstance(error, OSError) and any(sign in text for sign in signs)


def _read_report(pipe: int) -> dict[str, Any] | None:
    """Return the report that a rank has left in its pipe; None if there is none or it is damaged."""
    try:
        data = json.loads(os.read(pipe, 1 << 16))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
