"""The compressors and the update rules."""

from labkit.experiment.registry import Method, Registry

COMPRESSION = Registry(
    "gradients.compression.method",
    "compression method",
    [
        Method("none", "gradients travel as they are", "labkit.gradients.plain:Uncompressed"),
        Method("fp16", "half precision", "labkit.gradients.half:Fp16"),
        Method("bf16", "brain half precision", "labkit.gradients.half:Bf16"),
        Method("int8", "eight bits, stochastic rounding (QSGD)", "labkit.gradients.int8:Int8"),
        Method("sign", "one bit with error feedback", "labkit.gradients.sign:Sign"),
        Method("ternary", "-1, 0, 1 (TernGrad)", "labkit.gradients.ternary:Ternary"),
        Method("topk", "the largest entries with error feedback", "labkit.gradients.topk:TopK"),
        Method("randomk", "random entries with error feedback", "labkit.gradients.randomk:RandomK"),
        Method("powersgd", "low rank (PowerSGD)", "labkit.gradients.powersgd:PowerSGD"),
        Method("onebit_adam", "1-bit Adam", "labkit.gradients.onebit_adam:OneBitAdam"),
    ],
)

UPDATE = Registry(
    "gradients.update.method",
    "update method",
    [
        Method("synchronous", "all ranks wait for the average", "labkit.gradients.synchronous:Synchronous"),
        Method("local_sgd", "average the weights every few steps", "labkit.gradients.local_sgd:LocalSGD"),
        Method("post_local_sgd", "synchronous first, then local", "labkit.gradients.post_local_sgd:PostLocalSGD"),
        Method("diloco", "local steps, then an outer optimizer", "labkit.gradients.diloco:DiLoCo"),
        Method(
            "streaming_diloco", "DiLoCo by fragments, overlapped", "labkit.gradients.streaming_diloco:StreamingDiLoCo"
        ),
        Method("parameter_server", "bounded staleness", "labkit.gradients.parameter_server:ParameterServer"),
        Method("hogwild", "one model in shared memory, no locks", "labkit.gradients.hogwild:Hogwild"),
        Method("gossip", "average with a neighbour (AD-PSGD)", "labkit.gradients.gossip:Gossip"),
        Method("delayed", "gradients one step late", "labkit.gradients.delayed:Delayed"),
        Method("pipedream", "asynchronous pipeline with weight stashing", "labkit.gradients.pipedream:PipeDream"),
    ],
)
