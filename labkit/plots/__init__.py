"""Run data in, plotly figures out: pure functions. Every figure has a summary in a sentence and a table twin."""

from labkit.plots.break_even import break_even as plot_break_even
from labkit.plots.curves import loss as plot_loss
from labkit.plots.curves import metric as plot_metric
from labkit.plots.curves import throughputs as plot_throughput
from labkit.plots.experts import experts as plot_experts
from labkit.plots.exported import exported as plot_exported
from labkit.plots.gpus import gpus as plot_gpus
from labkit.plots.grid import grid as plot_grid
from labkit.plots.memory import memory as plot_memory
from labkit.plots.numbers import formats as plot_numbers
from labkit.plots.numbers import layers as plot_layer_numbers
from labkit.plots.overview import overview as plot_overview
from labkit.plots.pareto import pareto as plot_pareto
from labkit.plots.picture import Picture, rows_of, summary_of
from labkit.plots.quantized import quantized as plot_quantized
from labkit.plots.ranks import ranks as plot_ranks
from labkit.plots.schedules import schedules as plot_schedules
from labkit.plots.sparsity import sparse_layers as plot_sparse_layers
from labkit.plots.sparsity import sparsity as plot_sparsity
from labkit.plots.speedup import speedup as plot_speedup
from labkit.plots.split import split as plot_split
from labkit.plots.staleness import staleness as plot_staleness
from labkit.plots.three_numbers import three_numbers as plot_three_numbers
from labkit.plots.timeline import timeline as plot_timeline
from labkit.plots.tradeoff import tradeoff as plot_tradeoff
from labkit.plots.traffic import communication as plot_communication

__all__ = [
    "Picture",
    "plot_break_even",
    "plot_communication",
    "plot_experts",
    "plot_exported",
    "plot_gpus",
    "plot_grid",
    "plot_layer_numbers",
    "plot_loss",
    "plot_memory",
    "plot_metric",
    "plot_numbers",
    "plot_overview",
    "plot_pareto",
    "plot_quantized",
    "plot_ranks",
    "plot_schedules",
    "plot_sparse_layers",
    "plot_sparsity",
    "plot_speedup",
    "plot_split",
    "plot_staleness",
    "plot_three_numbers",
    "plot_throughput",
    "plot_timeline",
    "plot_tradeoff",
    "rows_of",
    "summary_of",
]
