"""The axes along which a model is distributed, and the pipeline schedules."""

from labkit.experiment import schedules
from labkit.experiment.registry import Method, Registry

AXES = Registry(
    "layout",
    "axis",
    [
        Method("dp_replicate", "data parallelism", "labkit.parallel.replicate:Replicate"),
        Method("dp_shard", "sharded data parallelism (ZeRO)", "labkit.parallel.rules:Shard"),
        Method("tp", "tensor parallelism", "labkit.parallel.rules:TensorAxis"),
        Method("cp", "context parallelism", "labkit.parallel.rules:ContextAxis"),
        Method("ep", "expert parallelism", "labkit.parallel.rules:ExpertAxis"),
        Method("pp", "pipeline parallelism", "labkit.parallel.rules:PipelineAxis"),
    ],
)

SCHEDULES = Registry(
    "layout.schedule",
    "pipeline schedule",
    [
        Method(schedule.key, schedule.summary, schedule.update_rule or "labkit.parallel.schedule:SynchronousSchedule")
        for schedule in schedules.SCHEDULES.values()
    ],
    base="labkit.parallel.schedule:PipelineSchedule",
)
