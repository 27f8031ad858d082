"""The sections of an experiment: workload, gradients, sparsity, quantization, optimizer, training and launch.

Every field's docstring is the tooltip of the form and the description that `labkit fields` prints. Sizes and ranges are
checked here; combinations are checked by `rules.py`. (The layout has a file of its own.)

A section that names a method has a default factory, never a default: to make one is to load the method's module, and
importing the schema must load none (a method's own module imports the schema's neighbours).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from labkit.experiment.choice import Choice
from labkit.experiment.old_names import MOMENTUM, beta1_from_momentum

if TYPE_CHECKING:
    from labkit.experiment.machine import Machine

MOST_SLOWDOWN = 1000


class Section(BaseModel):
    """A group of settings: frozen, unknown names refused, NaN and infinity refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Workload(Choice):
    """What is trained: the workload's name and its own options."""

    KNOB: ClassVar[str] = "workload"
    SELECTOR: ClassVar[str] = "name"

    name: str = "vision"
    """The workload: data, model, loss and metric."""


class Compression(Choice):
    """How gradients are compressed before they are exchanged."""

    KNOB: ClassVar[str] = "gradients.compression"

    method: str = "none"
    """The gradient compressor."""


class Update(Choice):
    """How and when ranks combine their gradients or weights."""

    KNOB: ClassVar[str] = "gradients.update"

    method: str = "synchronous"
    """The update rule."""


class Gradients(Section):
    """How gradients are combined."""

    accumulation: int = Field(default=1, ge=1, le=4096)
    """Forward and backward passes per optimizer step; each takes an equal part of the rank's share of the batch."""
    bucket_mb: float = Field(default=25.0, gt=0, le=10_000)
    """Size of the buckets in which gradients are exchanged (MB)."""
    overlap: bool = True
    """Send buckets while the backward pass is still running; otherwise after it."""
    hierarchical: bool = False
    """Reduce gradients within each host first, then between hosts; compression applies to the second step only."""
    compression: Compression = Field(default_factory=Compression)
    update: Update = Field(default_factory=Update)


class Sparsity(Choice):
    """How weights are pruned."""

    KNOB: ClassVar[str] = "sparsity"

    method: str = "none"
    """How the weights to be zeroed are chosen."""
    target: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the weights that are zero at the end."""
    export: bool = False
    """After training, convert the network to its fastest form and compare it with the dense one."""


AUTO = "auto"
BF16_CAPABILITY = (8, 0)
"""Compute capability of the first GPUs with products in bfloat16 (A100)."""


class Quantization(Section):
    """The precision of weights, activations and gradients."""

    training: str = "fp32"
    """Number format of the forward and backward passes; auto takes bf16 on GPUs that compute in it, else fp32."""
    qat: str = "none"
    """Simulate the later rounding during training (quantization-aware training with fake quantization)."""
    after_training: str = "none"
    """Quantization of the trained network."""
    head: bool = False
    """Quantize the last linear layer, which computes the logits, too."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How gradients are rounded in int8 training; rounding to nearest always loses small values."""
    weight_gradient: bool = True
    """In int8 training, compute the gradients of weights with int8 products too, otherwise in float32."""
    qat_start: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the training before quantization-aware training starts; a late start (fine-tuning) costs least."""
    calibration: float = Field(default=0.9999, gt=0.5, le=1)
    """Fraction of a layer's inputs that int8_static does not clip, measured by calibration on training samples."""

    @model_validator(mode="after")
    def _methods_exist(self) -> Quantization:
        from labkit.experiment.registry import registry

        for name in ("training", "qat", "after_training"):
            methods = registry(f"quantization.{name}")
            if getattr(self, name) not in methods:
                from labkit.experiment.problem import OptionError, closest

                value = getattr(self, name)
                raise OptionError(
                    name,
                    f"unknown {methods.what} {value!r}; known: {', '.join(methods.names())}",
                    closest(value, methods.names()),
                )
        return self

    def resolve(self, device: str, machine: Machine) -> Quantization:
        """Return a copy with a number format in place of `auto`, for training on this kind of device."""
        if self.training != AUTO:
            return self
        computes_in_bf16 = device == "cuda" and not machine.lacks_capability("bf16 needs", BF16_CAPABILITY)
        # Quantization-aware training simulates its rounding in fp32.
        chosen = "bf16" if computes_in_bf16 and self.qat == "none" else "fp32"
        return self.model_copy(update={"training": chosen})


class Optimizer(Section):
    """How weights are updated."""

    name: Literal["adamw", "sgd"] = "adamw"
    """The optimizer."""
    lr: float = Field(default=1e-3, gt=0, le=1e3)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.01, ge=0, le=10)
    """Strength of the weight decay (decoupled for AdamW)."""
    momentum: float = Field(default=MOMENTUM, ge=0, lt=1)
    """Momentum of SGD."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay rate of AdamW's first moment, the mean of the gradients."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay rate of AdamW's second moment, the mean of their squares."""
    eps: float = Field(default=1e-8, gt=0, le=1)
    """Constant added to AdamW's denominator; gradients far below it hardly change a weight."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the learning rate decays after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0, le=10_000_000)
    """Steps over which the learning rate rises from zero."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Maximum global gradient norm; empty for no clipping."""
    state_bits: Literal[32, 8] = 32
    """Bits per value of the optimizer state."""

    @model_validator(mode="before")
    @classmethod
    def _momentum_was_beta1(cls, data: Any) -> Any:
        """Read what was written before AdamW had a beta1 of its own."""
        if isinstance(data, dict) and "beta1" not in data:
            return beta1_from_momentum(data)
        return data


class Training(Section):
    """The length of the training, its batch, and what is recorded."""

    steps: int | None = Field(default=None, ge=1, le=10_000_000)
    """Number of optimizer steps (give this or epochs)."""
    epochs: float | None = Field(default=None, gt=0, le=100_000)
    """Passes over the training data (give this or steps)."""
    global_batch: int = Field(default=64, ge=1, le=10_000_000)
    """Samples per optimizer step over all ranks; independent of the layout, so that runs can be compared."""
    evaluate_every: int | None = Field(default=None, ge=0, le=10_000_000)
    """Steps between two evaluations on held-out data; empty for about ten evaluations per run, 0 for none."""
    checkpoint_every: int | None = Field(default=None, ge=0, le=10_000_000)
    """Steps between two checkpoints; empty for one at the end only, 0 for none."""
    keep_checkpoints: int = Field(default=2, ge=1, le=1000)
    """Number of latest checkpoints that are kept."""
    gradient_norm: bool = False
    """Record the global gradient norm of every optimizer step."""
    trace_step: int = Field(default=4, ge=0, le=10_000_000)
    """The step, counted from 1, in which each rank records its memory, traffic and pipeline timeline; 0 for none."""
    profile_step: int = Field(default=0, ge=0, le=10_000_000)
    """The step, counted from 1, that torch.profiler records on each rank: a trace that Perfetto opens; 0 for none."""
    shares: Literal["equal", "speed"] = "equal"
    """How a batch is divided among replicas: evenly, or in proportion to the speed of each rank."""
    loader_workers: int = Field(default=0, ge=0, le=256)
    """Processes per rank that prepare batches in advance; with 0, the rank prepares them itself."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the weights, of the order of the samples and of everything else that is random."""

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs (set the other to null)")
        return self


class Network(Section):
    """A link slower than the machine's own, emulated with a private network namespace and a token bucket."""

    rate_mbit: float = Field(gt=0, le=1_000_000)
    """Rate of the link (Mbit/s)."""
    delay_ms: float = Field(default=0.0, ge=0, le=10_000)
    """Delay of the link (ms)."""
    hosts: int = Field(default=1, ge=1, le=1_000_000)
    """Emulated machines: with 1, the slow link connects all ranks; with more, only links between machines are slow."""

    @property
    def interface(self) -> str:
        """The network interface of a rank that leads to the slow link."""
        return "lo" if self.hosts == 1 else "eth0"

    def host(self, rank: int, ranks: int) -> int:
        """Return the host of `rank` out of `ranks`; hosts are filled in order."""
        return rank * self.hosts // ranks


class Launch(Section):
    """Where and how the ranks run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Kind of device: auto uses the GPUs if there are any."""
    threads_per_rank: int = Field(default=1, ge=1, le=1024)
    """CPU threads of each rank; the baseline uses the same number."""
    compile: Literal["auto", "off", "blocks"] = "auto"
    """Compile the model's blocks with torch.compile: auto does so for large models on GPUs, where it pays."""
    transport: Literal["auto", "shared_memory", "network"] = "auto"
    """How replicas on the CPUs of one machine exchange gradients: auto uses shared memory."""
    network: Network | None = None
    """A slower link between the ranks; empty for the machine's own."""
    slowdown: dict[int, float] = {}
    """Ranks slowed down on purpose: {"3": 4} makes rank 3 compute four times slower."""
    isolated: bool = False
    """Ranks train side by side without communication: measures the machine's ceiling, not a training run."""
    max_duration_s: float = Field(default=3600.0, gt=0, le=30 * 86400)
    """Maximum duration of the run (s), after which it is stopped."""
    timeout_s: float = Field(default=60.0, ge=1, le=86400)
    """Maximum time without a heartbeat from a rank before the run is ended and the rank named (s)."""
    grace_s: float = Field(default=10.0, ge=0, le=600)
    """Time a rank gets to finish its step and write a checkpoint after Stop (s)."""

    @field_validator("slowdown")
    @classmethod
    def _no_faster(cls, slowdown: dict[int, float]) -> dict[int, float]:
        for rank, factor in slowdown.items():
            if not 0 <= rank < 1_000_000:
                raise ValueError(f"there is no rank {rank}")
            if not 1 <= factor <= MOST_SLOWDOWN:
                raise ValueError(f"rank {rank} can be made 1 to {MOST_SLOWDOWN} times slower, got {factor:g}")
        return slowdown
