"""What to run, as data: the `Experiment` and its sections.

Every field's docstring is the tooltip of the form and the description that `labkit fields` prints. Sizes and ranges are
checked here; combinations are checked by `rules.py`.

A section that names a method has a default factory, never a default: to make one is to load the method's module, and
importing the schema must load none (a method's own module imports the schema's neighbours).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from labkit.experiment import own_methods, safe_files
from labkit.experiment.choice import Choice
from labkit.experiment.layout import Layout
from labkit.experiment.old_names import MOMENTUM, beta1_from_momentum, schedule_from_update_rule, with_new_names
from labkit.experiment.problem import ExperimentError, Problem, explain, unknown

if TYPE_CHECKING:
    from labkit.experiment.machine import Machine
    from labkit.experiment.run_directory import RunDirectory

SCHEMA_VERSION = 1
MOST_SLOWDOWN = 1000
MAX_SOURCE = 1_000_000


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
    """How the weights to be set to zero are chosen."""
    target: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the weights that are zero at the end."""
    export: bool = False
    """After training, convert the network to its fastest form and compare it with the dense one."""


class Quantization(Section):
    """The precision of weights, activations and gradients."""

    training: str = "fp32"
    """Number format of the forward and backward passes."""
    qat: str = "none"
    """Simulate the later rounding during training (quantization-aware training with fake quantization)."""
    after_training: str = "none"
    """Quantization of the trained network."""
    head: bool = False
    """Quantize the last linear layer, which computes the logits, too."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How gradients are rounded in int8 training; rounding to nearest loses small values every time."""
    weight_gradient: bool = True
    """In int8 training, compute the gradients of weights with int8 products too, otherwise in float32."""
    qat_start: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the training before quantization-aware training starts; a late start (fine-tuning) loses least."""
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
    """Decay rate of AdamW's mean of the gradients."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay rate of AdamW's mean of their squares."""
    eps: float = Field(default=1e-8, gt=0, le=1)
    """Constant added to AdamW's denominator; gradients far below it hardly move a weight."""
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
    shares: Literal["equal", "speed"] = "equal"
    """How a batch is divided among replicas: evenly, or in proportion to the speed of each rank."""
    loader_workers: int = Field(default=0, ge=0, le=256)
    """Processes per rank that prepare batches ahead; with 0 the rank prepares them itself."""
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
    """Emulated machines: 1 puts the slow link between all ranks; with more, only links between machines are slow."""

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
    """Maximum duration of the run (s); it is stopped then."""
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


class Experiment(Section):
    """Everything that defines a run. Frozen; `replace()` makes a changed copy; `problems()` says why it cannot run."""

    schema_version: int = SCHEMA_VERSION
    """Version of this format."""
    name: str = Field(default="", max_length=200)
    """A title for people; free text."""
    workload: Workload = Field(default_factory=Workload)
    layout: Layout = Layout()
    gradients: Gradients = Field(default_factory=Gradients)
    sparsity: Sparsity = Field(default_factory=Sparsity)
    quantization: Quantization = Field(default_factory=Quantization)
    optimizer: Optimizer = Optimizer()
    training: Training = Training(steps=100)
    launch: Launch = Launch()
    code: dict[str, str] = {}
    """Source of the notebook cells that define methods of this experiment, by method; filled in by itself."""

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, data: Any) -> Any:
        return schedule_from_update_rule(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _carries_its_code(self) -> Experiment:
        code = {key: self.code.get(key) or own_methods.source(knob, key) for knob, key in self.own_method_keys()}
        code = {key: text for key, text in code.items() if text}
        if any(len(text) > MAX_SOURCE for text in code.values()):
            raise ValueError(f"the source of a method may have {MAX_SOURCE} characters at most")
        object.__setattr__(self, "code", code)  # the one thing that follows from the rest
        return self

    def own_method_keys(self) -> list[tuple[str, str]]:
        """Return knob and key of each chosen method that does not come with labkit (own_methods.py)."""
        from labkit.experiment.registry import open_registries

        chosen = ((methods.knob, self.get(methods.field)) for methods in open_registries())
        return [(knob, key) for knob, key in chosen if own_methods.is_own(key)]

    @field_validator("schema_version")
    @classmethod
    def _readable_version(cls, version: int) -> int:
        if version != SCHEMA_VERSION:
            raise ValueError(f"this labkit reads schema version {SCHEMA_VERSION}, the file has {version}")
        return version

    # -- in and out -------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, data: Any) -> Experiment:
        """Build an experiment from nested dicts; raises ExperimentError with one sentence per problem."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ExperimentError(explain(error, cls)) from None

    @classmethod
    def from_json(cls, text: str | bytes) -> Experiment:
        """Read an experiment from JSON text; raises ExperimentError."""
        try:
            data = safe_files.from_json(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
        except ValueError as error:
            raise ExperimentError([Problem("", _no_json(error))]) from None
        return cls.from_dict(data)

    @classmethod
    def load(cls, path: str | Path) -> Experiment:
        """Read a JSON file that the user names (a link or a pipe is allowed), at most 8 MiB; raises ExperimentError."""
        most = safe_files.MAX_JSON_BYTES
        try:
            with open(path, "rb") as file:
                text = file.read(most + 1)
            if len(text) > most:
                raise ValueError(f"it is larger than {most / 2**20:g} MiB")
            text.decode("utf-8")
        except (OSError, ValueError) as error:
            why = _no_json(error) if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", "") or error
            raise ExperimentError([Problem("", f"cannot read the experiment from {path}: {why}")]) from None
        return cls.from_json(text)

    @classmethod
    def of_run(cls, directory: RunDirectory) -> Experiment:
        """Return the experiment stored in a run directory; raises ExperimentError, which names the run.

        The directory may come from anywhere: see labkit.experiment.safe_files.
        """
        try:
            text = safe_files.read_bytes(directory.experiment, safe_files.MAX_JSON_BYTES)
            return cls.from_dict(safe_files.from_json(text))
        except ExperimentError as error:
            why = "; ".join(map(str, error.problems))
        except OSError as error:
            why = error.strerror or str(error)
        except ValueError as error:
            why = _no_json(error)
        raise ExperimentError([Problem("", f"the experiment of run {directory.id} cannot be read: {why}")])

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts of JSON values; `code` is there only if there is any."""
        data = self.model_dump(mode="json")
        if not data["code"]:
            del data["code"]
        return data

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    # -- changed copies ---------------------------------------------------------------------------------------------

    def replace(self, *assignments: str, **values: Any) -> Experiment:
        """Return a changed copy: `replace("layout.dp_replicate=2", "training.steps=50")`.

        An assignment is `section.field=value` with the value in JSON (a bare word is a string), as after `--set` on the
        command line. Keyword arguments name top-level fields. Raises ExperimentError and leaves `self` unchanged.
        """
        data = self.to_dict()
        for key, value in values.items():
            if key not in type(self).model_fields:
                raise ExperimentError([unknown(key, key, type(self).model_fields)])
            data[key] = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        for text in assignments:
            field, value = parse_assignment(text)
            _assign(data, field, value)
        return type(self).from_dict(with_new_names(data, [parse_assignment(text)[0] for text in assignments]))

    def set(self, changes: Mapping[str, Any]) -> Experiment:
        """Return a changed copy from `{"layout.dp_replicate": 2}`: like `replace`, with values as Python objects."""
        data = self.to_dict()
        for field, value in changes.items():
            # A copy: a later change may go into what an earlier one has brought, and that belongs to the caller.
            _assign(data, field, value.model_dump(mode="json") if isinstance(value, BaseModel) else deepcopy(value))
        return type(self).from_dict(with_new_names(data, changes))

    def get(self, field: str) -> Any:
        """Return the value at a dotted name."""
        value: Any = self
        for part in field.split("."):
            if not hasattr(value, part):
                raise ExperimentError([Problem(field, f"there is no field {part!r} here")])
            value = getattr(value, part)
        return value

    def resolve(self, machine: Machine | None = None, world_size: int | None = None) -> Experiment:
        """Return a copy with nothing left open: the device is chosen and the axis that is -1 has its size.

        Raises ExperimentError if the sizes do not make the number of ranks.
        """
        from labkit.experiment.machine import Machine

        machine = machine or Machine.here()
        device = machine.device(self.launch.device)
        layout = self.layout
        try:
            if world_size is not None:
                layout = layout.resolve(world_size)
            elif -1 in layout.sizes.values():
                layout = layout.resolve(max(1, machine.slots(device)))
        except ValueError as error:
            raise ExperimentError([Problem("layout", str(error))]) from None
        return self.model_copy(update={"layout": layout, "launch": self.launch.model_copy(update={"device": device})})

    # -- judgement --------------------------------------------------------------------------------------------------

    def problems(self, machine: Machine | None = None) -> list[Problem]:
        """Return every reason why this experiment cannot run on `machine` (this one, if None); empty if it can."""
        from labkit.experiment.rules import problems

        return problems(self, machine)

    def warnings(self, machine: Machine | None = None) -> list[Problem]:
        """Return what will run but may not mean what the user expects, e.g. more ranks than cores."""
        from labkit.experiment.rules import warnings

        return warnings(self, machine)

    def check(self, machine: Machine | None = None) -> Experiment:
        """Return the resolved experiment, or raise ExperimentError if it has any problem."""
        problems = self.problems(machine)
        if problems:
            raise ExperimentError(problems)
        return self.resolve(machine)

    @property
    def title(self) -> str:
        """The user's name for the run, or the workload and the layout."""
        return self.name or f"{self.workload.name} {self.layout}"

    def __str__(self) -> str:
        length = f"{self.training.steps} steps" if self.training.steps else f"{self.training.epochs:g} epochs"
        return f"{self.title}: {length} of {self.training.global_batch} samples on layout {self.layout}"


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split `section.field=value` into the field and its value, parsed as JSON or else kept as a string."""
    field, equals, value = text.partition("=")
    if not equals or not field.strip():
        raise ExperimentError([Problem("", f"cannot read {text!r}; write section.field=value")])
    try:
        return field.strip(), json.loads(value)
    except (ValueError, RecursionError):
        return field.strip(), value


def _assign(data: dict[str, Any], field: str, value: Any) -> None:
    """Store `value` at the dotted `field`. Choosing another method drops the options of the old one."""
    parts = field.split(".")
    place: Any = data
    model: Any = Experiment
    for depth, part in enumerate(parts[:-1]):
        model = _section(model, part)
        if model is None or not isinstance(place, dict):
            candidates = _fields_at(Experiment, parts[:depth])
            raise ExperimentError([unknown(field, part, candidates, "section")])
        if place.get(part) is None:
            place[part] = {}
        elif model is Layout and isinstance(place[part], str):
            try:
                place[part] = Layout.read_short_form(place[part])
            except ValueError as error:
                raise ExperimentError([Problem("layout", str(error))]) from None
        elif not isinstance(place[part], dict):
            section, inner = ".".join(parts[: depth + 1]), parts[depth + 1]
            raise ExperimentError([Problem(section, f"was set to {place[part]!r}, which has no field {inner}")])
        place = place[part]
    last = parts[-1]
    if isinstance(model, type) and issubclass(model, Choice):
        if last == model.SELECTOR and place.get(last) != value:
            for option in [name for name in place if name not in model.model_fields]:
                del place[option]
    elif last not in getattr(model, "model_fields", {last: None}):
        raise ExperimentError([unknown(field, last, model.model_fields)])
    if (field, value is not None) in (("training.steps", True), ("training.epochs", True)):
        # The two exclude each other: setting one clears the other, so that a recipe's length can be changed.
        place["epochs" if last == "steps" else "steps"] = None
    place[last] = value


def _section(model: Any, part: str) -> Any:
    """Return the model class of the section `part` of `model`, or None if there is none."""
    field = getattr(model, "model_fields", {}).get(part)
    if field is None:
        return None
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _fields_at(model: Any, parts: list[str]) -> list[str]:
    """Return the names of the sections at the path `parts` below `model`."""
    for part in parts:
        model = _section(model, part)
    return [name for name in getattr(model, "model_fields", {}) if _section(model, name)]


def _no_json(error: Exception) -> str:
    """Return in a clause why a text is not JSON."""
    return "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"this is not JSON ({error})"
