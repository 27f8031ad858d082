"""What is trained: data, model, loss and metric. One file a workload, and files for the ideas they share."""

import labkit.experiment  # noqa: F401  first: its default experiment reads a workload's options, which read the above
