"""Workloads: data, model, loss and metric. One file per workload, and files for what they share."""

import labkit.experiment  # noqa: F401  first: its default experiment reads a workload's options, which read the above
