"""Random experiments: each one is finished and sane, or refused in one sentence before its first step.

Every section is drawn: workloads (built in and a person's own, some of them odd on purpose), layouts of 1 to 4 ranks,
accumulation, compression, update rules, sparsity, number formats, optimizers, evaluation, checkpoints, loaders. What
the rules refuse is mended with the nearest legal values that they name, in nine of ten experiments, and then run.
Experiment number n of a seed is always the same. Outcomes go to a file of JSON lines, and what stands there is not run
again: `--from 40 --count 20` runs single ones. Exit code 1 if there is a finding.

    python tests/benchmarks/fuzz_experiments.py --seed 1 --count 500 --output fuzz.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from labkit.experiment import Experiment, ExperimentError
from labkit.experiment.registry import registry
from labkit.launch import launch, warm
from labkit.proofs.cases import LLAMA, TEXT
from labkit.runs import Run
from labkit.runs.processes import alive

ODD = Path(__file__).resolve().parents[1] / "training" / "odd_tasks.py"
GOOD = ("finished", "refused")
FINE = ("plain", "with_state", "drawn_by_numpy_and_random", "augmented", "unused", "alternating", "sometimes")
ODDER = (
    *("by_chance", "one_number", "empty_parameter", "sparse_rows", "old_weight_norm", "new_weight_norm", "two_outputs"),
    *("label_missing", "ragged", "other_weights", "other_split", "everything_frozen", "lazy", "integer_parameter"),
)
LIMIT_S = 120.0
TORCHS_WORDS = ("torch._C", "INTERNAL ASSERT", "LazyModule", "report a bug", "find_unused_parameters")
"""No refusal of labkit has them: they are those of torch's own errors."""
RISES = 1.5
"""How many times as large as in the beginning a loss may be at the end, on a rate of learning that is small."""
VARYING = ("other_weights", "with_state")
"""Tasks whose losses of a few samples vary more than that: weights of N(0, 1), other ones each time, or an output that
a random number scales. By hand in torch, 31 of 400 trainings of the first (six steps of six samples) and 37 of 300 of
the second (two steps of four) end above the bound, so only their finiteness is judged.
"""


def draw(seed: int, number: int) -> Experiment:
    """Experiment `number` of the row that `seed` makes."""
    chance = random.Random(f"{seed} {number}")
    pick = chance.choice
    ranks = pick([1, 2, 2, 2, 3, 4])
    fields: dict[str, Any] = {
        "workload": _workload(chance),
        "layout": _layout(chance, ranks),
        "training.steps": chance.randint(2, 8),
        "training.global_batch": pick([4, 6, 8, 12, 12, 24]),
        "training.evaluate_every": pick([None, 0, 1, 3]),
        "training.checkpoint_every": pick([None, 0, 2]),
        "training.loader_workers": pick([0, 0, 0, 1]),
        "training.gradient_norm": pick([False, True]),
        "training.seed": pick([0, 1, 7, 2**31 - 1, chance.randrange(2**31)]),
        "training.shares": pick(["equal", "equal", "equal", "speed"]),
        "training.trace_step": pick([0, 1, 4]),
        "gradients.accumulation": pick([1, 1, 1, 2, 3]),
        "gradients.bucket_mb": pick([25.0, 25.0, 0.01]),
        "gradients.overlap": pick([True, True, False]),
        "gradients.compression.method": _method(chance, "gradients.compression", "none", 0.25),
        "gradients.update.method": _method(chance, "gradients.update", "synchronous", 0.3),
        "sparsity.method": _method(chance, "sparsity", "none", 0.3),
        "quantization.training": _method(chance, "quantization.training", "fp32", 0.3),
        "quantization.qat": pick(["none", "none", "none", "none", "int8", "int4"]),
        "quantization.after_training": _method(chance, "quantization.after_training", "none", 0.15),
        "optimizer.name": pick(["adamw", "adamw", "sgd"]),
        "optimizer.state_bits": pick([32, 32, 32, 8]),
        "optimizer.lr": pick([1e-3, 3e-3]),
        "optimizer.clip_norm": pick([None, 1.0]),
        "optimizer.warmup_steps": pick([0, 1]),
        "launch.device": "cpu",
        "launch.transport": pick(["auto", "auto", "network"]),
        "launch.timeout_s": 40.0,
        "launch.max_duration_s": LIMIT_S,
    }
    if fields["sparsity.method"] != "none":
        fields["sparsity.target"] = pick([0.25, 0.5, 0.75])
    experiment = Experiment().set(fields)
    return mended(experiment) if chance.random() < 0.9 else experiment


def mended(experiment: Experiment) -> Experiment:
    """The experiment with the nearest legal values that its problems name, as far as they name any."""
    for _ in range(12):
        nearest = [problem for problem in experiment.problems() if problem.nearest is not None and problem.field]
        if not nearest:
            break
        try:
            experiment = experiment.set({nearest[0].field: nearest[0].nearest})
        except ExperimentError:
            break
    return experiment


def _method(chance: random.Random, name: str, usual: str, part: float) -> str:
    """The usual method, or one of the others with the probability `part`."""
    others = [method for method in registry(name).names() if method != usual]
    return chance.choice(others) if chance.random() < part else usual


def _workload(chance: random.Random) -> dict[str, Any]:
    kind = chance.choice(["vision", "vit", "gpt", "experts", "llama", "driving", "own", "own", "own", "odd"])
    if kind in ("vision", "vit"):
        small = {"name": "vision", "image_size": 8, "shift": chance.choice([0, 1])}
        return small | ({"width": 4, "depth": 1} if kind == "vision" else {"model": "vit", "width": 16, "patch": 4})
    if kind == "driving":
        return {"name": "driving", "width": 16, "depth": chance.choice([2, 3]), "episodes": 1}
    if kind in ("own", "odd"):
        return {"name": "custom", "path": f"{ODD}:{chance.choice(FINE if kind == 'own' else ODDER)}"}
    if kind == "llama":
        return TEXT | {"model": "transformers", "transformers_config": LLAMA, "context": 16}
    gpt = TEXT | {"width": 16, "depth": chance.choice([2, 4]), "heads": 4, "context": 16}
    return gpt | ({"experts": 4} if kind == "experts" else {"tied": chance.choice([False, True])})


def _layout(chance: random.Random, ranks: int) -> dict[str, Any]:
    sizes = dict.fromkeys(("dp_replicate", "dp_shard", "tp", "cp", "ep", "pp"), 1)
    left = ranks
    while left > 1:
        factor = chance.choice([size for size in (2, 3, 4) if left % size == 0])
        sizes[chance.choice(["dp_replicate", "dp_replicate", "dp_shard", "dp_shard", "tp", "cp", "ep", "pp"])] *= factor
        left //= factor
    more: dict[str, Any] = {"zero_stage": chance.choice([1, 2, 3])} if sizes["dp_shard"] > 1 else {}
    if sizes["pp"] > 1:
        more |= {
            "schedule": chance.choice(registry("layout.schedule").names()),
            "microbatches": chance.choice([1, 2, 4]),
            "stages_per_rank": chance.choice([1, 1, 2]),
        }
    return sizes | more | {"activation_checkpointing": chance.choice(["none", "none", "none", "full"])}


def outcome(experiment: Experiment) -> tuple[str, str]:
    """`finished`, `refused` or `FINDING`, and why."""
    try:
        run = launch(experiment, baseline=None)
    except ExperimentError as error:
        sentences = [str(problem) for problem in error.problems]
        bad = next((text for text in sentences if "\n" in text or "Traceback" in text or not text.strip()), None)
        return ("FINDING", f"refused in more than a sentence: {bad}") if bad else ("refused", sentences[0])
    try:
        run.wait(LIMIT_S + 40)
    except TimeoutError:
        run.stop(0)
        return "FINDING", "no terminal state in time"
    problem = implausible_end(run) or left_behind(run)
    if problem:
        return "FINDING", problem
    return ("finished", "") if run.state == "finished" else ("refused", str((run.cause or {})["message"]))


def implausible_end(run: Run) -> str:
    """Return what is implausible about the end of a run; '' if all is well."""
    experiment, cause = run.experiment, run.cause or {}
    if run.state != "finished":
        message = str(cause.get("message"))
        if cause.get("kind") != "task":
            return f"{run.state}, {cause.get('kind')}: {message}"
        if "\n" in message or "Traceback" in message or run.data().steps:
            return f"refused, but not in one sentence before the first step: {message}"
        return f"refused in torch's words: {message}" if any(word in message for word in TORCHS_WORDS) else ""
    summary = run.summary()
    losses = [value for _, value in summary["loss"]]
    if not losses or any(value is None or not math.isfinite(value) for value in losses):
        return f"the loss is no finite number: {losses}"
    varies = str(experiment.workload.options.get("path", "")).rpartition(":")[2] in VARYING
    if not varies and losses[-1] > RISES * losses[0] + 0.5:
        return f"the loss rises from {losses[0]:.3g} to {losses[-1]:.3g}"
    accuracy = summary.get("accuracy")
    if accuracy is not None and not 0 <= accuracy <= 1:
        return f"the accuracy is {accuracy}"
    if run.data().steps != experiment.training.steps and experiment.gradients.update.method != "hogwild":
        return f"{run.data().steps} steps are on record, {experiment.training.steps} were asked for"
    out_of_reach = any("out of reach" in note for note in summary.get("notes") or [])  # said before the first step
    return _effective(experiment, summary.get("effective") or {}, out_of_reach)


def _effective(experiment: Experiment, effective: dict[str, Any], out_of_reach: bool) -> str:
    """What was asked for and was not in force, without a word about it; empty if there is nothing."""
    method = experiment.gradients.compression.method
    idle = any(warning.field.startswith("gradients.compression") for warning in experiment.warnings())
    if method != "none" and not idle and method not in str(effective.get("compressor")):
        return f"compression {method} was asked for, effective is {effective.get('compressor')}"
    if experiment.sparsity.method != "none" and not effective.get("sparsity") and not out_of_reach:
        return f"sparsity {experiment.sparsity.method} was asked for, effective is {effective.get('sparsity')}"
    return ""


def left_behind(run: Run) -> str:
    """What is still there of a run that has ended."""
    status = run.status
    processes = [*(status.get("ranks") or []), *filter(None, [status.get("supervisor")])]
    deadline = time.monotonic() + 10
    while (living := [entry for entry in processes if alive(entry)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    partial = list(run.directory.checkpoints.glob(".*"))
    return f"left behind: {living or partial}" if living or partial else ""


def command(experiment: Experiment) -> str:
    """The experiment as JSON in one line: `labkit run FILE.json` runs it again."""
    return experiment.to_json(indent=None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--from", type=int, default=0, dest="first", help="number of the first experiment")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--output", type=Path, default=Path("fuzz.jsonl"), help="where outcomes are kept")
    options = parser.parse_args()
    os.environ["LABKIT_HOME"] = tempfile.mkdtemp(prefix="labkit-fuzz-")
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    results = {(line["seed"], line["number"]): line for line in map(json.loads, lines)}
    warm(120)
    for number in range(options.first, options.first + options.count):
        if (options.seed, number) in results:
            continue
        experiment, begun = draw(options.seed, number), time.monotonic()
        kind, reason = outcome(experiment)
        line = {"seed": options.seed, "number": number, "outcome": kind, "reason": reason}
        line |= {"seconds": round(time.monotonic() - begun, 2)}
        if kind not in GOOD:
            line["experiment"] = experiment.to_dict()
            print(f"{number}: {reason}\n  {command(experiment)}", file=sys.stderr, flush=True)
        results[options.seed, number] = line
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    counts = Counter(line["outcome"] for line in results.values())
    print(json.dumps(counts))
    return 1 if counts["FINDING"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
