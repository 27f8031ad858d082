"""The axes along which a model is distributed, and the pipeline schedules."""

from labkit.experiment.registry import Method, Registry

_PIPELINE = "labkit.parallel.rules:PipelineAxis"

AXES = Registry(
    "layout.axes",
    "layout",
    "axis",
    [
        Method("dp_replicate", "data parallelism", "labkit.parallel.replicate:Replicate"),
        Method("dp_shard", "sharded data parallelism (ZeRO)", "labkit.parallel.rules:Shard"),
        Method("tp", "tensor parallelism", "labkit.parallel.rules:TensorAxis"),
        Method("cp", "context parallelism", "labkit.parallel.rules:ContextAxis"),
        Method("ep", "expert parallelism", "labkit.parallel.rules:ExpertAxis"),
        Method("pp", "pipeline parallelism", _PIPELINE),
    ],
)

SCHEDULES = Registry(
    "layout.schedule",
    "layout.schedule",
    "pipeline schedule",
    [
        Method("naive", "one micro-batch passes through the stages", _PIPELINE),
        Method("gpipe", "all forward passes, then all backward passes", _PIPELINE),
        Method("1f1b", "one forward, one backward", _PIPELINE),
        Method("interleaved_1f1b", "1F1B over several stages per rank", _PIPELINE),
        Method("looped_bfs", "several stages per rank, breadth first", _PIPELINE),
        Method("interleaved_zero_bubble", "weight gradients fill the bubble", _PIPELINE),
        Method("zbv", "zero bubble in a V over two stages per rank", _PIPELINE),
        Method("dualpipev", "two directions at once, in a V", _PIPELINE),
    ],
)
