"""What a rank writes about a run besides its steps: what is in force, what was sent, which weights are zero."""

from __future__ import annotations

import os

import torch

from labkit.experiment.process_memory import peak_resident_bytes
from labkit.netem.counters import LinkCounter
from labkit.training.counting import CommunicationCount
from labkit.training.setup import TrainingSetup


class Reporter:
    """Writes the events `start`, `sparsity`, `communication`, `link` and `effective` of one rank."""

    def __init__(self, setup: TrainingSetup, count: CommunicationCount, link: LinkCounter) -> None:
        self.setup, self.events = setup, setup.meter.events
        self._count, self._link = count, link

    def write_start(self, first: int) -> None:
        """Write the event `start`: what was set up and what is in effect, for a run that begins after `first` steps."""
        setup, runtime, metric = self.setup, self.setup.runtime, self.setup.task.metric
        layers = setup.sparsity.context.layers
        self.events.write(
            "start",
            device=str(runtime.device),
            **({"card": torch.cuda.get_device_name(runtime.device)} if runtime.device.type == "cuda" else {}),
            pid=os.getpid(),
            threads=torch.get_num_threads(),
            first=first,
            steps=setup.steps,
            host_bytes=peak_resident_bytes(),
            metric={
                "key": metric.key,
                "title": metric.title,
                "higher_is_better": metric.higher_is_better,
                "unit": metric.unit,
            },
            facts=setup.task.facts(),
            parameters=setup.parameters,
            warnings=setup.warnings,
            effective={
                "dtype": str(runtime.dtype).removeprefix("torch."),
                "products": str(runtime.product_type()).removeprefix("torch."),
                "compressor": setup.exchanges.compressor_name,
                "compiled": setup.compiled.effective(),
                "sparse_kernel": f"{setup.sparsity.kernel} in {len(layers)} layers" if layers else "none",
                "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else "none",
                "exchange": setup.model.exchange,
            },
        )

    def write_sparsity(self, step: int) -> None:
        """Write the event `sparsity` after masks changed: zeros, weights and new fraction of kept weights by layer."""
        sparsity = self.setup.sparsity
        churn = sparsity.take_churn()
        if churn is None:
            return
        with sparsity.effective_weights():  # the weights that the network uses
            zeros, churn = sparsity.masks.zeros(changed=True), sparsity.masks.gather_named(churn)
        if self.setup.runtime.rank == 0:
            self._write_zeros(step, zeros, churn)

    def write_figures(self, first: int, done: int) -> None:
        """Write what was counted from step `first` to `done`: communication, zeros, link and precision statistics."""
        setup, sparsity = self.setup, self.setup.sparsity
        measured, about = setup.model.communication(), self._count.per_step(done - first)
        if measured is not None:
            about = {
                "bytes_per_step": round(measured.wire_bytes),
                "exposed_seconds_per_step": measured.exposed_seconds,
                "axes": measured.axes,
            } | about
        if about:
            self.events.write("communication", **about)
        zeros = sparsity.masks.zeros()
        if zeros and setup.runtime.rank == 0:
            self._write_zeros(done, zeros, {})
        link = self._link.totals()
        if link is not None:
            self.events.write("link", updates=done - first, **link)
        effective = setup.narrowing.statistics() | (setup.scaling.statistics() if setup.scaling is not None else {})
        if compared := sparsity.masks.compared:
            effective["masks_equal_on_ranks"] = compared
        effective |= sparsity.statistics()
        if effective:
            self.events.write("effective", found=effective)

    def _write_zeros(self, step: int, zeros: dict[str, tuple[int, int]], churn: dict[str, float]) -> None:
        layers = {name: [*counts, churn.get(name, 0.0)] for name, counts in zeros.items()}
        self.events.write("sparsity", step=step, layers=layers)
