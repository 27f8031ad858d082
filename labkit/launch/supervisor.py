"""The supervisor of one run: forks the ranks, watches them, ends the run in exactly one terminal state.

It holds the lock of the run as long as it lives. It works in one thread (two others read the git state and the GPUs,
and nothing waits for them for long) and never waits for a rank without a time limit. It reads `stop.json` and the
heartbeat table and reaps ranks; it ends those that do not end by themselves (deadline.py), identifies the rank at fault
(stalls.py, outcome.py), and writes status, progress (run_record.py) and summary. Ranks die when it dies, and all
processes that they have started end before it writes the terminal state.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from labkit.experiment import Experiment
from labkit.experiment.failures import message_of
from labkit.experiment.periodically import periodically
from labkit.experiment.run_directory import EXIT_STOPPED, RunDirectory, read_json, write_json
from labkit.launch import rendezvous
from labkit.launch.board import HeartbeatTable
from labkit.launch.child import Child, fork_rank
from labkit.launch.deadline import Deadline
from labkit.launch.descendants import OrphanReaper, end_descendants
from labkit.launch.gpu_monitor import monitored
from labkit.launch.outcome import first_failure, terminal_state
from labkit.launch.run_record import RunRecord, attempt, log_line
from labkit.launch.stalls import find_stall
from labkit.netem.hosts import Hosts
from labkit.runs import environment, liveness
from labkit.runs import status as run_status
from labkit.runs.leftovers import remove_unfinished
from labkit.runs.processes import adopt_orphans, identity
from labkit.runs.summarize import summarize

RANK_ENTRY = "labkit.training.worker:main"
"""Entry of a rank: named, not imported, because the supervisor and the ranks share only the experiment and files."""
POLL_S = 0.1
PROGRESS_EVERY_S = 0.5
SETTLE_S = 3.0
"""How long the other ranks may take to end by themselves after one has failed (s)."""


class Supervisor:
    """Everything that one run needs while it is in progress."""

    def __init__(
        self, experiment: Experiment, order: dict[str, Any], record: RunRecord, lock: liveness.Lock | None
    ) -> None:
        self.directory, self.experiment, self.order = record.directory, experiment, order
        self.record, self.lock = record, lock
        self.orphan_reaper = OrphanReaper()
        self.heartbeats = HeartbeatTable(experiment.layout.world_size)
        self.started = time.monotonic()
        self.children: list[Child] = []
        self.stop: dict[str, Any] | None = None
        """Why the run is being stopped."""
        self.fault: dict[str, Any] | None = None
        """A failure that the supervisor detected itself, such as a stall, and the rank that caused it."""
        self.deadline = Deadline(self.heartbeats)
        self.next_progress = 0.0
        self.rendezvous_folder = rendezvous.make_folder()

    def start(self) -> None:
        """Fork the ranks. Called in the only thread of this process: the parent-death signal is tied to it."""
        module, _, name = self.order.get("entry", RANK_ENTRY).partition(":")
        entry = getattr(import_module(module), name)
        network = self.experiment.launch.network
        hosts = None if network is None else Hosts(network, self.heartbeats.world_size)
        for rank in range(self.heartbeats.world_size):
            run = partial(
                entry,
                directory=self.directory,
                experiment=self.experiment,
                rank=rank,
                board=self.heartbeats,
                rendezvous=str(self.rendezvous_folder.path / "store"),
                requested=self.order["requested"],
                resume=self.order.get("resume"),
            )
            inherited = [child.pipe for child in self.children] + [self.rendezvous_folder.lock.descriptor]
            inherited += [self.lock.descriptor] if self.lock is not None else []
            self.children.append(
                fork_rank(rank, self.directory, self.experiment, run, inherited, self.rendezvous_folder.path, hosts)
            )
        if hosts is not None:
            hosts.close()

    def watch(self) -> dict[str, Any]:
        """Watch until all ranks have ended, and return the terminal changes of the status."""
        signals = {signal.SIGCHLD, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        while any(child.running for child in self.children):
            received = signal.sigtimedwait(signals, POLL_S)
            if received is not None and received.si_signo == signal.SIGTERM:
                self._begin_stop("stop", "the supervisor was asked to end (SIGTERM)")
            for child in self.children:
                if child.reap():
                    # The user's code may exit with a code of success in the middle of the training.
                    clean_exit_code = child.exit_code == 0 or (
                        child.exit_code == EXIT_STOPPED and self.stop is not None
                    )
                    done = self.heartbeats.rank_status(child.rank).phase == "done"
                    child.left_early = child.exit_code in (0, EXIT_STOPPED) and not (clean_exit_code and done)
                    if child.failed:
                        self.deadline.advance(SETTLE_S)
            self._check_stop_request()
            self._check_directory()
            self._check_stalls()
            self.deadline.enforce(self.children)
            self._do_periodic_work()
        failure = self.fault or first_failure(self.directory, self.children, self.heartbeats)
        return terminal_state(self.directory, self.children, failure, self.stop, self.deadline.blocking_ranks)

    def _check_stop_request(self) -> None:
        """Begin to stop if a stop was requested or the maximum duration has passed."""
        if self.stop is not None:
            return
        limit = self.experiment.launch.max_duration_s
        if self.directory.stop.exists():
            request = read_json(self.directory.stop)
            grace = request.get("grace_s") if isinstance(request, dict) else None
            self._begin_stop("stop", "stopped on request", grace)
        elif time.monotonic() - self.started > limit:
            self._begin_stop("duration", f"launch.max_duration_s of {limit:g} s has passed")

    def _check_directory(self) -> None:
        """End the run if its directory was removed, because it could be neither seen nor stopped any more."""
        if self.fault is None and not self.directory.path.is_dir():
            self._end_now(run_status.cause("disk", f"the run directory {self.directory.path} was removed"))

    def _check_stalls(self) -> None:
        """End the run if ranks have stalled, with the rank that hangs and its stacks as the cause."""
        if self.deadline.is_set:
            return
        stall = find_stall(self.directory, self.heartbeats, self.children, self.experiment.launch.timeout_s)
        if stall is not None:
            self._end_now(stall)

    def _check_status_file(self) -> None:
        """Repair the status if another process has changed it, which none should do; obey a terminal state."""
        if self.fault is None and self.record.status_was_changed():
            self.update_status()

    def _begin_stop(self, kind: str, message: str, grace: Any = None) -> None:
        """Request all ranks to stop within `grace` seconds (launch.grace_s if invalid); the first cause counts."""
        if self.stop is not None:
            return
        self.stop = run_status.cause(kind, message)
        # It was read from a file, so it may be anything, including NaN.
        valid = isinstance(grace, int | float) and 0 <= grace < 86400
        self.deadline.advance(float(grace) if valid else self.experiment.launch.grace_s)
        self.heartbeats.request_stop()
        self.update_status(state="stopping")

    def _end_now(self, fault: dict[str, Any]) -> None:
        """End the ranks at once because of a fault; the first one counts."""
        self.fault = self.fault or fault
        self.deadline.advance()

    def update_status(self, **changes: Any) -> None:
        """Change the status; if another process has written a terminal state, end the ranks so that the two agree."""
        self.record.update_status(**changes)
        if self.record.has_ended:
            self._end_now(run_status.cause("supervisor", "another process has written the terminal state of this run"))

    def _do_periodic_work(self) -> None:
        """Twice a second, renew the lock's heartbeat, check the status and write what readers see of the ranks."""
        now = time.monotonic()
        if now < self.next_progress:
            return
        self.next_progress = now + PROGRESS_EVERY_S
        self.orphan_reaper.reap({child.pid for child in self.children if child.running})
        if self.lock is not None:
            attempt(self.lock.beat)
        self._check_status_file()
        self.record.write_progress(self.children, self.heartbeats)
        self.record.cap_logs(self.children)

    def clean_up(self) -> None:
        """End every process that the run has started, and remove what only running processes need."""
        for child in self.children:
            if child.running:  # only if `watch` itself has failed
                child.send(signal.SIGKILL)
        for pid in end_descendants():
            log_line(f"process {pid} does not end on SIGKILL; it is left behind")
        self.rendezvous_folder.remove()
        self.record.cap_logs(self.children)
        remove_unfinished(self.directory)


def supervise(order: dict[str, Any]) -> int:
    """Execute one order up to its terminal state and return the exit code of the supervisor process."""
    directory = RunDirectory(Path(order["run"]))
    try:
        lock = liveness.hold(directory.alive)
    except (BlockingIOError, PermissionError):
        log_line("this run has a supervisor already")
        return 1
    except OSError as error:
        log_line(f"this file system has no locks, so the state of this run is judged by its processes: {error}")
        lock = None
    supervisor: Supervisor | None = None
    adopt_orphans()
    # First of all: from now on the run depends on this process alone, even if its launcher ends.
    record = RunRecord(directory, run_status.update(directory, supervisor=identity(os.getpid())))
    if record.has_ended:
        log_line("the terminal state of this run was written before it began")
        return 1
    try:
        os.chdir(order["cwd"])
        sys.path.append(order["cwd"])  # last: a file there must not shadow a library
        os.environ.update(order.get("environment", {}))
        supervisor = Supervisor(Experiment.of_run(directory), order, record, lock)
        supervisor.start()
        supervisor.update_status(
            state="running",
            started=time.time(),
            ranks=[{"rank": child.rank} | identity(child.pid) for child in supervisor.children],
        )
        # After the fork, so that it does not delay the first step.
        attempt(lambda: environment.record(directory, order["cwd"]))
        with monitored(directory, supervisor.experiment):
            changes = supervisor.watch()
    except BaseException as error:
        traceback.print_exc()
        message = f"the supervisor failed: {type(error).__name__}: {message_of(error)}"
        changes = {"state": "failed", "cause": run_status.cause("supervisor", message)}
    with _keep_beating(lock):
        if supervisor is not None:
            supervisor.clean_up()
        try:
            summary = summarize(directory, changes["state"], order.get("baseline"))
            write_json(directory.summary, summary.as_dict())
        except Exception as error:
            # The disk is full, or the events are unreadable: the state is more important than its summary.
            log_line(f"no summary: {error!r}")
        record.write_terminal_state(changes)
    if lock is not None:
        lock.release(remove=True)
    return 0 if changes["state"] == "finished" else 1


@contextmanager
def _keep_beating(lock: liveness.Lock | None) -> Iterator[None]:
    """Keep the lock's heartbeat going: the summary of a long run may take longer than readers wait."""

    def beat() -> None:
        with suppress(OSError):
            if lock is not None:
                lock.beat()

    with periodically(beat, PROGRESS_EVERY_S, "labkit-heartbeat"):
        yield
