"""Checkpoints of a run in training: gather the state of all ranks and save it, or restore it under any layout."""

from __future__ import annotations

import time
from pathlib import Path

from labkit.experiment import Experiment
from labkit.experiment.resume import same_ranks, task_code
from labkit.experiment.run_directory import RunDirectory
from labkit.parallel import state
from labkit.training import checkpoint
from labkit.training.setup import TrainingSetup
from labkit.workloads.mapped import mapped_files, pages_dropped


class Checkpoints:
    """Saves and restores the state of one rank: weights, moments, masks, update rule, compressor."""

    def __init__(self, setup: TrainingSetup, directory: RunDirectory) -> None:
        self._setup, self._directory = setup, directory
        self.last = 0
        """Number of optimizer steps at the last checkpoint, or at the start of the run."""

    def start(self, folder: Path | None) -> int:
        """Restore the checkpoint in `folder`, or begin from step 0 without one; return the number of steps done."""
        self.last = self._load(folder) if folder is not None else self._start_fresh()
        return self.last

    def save(self, step: int, unscheduled: bool = False) -> None:
        """Save a checkpoint after `step` steps and write the event `checkpoint` (collective).

        `unscheduled` says that the run was stopped at a step after which no evaluation was due.
        """
        begin = time.perf_counter()
        setup, experiment = self._setup, self._setup.experiment
        setup.meter.phase("checkpoint")
        mesh, rank = setup.runtime.mesh, setup.runtime.rank
        own = self._local_state(unscheduled)
        setup.update.average_replicas(step)
        files = mapped_files(experiment.layout, self._directory.path)
        with pages_dropped(files):
            weights, moments = state.gather(setup.model, setup.optimizer, files=files)
            part = mesh.coordinates["pp"] if mesh.rank == mesh.writer else None
            folder = checkpoint.save(
                self._directory,
                step,
                experiment,
                checkpoint.Saved(weights, moments, part, setup.update.state() | setup.sparsity.state(), own),
                rank,
                setup.runtime.meet if mesh.size("pp") > 1 or own is not None else lambda: None,
                unscheduled,
                task_code(experiment) if rank == 0 else "",
            )
            del weights, moments
        self.last = step
        if rank == 0:
            path, seconds = str(folder.relative_to(self._directory.path)), time.perf_counter() - begin
            setup.meter.events.write("checkpoint", step=step, path=path, seconds=seconds)
            setup.meter.events.sync()

    def _local_state(self, unscheduled: bool) -> state.State | None:
        """Return the state that only this rank has; None if no rank has any.

        This is the error feedback of its compressor and, if the run was stopped, weights that differ between ranks. At
        a scheduled checkpoint ranks average their weights anyway (`average_replicas`).
        """
        setup = self._setup
        diverged = unscheduled and setup.update.replicas_diverge
        if not (diverged or setup.exchanges.has_local_state):
            return None
        own = {f"compressor.{name}": tensor for name, tensor in setup.exchanges.state().items()}
        if diverged:
            weights, moments = state.gather(setup.model, setup.optimizer, own=True)
            own |= {f"weights.{name}": tensor for name, tensor in weights.items()}
            own |= {f"moments.{name}": tensor for name, tensor in moments.items()}
            own |= {f"rule.{name}": tensor for name, tensor in setup.update.local_state().items()}
        return own

    def _load(self, folder: Path) -> int:
        setup, experiment = self._setup, self._setup.experiment
        stored = checkpoint.read(folder, setup.runtime.rank)
        with checkpoint.as_checkpoint_error(folder):
            setup.sparsity.load(stored.shared)  # first, because it decides which weights exist
            state.restore(setup.model, setup.optimizer, stored.weights, stored.moments)
            setup.update.load(stored.shared)
            before = Experiment.from_dict(stored.contents.experiment)
            same = stored.contents.ranks == setup.runtime.ranks and same_ranks(before, experiment)
            if same and stored.own is not None:
                self._load_local_state(stored.own)
        return stored.step

    def _load_local_state(self, own: state.State) -> None:
        def part(kind: str) -> state.State:
            return {name[len(kind) + 1 :]: tensor for name, tensor in own.items() if name.startswith(f"{kind}.")}

        setup = self._setup
        setup.exchanges.load(part("compressor"))
        if weights := part("weights"):
            state.restore(setup.model, setup.optimizer, weights, part("moments"))
            setup.update.load_local_state(part("rule"))

    def _start_fresh(self) -> int:
        self._setup.sparsity.begin()
        self._setup.update.load({})  # its reference weights are the initial ones
        return 0
