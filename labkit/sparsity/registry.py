"""The ways to choose which weights are zero."""

from labkit.experiment.registry import Method, Registry

SPARSITY = Registry(
    "sparsity.method",
    "sparsity method",
    [
        Method("none", "dense", "labkit.sparsity.dense:Dense"),
        Method("magnitude", "the smallest weights, once"),
        Method("gradual", "the smallest weights, on a cubic schedule"),
        Method("static", "a random mask that never changes"),
        Method("set", "drop the smallest, regrow at random (SET)"),
        Method("rigl", "drop the smallest, regrow by gradient (RigL)"),
        Method("n_m", "N of every M weights (2:4)"),
        Method("block", "whole blocks"),
        Method("structured", "whole channels or heads"),
    ],
)
