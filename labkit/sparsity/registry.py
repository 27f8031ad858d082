"""Registry of the sparsity methods, which choose the weights that are zero."""

from labkit.experiment.registry import Method, Registry

SPARSITY = Registry(
    "sparsity.method",
    "sparsity method",
    [
        Method("none", "dense", "labkit.sparsity.dense:Dense"),
        Method("magnitude", "the smallest weights, once", "labkit.sparsity.magnitude:Magnitude"),
        Method("gradual", "the smallest weights, on a cubic schedule", "labkit.sparsity.gradual:Gradual"),
        Method("static", "a random mask that never changes", "labkit.sparsity.static:Static"),
        Method("set", "drop the smallest, regrow at random (SET)", "labkit.sparsity.set:SparseEvolutionaryTraining"),
        Method("rigl", "drop the smallest, regrow by gradient (RigL)", "labkit.sparsity.rigl:RigL"),
        Method("n_m", "N of every M weights (2:4)", "labkit.sparsity.n_m:NM"),
        Method("block", "whole blocks", "labkit.sparsity.block:Block"),
        Method("structured", "whole hidden units and heads", "labkit.sparsity.structured:Structured"),
    ],
    base="labkit.sparsity.method:Sparsifier",
)
