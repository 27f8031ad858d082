"""The events of a run: the name of each, what it means, and its fields with types, bounds and units.

Ranks write an event as one line of JSON in `rank-N.jsonl` (training/events.py); every event has the fields of `HEAD`
too. JSON has neither NaN nor infinity: null stands for a figure that is not finite. Readers trust nothing: a field
whose value is not of its kind counts as missing (`checked_fields` in runs/checked.py). Fields with a structure of their
own, and columns, are checked where they are read (runs/events.py, runs/steps.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

MAX_STEPS = 10_000_000
"""Maximum number of steps of a run that are read."""
MAX_BYTES = 2**62
MAX_COUNT = 2**40


@dataclass(frozen=True)
class Integer:
    """An integer between two bounds, both included."""

    low: int = 0
    high: int = MAX_STEPS

    def __str__(self) -> str:
        return "integer"


@dataclass(frozen=True)
class Number:
    """A finite number between two bounds, both included."""

    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        return "number"


@dataclass(frozen=True)
class Text:
    """A text, of which readers keep the first characters, or the last ones with `keeps_end`."""

    limit: int = 100
    keeps_end: bool = False

    def __str__(self) -> str:
        return "text"


@dataclass(frozen=True)
class Texts:
    """A list of texts."""

    most: int = 20
    limit: int = 400

    def __str__(self) -> str:
        return "list of texts"


@dataclass(frozen=True)
class Words:
    """Texts by name; readers turn numbers into text."""

    most: int = 50

    def __str__(self) -> str:
        return "{name: text}"


@dataclass(frozen=True)
class Figures:
    """Numbers by name; null for one that is not finite."""

    most: int = 4096

    def __str__(self) -> str:
        return "{name: number}"


@dataclass(frozen=True)
class Column:
    """A list with one number per step, null where there is none; all columns of an event are equally long."""

    def __str__(self) -> str:
        return "column"


@dataclass(frozen=True)
class Structure:
    """A value with a structure of its own, described in words."""

    form: str

    def __str__(self) -> str:
        return self.form


Kind = Integer | Number | Text | Texts | Words | Figures | Column | Structure

BYTES = Integer(high=MAX_BYTES)
LARGE_COUNT = Integer(high=MAX_BYTES)
COUNT = Integer(high=MAX_COUNT)
STEP = Integer()
SECONDS = Number(0, 1e9)
COUNTED = Number(0, 1e18)
FLOPS = Number(0, 1e30)


@dataclass(frozen=True)
class Field:
    """One field of an event."""

    name: str
    kind: Kind
    meaning: str
    """Full sentences or phrases with the unit."""


HEAD = (
    Field("event", Text(), "Name of the event."),
    Field("rank", Integer(high=4095), "The rank that wrote it."),
    Field("time", Number(), "When it was written (s since the epoch)."),
    Field("monotonic", Number(), "When it was written, on the machine's monotonic clock (s)."),
)
"""Fields of every event."""


@dataclass(frozen=True)
class Event:
    """One kind of event."""

    name: str
    writers: str
    """The ranks that write it."""
    meaning: str
    fields: tuple[Field, ...]

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """Kinds of all fields by name, those of `HEAD` first."""
        return {field.name: field.kind for field in (*HEAD, *self.fields)}


EVERY_RANK, RANK_0 = "every rank", "rank 0"
_TRAFFIC = Structure("{axis: {name: number}}")
_BY_NETWORK = Structure("{`float` or `quantized`: number}")

_VOCABULARY = (
    Event(
        "rehearsal",
        EVERY_RANK,
        "The task was tried before step 1.",
        (
            Field("seconds", SECONDS, "Duration (s)."),
            Field("unused", Texts(), "Parameters that a pass left without a gradient."),
            Field("built", Text(), "Hash of weights, buffers and samples."),
            Field("model_flops_per_sample", FLOPS, "3 × the products of one forward pass, per sample (rank 0)."),
        ),
    ),
    Event(
        "start",
        EVERY_RANK,
        "A rank is ready to train.",
        (
            Field("device", Text(), "Device of the rank."),
            Field("card", Text(), "Name of its GPU."),
            Field("pid", Integer(high=2**31), "Process id of the rank."),
            Field("threads", Integer(high=2**16), "Number of threads that the rank computes with."),
            Field("host_bytes", BYTES, "Peak resident memory of the rank's process on the host so far (bytes)."),
            Field("parameters", LARGE_COUNT, "Number of parameters of the whole model."),
            Field("first", STEP, "Steps completed before this run; above 0 if it was resumed."),
            Field("steps", Integer(1), "Total number of steps at the end of the run."),
            Field("metric", Structure("{name: value}"), "The main metric: key, title, higher_is_better, unit."),
            Field("facts", Structure("{name: value}"), "What the task reports about its data: counts, files, classes."),
            Field("warnings", Texts(), "What the rehearsal noticed."),
            Field("effective", Words(), "Settings in force: types, compressor, kernels, backend."),
        ),
    ),
    Event(
        "first_step",
        RANK_0,
        "The first step has ended.",
        (Field("seconds", Number(), "Time since the run was requested (s)."),),
    ),
    Event(
        "steps",
        EVERY_RANK,
        "Several consecutive steps, or work items from a queue, as columns.",
        (
            Field("first", STEP, "Number of the first step, counted from 0."),
            Field("loss", Column(), "Mean loss over this rank's samples."),
            Field("samples", Column(), "Number of samples of this rank."),
            Field("seconds", Column(), "Duration (s)."),
            Field("data", Column(), "Time spent waiting for data (s)."),
            Field("forward", Column(), "Forward passes (s)."),
            Field("backward", Column(), "Backward passes, including reductions that are not overlapped (s)."),
            Field("optimizer", Column(), "Optimizer step (s)."),
            Field("compute", Column(), "Time in which this rank computes instead of waiting for others (s)."),
            Field("grad_norm", Column(), "Global norm of the gradient."),
            Field("bytes", Column(), "Bytes sent to combine gradients."),
            Field("exposed", Column(), "Time spent combining gradients while nothing was computed (s)."),
            Field("compression", Column(), "Compression and decompression (s)."),
            Field("lr", Column(), "Learning rate (rank 0)."),
            Field("ticket", Column(), "Number of the item in the work queue, for asynchronous updates."),
            Field("ended", Column(), "When the step or item was completed, on the monotonic clock (s)."),
            Field("staleness", Column(), "Age of the gradients when they were used (optimizer steps)."),
        ),
    ),
    Event(
        "evaluation",
        RANK_0,
        "The model was evaluated on held-out data.",
        (
            Field("step", STEP, "Steps done."),
            Field("metrics", Figures(), "Held-out metrics by key."),
            Field("seconds", SECONDS, "Duration (s)."),
        ),
    ),
    Event(
        "checkpoint",
        RANK_0,
        "A checkpoint was written.",
        (
            Field("step", STEP, "Steps done."),
            Field("path", Text(400), "Its folder, relative to the run directory."),
            Field("seconds", SECONDS, "Duration (s)."),
        ),
    ),
    Event(
        "trace",
        EVERY_RANK,
        "One step was traced.",
        (
            Field("step", Integer(1), "The step, counted from 1."),
            Field("memory", Structure("{kind: bytes}"), "Measured memory by kind of state, and of activations."),
            Field("formula", Structure("{kind: bytes}"), "The same memory by formula, without activations."),
            Field("traffic", _TRAFFIC, "Per axis: calls, bytes, wire_bytes and exposed_seconds of the step."),
            Field(
                "timeline",
                Structure("rows"),
                "Actions of a pipeline: F, B, I or W; stage; micro-batch; start and end on the monotonic clock (s).",
            ),
            Field("experts", Structure("{block: list}"), "By block, how many routing choices each expert got."),
        ),
    ),
    Event(
        "profile",
        EVERY_RANK,
        "torch.profiler recorded one step, or could not.",
        (
            Field("step", Integer(1), "The step, counted from 1."),
            Field("seconds", SECONDS, "Duration, including the cost of recording (s)."),
            Field("file", Text(), "Its chrome trace, relative to the run directory."),
            Field("bytes", BYTES, "Size of that file (bytes)."),
            Field("busy_seconds", SECONDS, "Time in which at least one kernel ran on the GPU (s)."),
            Field("note", Text(400), "Why there is no file."),
        ),
    ),
    Event(
        "communication",
        EVERY_RANK,
        "What this rank communicated, per optimizer step.",
        (
            Field("bytes_per_step", Number(), "Bytes that the rank sends, by the formula of each collective."),
            Field("exposed_seconds_per_step", Number(), "Communication time during which nothing was computed (s)."),
            Field("counted_bytes_per_step", Number(), "Counted bytes sent to combine gradients or weights."),
            Field("formula_bytes_per_step", Number(), "The same bytes by formula."),
            Field("compression_seconds", Number(), "Compression and decompression (s)."),
            Field("method", Text(), "The compressor."),
            Field("axes", _TRAFFIC, "Per axis: calls, bytes, wire_bytes and exposed_seconds."),
        ),
    ),
    Event(
        "sparsity",
        RANK_0,
        "Masks have changed, or a training run with masks has ended.",
        (
            Field("step", STEP, "Steps done."),
            Field("layers", Structure("{weight: [zeros, size, churn]}"), "Churn: share of kept weights that are new."),
        ),
    ),
    Event(
        "link",
        "one rank of each emulated host",
        "What the kernel counted on the emulated network during training.",
        (
            Field("interface", Text(), "Network interface of the slow link."),
            Field("bytes", COUNTED, "Bytes sent through it, including headers and acknowledgements."),
            Field("loopback_bytes", COUNTED, "Bytes sent within the host."),
            Field("seconds", COUNTED, "Time over which bytes were counted (s)."),
            Field("updates", COUNTED, "Optimizer steps of this run."),
        ),
    ),
    Event(
        "effective",
        EVERY_RANK,
        "Settings that took effect, as measured during training.",
        (Field("found", Words(), "Types, products, scales and skipped steps by name."),),
    ),
    Event(
        "numbers",
        "the first rank of each stage",
        "Operands of the layers with matrix products, during an evaluation.",
        (
            Field("step", STEP, "Steps done."),
            Field("samples", COUNT, "Samples of the evaluation."),
            Field("layers", Structure("list"), "Evenly spaced layers: name, shape, types, histograms of the operands."),
            Field("of_layers", COUNT, "Total number of these layers."),
            Field("multiplied", Structure("{words: number}"), "Number of layers by the formats that they multiply."),
            Field("unseen", Words(), "Why a layer could not be observed, by layer."),
        ),
    ),
    Event(
        "quantized",
        RANK_0,
        "The trained network was compared with its quantized copy.",
        (
            Field("seconds", Number(), "Duration (s)."),
            Field("method", Text(), "Method of quantization after training."),
            Field("qat", Text(), "Method of quantization-aware training."),
            Field("layers", COUNT, "Number of converted layers."),
            Field("samples", COUNT, "Held-out samples of the comparison."),
            Field("metrics", Structure("{`float` or `quantized`: {key: number}}"), "Held-out metrics of both."),
            Field("bytes", _BY_NETWORK, "Bytes of both networks."),
            Field("layer_bytes", _BY_NETWORK, "Bytes of the converted layers in both."),
            Field(
                "latency_seconds",
                Structure("{batch size: {`float` or `quantized`: number}}"),
                "Median time of a forward pass (s).",
            ),
            Field("sensitivity", Structure("list of [layer, number]"), "Change in loss when one layer is quantized."),
        ),
    ),
    Event(
        "exported",
        RANK_0,
        "Several forms of the trained sparse network were compared.",
        (
            Field("seconds", Number(), "Duration (s)."),
            Field("samples", LARGE_COUNT, "Held-out samples of the comparison."),
            Field("metrics", Structure("{form: {key: number}}"), "Held-out metrics."),
            Field("bytes", Structure("{form: number}"), "Bytes of the network."),
            Field("layers", Structure("{form: number}"), "Number of layers that the form changes."),
            Field("csr_layers", Structure("{batch size: number}"), "Number of layers that are faster in CSR form."),
            Field("latency_seconds", Structure("{batch size: {form: number}}"), "Median time of a forward pass (s)."),
            Field("fastest", Structure("{batch size: form}"), "The fastest form."),
            Field("saved", Text(), "The form that was saved."),
            Field("file_bytes", BYTES, "Size of the file (bytes)."),
        ),
    ),
    Event(
        "kernels",
        RANK_0,
        "Kinds of layers of a sparse or low-precision run were timed next to dense float32 ones.",
        (
            Field("seconds", Number(), "Duration (s)."),
            Field("kinds", Structure("list"), "Shape, rows, weights, bytes, seconds and dense_seconds of each kind."),
            Field("left_out", Integer(high=2**20), "Number of layers that were not measured."),
            Field("samples", Number(), "Samples per pass of a rank."),
        ),
    ),
    Event(
        "memory",
        EVERY_RANK,
        "The training has ended.",
        (Field("peak_bytes", BYTES, "Peak memory of this rank (bytes)."),),
    ),
    Event(
        "error",
        EVERY_RANK,
        "An exception ended this rank.",
        (
            Field("type", Text(200, keeps_end=True), "Class of the exception."),
            Field("message", Text(2000, keeps_end=True), "Message of the exception."),
            Field("traceback", Text(20_000, keeps_end=True), "Traceback of the exception."),
        ),
    ),
    Event(
        "end",
        EVERY_RANK,
        "This rank has finished.",
        (
            Field("step", STEP, "Steps done."),
            Field("reason", Text(), "`finished` or `stopped`."),
        ),
    ),
)
EVENTS = {event.name: event for event in _VOCABULARY}
"""All events by name, in about the order in which they are written."""
