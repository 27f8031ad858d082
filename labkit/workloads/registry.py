"""The workloads."""

from labkit.experiment.registry import Method, Registry

WORKLOADS = Registry(
    "workload.name",
    "workload",
    [
        Method("vision", "image classification", "labkit.workloads.vision:Vision"),
        Method("language", "next-token prediction", "labkit.workloads.language:Language"),
        Method("driving", "behaviour cloning for self-driving", "labkit.workloads.driving:Driving"),
        Method("custom", "your own model, data and loss", "labkit.workloads.custom:Custom"),
    ],
)
