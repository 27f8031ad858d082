"""Registries of the precisions for training and of quantization after it."""

from labkit.experiment.registry import Method, Registry

TRAINING = Registry(
    "quantization.training",
    "number format",
    [
        Method("auto", "bf16 on GPUs that have it, else fp32", "labkit.quantization.full:Single"),
        Method("fp32", "single precision", "labkit.quantization.full:Single"),
        Method("tf32", "single precision with TF32 products, on GPUs", "labkit.quantization.tf32:TensorFloat32"),
        Method("fp64", "double precision, for proofs", "labkit.quantization.full:Double"),
        Method("bf16", "brain half precision under autocast", "labkit.quantization.autocast:BFloat16"),
        Method("fp16", "half precision under autocast, on GPUs", "labkit.quantization.autocast:Float16"),
        Method("fp8", "eight-bit floating point, on GPUs", "labkit.quantization.fp8:Float8"),
        Method(
            "pure_bf16",
            "brain half precision throughout, stochastic rounding",
            "labkit.quantization.pure_bf16:PureBFloat16",
        ),
        Method("int8", "eight-bit integer matrix products", "labkit.quantization.int8:Int8"),
        Method("int8_weights", "eight-bit integer weights (emulated)", "labkit.quantization.int8_weights:Int8Weights"),
        Method("bitnet", "ternary weights (BitNet b1.58)", "labkit.quantization.bitnet:BitNet"),
    ],
    base="labkit.quantization.full:Single",
)

QAT = Registry(
    "quantization.qat",
    "quantization-aware training method",
    [
        Method("none", "off", "labkit.quantization.full:Unquantized"),
        Method("int8", "eight bits", "labkit.quantization.qat:Int8Aware"),
        Method("int4", "four bits", "labkit.quantization.qat:Int4Aware"),
    ],
)

AFTER_TRAINING = Registry(
    "quantization.after_training",
    "post-training quantization",
    [
        Method("none", "off", "labkit.quantization.full:Unquantized"),
        Method("int8_dynamic", "eight-bit weights and activations", "labkit.quantization.after:Int8Dynamic"),
        Method("int8_static", "eight-bit weights and activations, calibrated", "labkit.quantization.after:Int8Static"),
        Method("int8_weight_only", "eight-bit weights", "labkit.quantization.after:Int8WeightOnly"),
        Method("int4_weight_only", "four-bit weights", "labkit.quantization.after:Int4WeightOnly"),
    ],
)
