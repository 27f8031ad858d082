"""Registries of the compressors and of the update rules."""

from labkit.experiment.registry import Method, Registry

COMPRESSION = Registry(
    "gradients.compression.method",
    "compression method",
    [
        Method("none", "gradients are sent as they are", "labkit.gradients.compression.plain:Uncompressed"),
        Method("fp16", "half precision", "labkit.gradients.compression.half:Fp16"),
        Method("bf16", "brain half precision", "labkit.gradients.compression.half:Bf16"),
        Method("int8", "eight bits, stochastic rounding (QSGD)", "labkit.gradients.compression.int8:Int8"),
        Method("sign", "one bit with error feedback", "labkit.gradients.compression.sign:Sign"),
        Method("ternary", "-1, 0, 1 (TernGrad)", "labkit.gradients.compression.ternary:Ternary"),
        Method("topk", "the largest entries with error feedback", "labkit.gradients.compression.topk:TopK"),
        Method("randomk", "random entries with error feedback", "labkit.gradients.compression.randomk:RandomK"),
        Method("powersgd", "low rank (PowerSGD)", "labkit.gradients.compression.powersgd:PowerSGD"),
        Method("onebit_adam", "1-bit Adam", "labkit.gradients.compression.onebit_adam:OneBitAdam"),
    ],
    base="labkit.gradients.compression.compressor:Compressor",
)

UPDATE = Registry(
    "gradients.update.method",
    "update method",
    [
        Method("synchronous", "all ranks wait for the average", "labkit.gradients.updates.synchronous:Synchronous"),
        Method("local_sgd", "average the weights every few steps", "labkit.gradients.updates.local_sgd:LocalSGD"),
        Method(
            "post_local_sgd", "synchronous first, then local", "labkit.gradients.updates.post_local_sgd:PostLocalSGD"
        ),
        Method("diloco", "local steps, then an outer optimizer", "labkit.gradients.updates.diloco:DiLoCo"),
        Method(
            "streaming_diloco",
            "DiLoCo by fragments, overlapped",
            "labkit.gradients.updates.streaming_diloco:StreamingDiLoCo",
        ),
        Method("parameter_server", "bounded staleness", "labkit.gradients.updates.parameter_server:ParameterServer"),
        Method("hogwild", "one model in shared memory, no locks", "labkit.gradients.updates.hogwild:Hogwild"),
        Method("gossip", "average with a neighbour (AD-PSGD)", "labkit.gradients.updates.gossip:Gossip"),
        Method("delayed", "gradients one step late", "labkit.gradients.updates.delayed:Delayed"),
    ],
    base="labkit.gradients.updates.update:UpdateRule",
)
