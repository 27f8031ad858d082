"""The number formats for training and after it."""

from labkit.experiment.registry import Method, Registry

TRAINING = Registry(
    "quantization.training",
    "number format",
    [
        Method("fp32", "single precision", "labkit.quantization.full:Single"),
        Method("fp64", "double precision, for proofs", "labkit.quantization.full:Double"),
        Method("bf16", "brain half precision under autocast", "labkit.quantization.autocast:BFloat16"),
        Method("fp16", "half precision under autocast"),
        Method("fp8", "eight-bit floating point"),
        Method("pure_bf16", "brain half precision throughout, stochastic rounding"),
        Method("int8", "eight-bit integer matrix products"),
        Method("int8_weights", "eight-bit integer weights"),
        Method("bitnet", "ternary weights (BitNet b1.58)"),
    ],
)

QAT = Registry(
    "quantization.qat",
    "quantization-aware training method",
    [
        Method("none", "off", "labkit.quantization.full:Unquantized"),
        Method("int8", "eight bits"),
        Method("int4", "four bits"),
    ],
)

AFTER_TRAINING = Registry(
    "quantization.after_training",
    "post-training quantization",
    [
        Method("none", "off", "labkit.quantization.full:Unquantized"),
        Method("int8_dynamic", "eight-bit weights and activations"),
        Method("int8_weight_only", "eight-bit weights"),
        Method("int4_weight_only", "four-bit weights"),
    ],
)
