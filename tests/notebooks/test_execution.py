"""Every lesson as CI runs it: by papermill, without a browser.

After the notebook's own cells the same kernel runs its solutions, wrong answers, and the claims on falsified results.
So one execution shows that the lesson runs, that its solutions are right, and that its checks and assertions bite.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest

from labkit.experiment.machine import Machine
from labkit.quantization.rules import BF16_FLAGS
from tests.notebooks.lesson import LESSONS, Lesson

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(1000)]  # lessons compare times

# A lesson is meant to end within about two minutes on two cores. The limit leaves room for a busy machine, and for
# processors without instructions for bfloat16 and int8, on which these take six to ten times as long as float32.
LIMIT_S = 900
MAX_BYTES = 300_000
APPENDED = ("wrong-", "solved-", "falsified-")
"""How the ids of the tests' own cells begin."""
SMALL = {"steps": 15, "ranks": 2, "ui": "static"}

WRONG: dict[str, list[str]] = {
    "00_start_here": [
        "bytes_with_eight = 8 * weights",
        "impossible = experiment",
        "long_run = many",
    ],
    "01_data_parallelism": [
        "average = lambda gradients, counts: sum(gradients) / len(gradients)",
        "smallest_batch = 1_000_000",
        "fits = base.set({'training.global_batch': 256})",
    ],
    "02_gradient_aggregation": [
        "loses_from = 0.5",
        "ternary = lambda x: x.abs().max() * torch.round(x / x.abs().max())",
        "turns = lambda plain, method: (plain.bytes - method.bytes) / (method.compute - plain.compute) / 1e6",
        "chosen = base.set({'gradients.compression.method': 'int8'})",
        "own = {'method': 'fp16'}",
    ],
    "03_sharded_data_parallelism": [
        "fewest_ranks = 6",
        "clip = lambda parts, limit: [clipped(part, limit) for part in parts]",
        "frugal = base.set({'layout': {'dp_shard': ranks, 'zero_stage': 3}})",
    ],
    "04_tensor_parallelism": [
        "row_layer = lambda xs, ws, bias: sum(nn.functional.linear(x, w, bias) for x, w in zip(xs, ws))",
        "loss_of_parts = lambda parts, targets: sum(cross_entropy(part, targets % 16) for part in parts) / 4",
        "break_even = 12 * 4096",
    ],
    "06_hybrid_parallelism": [
        "neighbours = {'tp': 6, 'pp': 1, 'dp': 7}",
        "legal = illegal.set({'workload.heads': 2})",
        "design = product('dp2·tp2')",
    ],
    "05_pipeline_parallelism": [
        "enough = 132",
        "half = gpipe",
        "better = experiment",
    ],
    "07_asynchronous_updates": [
        "enough = 40",
        "outer = lambda anchor, ends, velocity, lr, momentum: (sum(ends) / len(ends), velocity)",
        "frugal = base.set({'gradients.update': {'method': 'diloco', 'every': 16}})",
    ],
    "08_load_balance": [
        "lengths = [3, 3, 3, 3]",
        "cut = lambda costs, speeds: [len(part) for part in np.array_split(costs, len(speeds))]",
        "capacity = 1.0",
        "factor = lambda samples, batch, ranks: samples / batch",
    ],
    "09_sparse_networks": [
        "lighter_from = 0.5",
        "two_of_four = lambda weight: weight.abs() >= weight.abs().median()",
        "prune = lambda optimizer, weight, mask: weight.data.mul_(mask)",
        "faster = wide.set(rigl(0.98, 'csr'))",
        "own = {'method': 'magnitude'}",
    ],
    "11_long_context_and_experts": [
        "merge = lambda a, b: ((a[0] + b[0]) / 2, torch.logaddexp(a[1], b[1]))",
        "bytes_per_layer = 2 * 8 * (131_072 // 8) * 4_096 * 2",
        "longer = experiment.set({'workload.context': 2 * experiment.workload.context})",
    ],
    "10_quantized_networks": [
        "bits_per_weight = 4",
        "at_random = lambda x, step: torch.round(x / step) * step",
        "spared = sorted(alone, key=alone.get)[:3]",
        "frugal = base.set({'quantization.training': 'pure_bf16'})",
    ],
    "12_putting_it_together": [
        "factor = 5",
        "front = lambda points: [min(range(len(points)), key=lambda at: points[at][1])]",
        "legal = illegal.set({'sparsity.target': 0.8, 'gradients.compression': {'method': 'none'}})",
        "mine_to_defend = plan.set({'sparsity.target': 0.9, 'gradients.compression': {'method': 'none'}})",
    ],
}
"""One plausible wrong answer for every exercise, in order."""

_FAILED = "type('Failed', (), {'state': 'failed'})()"
_LOSSES = "dict(zip(held_out, [{{'loss': loss}} for loss in {}]))"

FALSIFIED: dict[str, list[str]] = {
    "00_start_here": [
        "by_hand = 1e-6",
        f"runs = [*runs[:-1], {_FAILED}]",
        "ranks = ranks + 1",
        "accuracy = {**accuracy, 'many': 0.1}",
        "difference = difference + 0.1",
        "one = many",
        "sent = sent / 2",
        f"path = __import__('pathlib').Path({os.devnull!r})",
    ],
    "01_data_parallelism": [
        "even_error = 1e-6",
        "weighted_error = 1e-6",
        "plain_error = 0.0",
        "no_distance = [1e-12] * UPDATES",
        "distance = [0.0] * UPDATES",
        "together_error = 1e-6",
        "hand_error = 1e-6",
        "ddp_error = 1e-6",
        "proofs = {**proofs, 'even': {**proofs['even'], 'parity': False}}",
        "proofs = {**proofs, 'uneven, two passes': {**proofs['uneven, two passes'], 'global_batch': 32}}",
        "counted = [2 * number for number in counted]",
        "sent = sent / 2",
        f"runs = [*runs[:-1], {_FAILED}]",
        f"held_out = {_LOSSES.format('(2.0, 0.75, 0.4, 1.5)')}",
        f"held_out = {_LOSSES.format('(0.2, 0.45, 0.4, 1.5)')}",
        f"held_out = {_LOSSES.format('(0.2, 0.75, 0.4, 0.4)')}",
    ],
    "02_gradient_aggregation": [
        "stalled = {**stalled, 'largest 5': stalled['everything']}",
        "stalled = {**stalled, 'largest 5, error feedback': stalled['largest 5']}",
        "stalled = {**stalled, 'signs, error feedback': stalled['signs']}",
        "first_error = 0.1",
        "limit_error = limit_error + 1e-3",
        "hand_sent = {**hand_sent, 'signs': 8.0}",
        "hand_end = {**hand_end, 'signs, error feedback': hand_end['signs']}",
        f"timed = {{**timed, 'one bucket': {_FAILED}}}",
        "bucket_bytes = {**bucket_bytes, 'small buckets': 1.0}",
        "per_sample = {**per_sample, 'four passes': per_sample['one bucket']}",
        "proof = {'parity': False}",
        "counted = {**counted, 'topk': (2.0, 1.0)}",
        "sent = {**sent, 'powersgd': sent['plain']}",
        "ends = {**ends, 'fp16': ends['sign, no error feedback']}",
        "ends = {**ends, 'sign': ends['sign, no error feedback']}",
        "update = {**update, 'plain': min(update.values())}",
    ],
    "03_sharded_data_parallelism": [
        "parts_error = 1e-6",
        "clip_error = 0.0",
        "hand_error = {**hand_error, 2: 1e-6}",
        "hand_memory = {**hand_memory, 3: 4.0}",
        "hand_sent = {**hand_sent, 1: 1.5}",
        "proofs = {**proofs, 'stage 2': {**proofs['stage 2'], 'parity': False}}",
        f"runs = {{**runs, 'ZeRO 1': {_FAILED}}}",
        "measured = {**measured, 'ZeRO 2': measured['ZeRO 1']}",
        "measured, expected = ({**one, 'ZeRO 2': one['ZeRO 1']} for one in (measured, expected))",
        "sent = {**sent, 'ZeRO 1': 1.5 * sent['ZeRO 1']}",
        "sent = {**sent, 'ZeRO 3': sent['ZeRO 2']}",
        "activations = {**activations, 'full': activations['none']}",
        "activations = {**activations, 'selective': activations['none']}",
        "apart = 0.1",
        "resume_error = 1e-6",
    ],
    "04_tensor_parallelism": [
        "pair_error = 1e-6",
        "wrong_order = 0.0",
        "heads_error = 1e-6",
        "hand_error = 1e-6",
        "hand = {**hand, 'apart': 0.1}",
        "forgotten = {**forgotten, 'losses': [1.0] * UPDATES}",
        "lost_error = 0.0",
        "forgotten = {**forgotten, 'apart': 0.0}",
        "counted = {name: 2 * size for name, size in counted.items()}",
        "proofs = {**proofs, 'tensor': {**proofs['tensor'], 'parity': False}}",
        "refused = []",
        f"runs = {{**runs, 'tensor': {_FAILED}}}",
        "memory = {**memory, 'tensor': memory['one process']}",
        "memory = {**memory, 'one process': {**memory['one process'], 'activations': 0}}",
        "memory = {**memory, 'tensor and sequence': memory['tensor']}",
        "sent = {**sent, 'tensor and sequence': 2 * sent['tensor']}",
        "formula = formula / 2",
        "sent = {**sent, 'data parallel, twice the batch': 2 * sent['data parallel']}",
        "sent = {**sent, 'tensor, twice the batch': sent['tensor']}",
    ],
    "06_hybrid_parallelism": [
        "groups = {**groups, 'tp': [[0, 3]]}",
        "errors = {**errors, 'column': 1e-6}",
        "errors = {**errors, 'everybody': 0.0}",
        "curves = {**curves, 'everybody': [1.0, 1.0]}",
        "counted = counted / 2",
        "equation = 'cannot read it'",
        "refusals = {**refusals, 'eight halves of four heads': []}",
        "proofs = {**proofs, 'tp2·pp2': {**proofs['tp2·pp2'], 'parity': False}}",
        f"runs = {{**runs, 'dp4': {_FAILED}}}",
        "state = {**state, 'dp4': 8.0}",
        "state = {**state, 'shard4': 16.0}",
        "state = {**state, 'dp2·tp2': 17.0}",
        "along = {**along, 'dp4': {**along['dp4'], 'tp': 1.0}}",
        "along = {**along, 'tp2·pp2': {**along['tp2·pp2'], 'pp': along['tp2·pp2']['tp']}}",
        "along = {**along, 'dp2·tp2': along['dp2·tp2'] | {'dp_replicate': 4.0 * total}}",
        "resume_error = 1e-6",
    ],
    "05_pipeline_parallelism": [
        "cut_error = 1e-6",
        "bubble = lambda timeline: 0.5",
        "ideal = {**ideal, 'naive': ideal['GPipe']}",
        "split = ideal['1F1B']",
        "hand_errors = {**hand_errors, '1F1B': 1e-6}",
        "pipe_error = 1e-6",
        "held = {**held, 'GPipe': 8}",
        "held = {**held, '1F1B': 32}",
        "sent = 2 * sent",
        f"runs = {{**runs, 'zbv': {_FAILED}}}",
        "proofs = {**proofs, 'zbv': {'parity': False}}",
        "bubbles = {**bubbles, 'naive': {'own': 0.1}}",
        "bubbles = {**bubbles, '1f1b': bubbles['naive']}",
        "activations = {**activations, '1f1b': activations['gpipe']}",
        "activations = {**activations, 'naive': activations['1f1b']}",
        "crossed = {**crossed, '1f1b': {'bytes': 1e6}}",
        "sharded_proof = {'parity': False}",
    ],
    "07_asynchronous_updates": [
        "largest = {**largest, 4: 0.5}",
        "largest, theory = ({**each, 16: 0.05} for each in (largest, theory))",
        "limit_error = 1e-6",
        "hand_error = 1e-6",
        "apart = {**apart, 'delay 0': 1e-6}",
        "away = 0.0",
        "hand_sent = {**hand_sent, 4: 1.0}",
        "sent = {**sent, 'gossip': sent['gossip'] + 4}",
        "sent, formula = ({**each, 'synchronous': 8.0} for each in (sent, formula))",
        "sent, formula = ({**each, 'DiLoCo': each['local SGD']} for each in (sent, formula))",
        "link_error = 1.0",
        "served = {**served, 0: served[16]}",
        "served = {**served, 16: (served[4][0], served[16][1])}",
        "served = {**served, 1: (1.0, served[16][1])}",
        f"runs = {{**runs, 'gossip': {_FAILED}}}",
        "named = {**named, 'synchronous': 0}",
        "pieces = {**pieces, 'server 16': [2 * updates, 1]}",
        "pieces = {**pieces, 'gossip': [updates, updates]}",
        "seen = {**seen, 'gossip': seen['gossip'] - 1}",
        "oldest = {**oldest, 'server 0': 1}",
        "curves = {**curves, 'DiLoCo': np.ones(16)}",
    ],
    "08_load_balance": [
        "disagreements = 1",
        "gains = [0.9]",
        "on_paper = {**on_paper, 'blocks': 1.0}",
        "cuts = {**cuts, 'seconds': odd}",
        f"mixtures = {{**mixtures, 'both': {_FAILED}}}",
        "took_stages = {**took_stages, 'blocks': [2.0, 1.0]}",
        "proofs = {**proofs, 'absurd': {'parity': False}}",
        "fits = torch.ones_like(fits)",
        "load = load - 1",
        "balanced = load",
        "history = [1.0, 2.0]",
        "mixtures = {**mixtures, 'balance loss': mixtures['as it comes']}",
        "mixture = mixture.set({'training.global_batch': 64})",
        "habit_proof = {'parity': False}",
        "dealt = dealt + 1",
        "dealt = equal_parts",
        "weighted_error = 1e-6",
        "plain_error = 0.0",
        "share_proof = {'parity': False}",
        "straggler = {**straggler, 'equal shares': 0}",
        "given = {**given, 'equal shares': given['shares by speed']}",
        "given = {**given, 'shares by speed': [samples + 1 for samples in given['shares by speed']]}",
        "given = {**given, 'shares by speed': given['shares by speed'][::-1]}",
        "given = {**given, 'shares by speed': (np.eye(ranks)[:1] - np.eye(ranks)[slow]).T + even_share}",
        "given = {**given, 'backup worker': given['backup worker'][:1]}",
        "given = {**given, 'backup worker': given['equal shares']}",
        "ages = [60, 4]",
    ],
    "09_sparse_networks": [
        "kept_right = {**kept_right, 'the weights': 0.5}",
        "stays_zero = {**stays_zero, 'the weights and their moments; gradients masked': 0.9}",
        "stays_zero = {**stays_zero, 'the weights; gradients masked from then on': 1.0}",
        "found = {**found, 'RigL: largest gradient': [0.5]}",
        "found = {**found, 'SET: anywhere': found['a mask that never changes']}",
        "found = {**found, 'RigL, gradients masked first': [0.9]}",
        "other_choices = [*other_choices, 1]",
        "loss_error = 1e-6",
        "mask_errors = 1",
        "proofs = {**proofs, 'RigL': {'parity': False}}",
        f"runs = {{**runs, 'SET': {_FAILED}}}",
        "counted = {**counted, 'SET': counted['SET'] - [0, 0.1, 0]}",
        "counted = {**counted, 'static': counted['gradual']}",
        "counted = {**counted, 'gradual': counted['gradual'] + [0, 0, 0.1]}",
        "counted = {**counted, 'RigL': counted['RigL'][::-1]}",
        "counted = {**counted, 'RigL': counted['RigL'] * [2, 1, 1]}",
        "counted = {**counted, 'gradual': counted['gradual'][-2:]}",
        "accuracy = {**accuracy, 'static': 0.1}",
        "kernel_error = 1e-2",
        "kernel = {**kernel, 'masked at 90 %': 10.0}",
        "kernel = {**kernel, csr(0.5): 2.0}",
        "kernel = {**kernel, csr(0.98): 1.0}",
        "kernel = {**kernel, csr(0.98): 60.0}",
        "wide_runs = {**wide_runs, csr(0.9): wide_runs['masked at 90 %']}",
        "wide_runs = {**wide_runs, csr(0.95): wide_runs[csr(0.9)]}",
        "used_of_four = used_of_four + 1",
        "late = early",
        "shrink_error = 1e-6",
        "num_weights = {**num_weights, 'shrunk': num_weights['with zeros']}",
    ],
    "11_long_context_and_experts": [
        "block_error = 1e-6",
        "ring_error = 1e-6",
        "work = {**work, 'zig-zag': work['contiguous']}",
        "work = {**work, 'contiguous': work['zig-zag']}",
        "lasts = {**lasts, 'contiguous': lasts['zig-zag']}",
        "computed = [1, 2]",
        "ring_bytes = 2 * ring_bytes",
        "cp_proof = {'parity': False}",
        "activations = [1, 1, 1]",
        "activations = [1, ranks, ranks]",
        "dispatch_error = 1e-6",
        "exchange_error = 1e-6",
        "arrived = arrived + 1",
        "proofs = {**proofs, 'cp·ep': {'parity': False}}",
        f"dealt = [{_FAILED}]",
        "parameters = [parameters[0]] * 2",
        "loads = {'layer_0': arrived}",
    ],
    "10_quantized_networks": [
        "grid_error = {**grid_error, 'ternary, one scale': 1e-6}",
        "error = {**error, 'int8, a scale per row': 0.5}",
        "outlier = {**outlier, 'int4, a scale per row': outlier['int4, a scale per 32']}",
        "cut_differs = 1",
        "ends_at = {**ends_at, 'bf16, to the nearest': 2.0}",
        "ends_at = {**ends_at, 'bf16, at random': 1.0}",
        "product_error = {**product_error, 'gradient of the weight': 1e-3}",
        "product_lost = {**product_lost, 'output': 0.1}",
        "honest = 0.1",
        "through_error = 1e-6",
        "badges = {'measured'}",
        "after = {**after, 8: 1.1 * whole}",
        "after = {**after, 2: whole}",
        "felt = {**felt, 2: after[2]}",
        f"timed = {{**timed, 'int8': {_FAILED}}}",
        "effective = {**effective, 'bf16': {'activations': 'float32'}}",
        "effective = {**effective, 'pure bf16': {'weights': 'float32'}}",
        "effective = {**effective, 'bitnet': {'weight_values': '255'}}",
        "counted = {**counted, 'int8': 0.0}",
        "losses = {**losses, 'int8': 1.2 * losses['fp32']}",
        "memory = {**memory, '8-bit state': memory['fp32']}",
        "memory = {**memory, 'pure bf16': memory['fp32']}",
        "memory = {**memory, 'bf16': memory['pure bf16']}",
        "size = {**size, 'int8_dynamic': size['as trained']}",
        "size = {**size, 'int4_weight_only': (1, 1)}",
        "ptq = {**ptq, 'int8_dynamic': 1.1 * whole}",
        "conversion = {**conversion, 'QAT': conversion['PTQ'] + 0.01}",
        "vnni, dynamic = True, {'batch 512': 0.9}",
    ],
    "12_putting_it_together": [
        "order_matters = {**order_matters, 'mask, average': 0.01}",
        "order_matters = {**order_matters, 'mask, round': 0.0}",
        "hand_error = {**hand_error, 'mask, then clip': 1e-6}",
        "hand_error = {**hand_error, 'clip, then mask': 0.0}",
        "by_hand = {**by_hand, 'clip, then mask': by_hand['clip, then mask'][::-1]}",
        "refusals = {**refusals, 'top-k inside ZeRO 3': []}",
        f"runs = {{**runs, 'layout': {_FAILED}}}",
        "measured = {**measured, '+ compression': {**measured['+ compression'], 'zeros': 0.0}}",
        "measured = {**measured, '+ compression': {**measured['+ compression'], 'products': 'float32'}}",
        "measured = {**measured, '+ compression': {**measured['+ compression'], 'state, bytes a weight': 3.2}}",
        "measured = {**measured, '+ compression': {**measured['+ compression'], 'bytes sent, of the plain ones': 1.0}}",
        "sent = {**sent, '+ format': sent['layout'] / 2}",
        "losses = {**losses, '+ compression': 9.0}",
        "queue = type('Queue', (), {'points': queue.points[:12], 'runs': queue.runs})()",
        "stopped_at = {'finished': 24}",
        "first = {*first, 'another'}",
        "finished = finished - {max(finished - first)}",
        "page = ''",
    ],
}
"""Results as they would be if something were wrong; each must make the claims fail, together all of them."""


def attempt(source: str, before: str = "") -> str:
    """A cell that runs `source` in the notebook after `before`, reports what was asserted, and puts the names back."""
    return "\n".join(
        [
            "import json as _json",
            "_kept = dict(globals())",
            "try:",
            f"    exec({before!r}, globals())",
            f"    exec({source!r}, globals())",
            "    print(_json.dumps({'held': True, 'message': ''}))",
            "except AssertionError as _error:",
            "    print(_json.dumps({'held': False, 'message': str(_error)}))",
            "globals().update(_kept)",
        ]
    )


def extended(lesson: Lesson) -> Any:
    """The notebook with the tests' own cells after its last one."""
    notebook = copy.deepcopy(lesson.notebook)
    for number, (wrong, (_, check, solution)) in enumerate(zip(WRONG[lesson.name], lesson.exercises, strict=True)):
        notebook.cells.append(code_cell(attempt(check.source, wrong), f"wrong-{number}"))
        notebook.cells.append(code_cell(f"{solution}\n\n{check.source}", f"solved-{number}"))
    for number, lie in enumerate(FALSIFIED[lesson.name]):
        notebook.cells.append(code_cell(attempt(lesson.claims, lie), f"falsified-{number}"))
    return notebook


def code_cell(source: str, name: str) -> Any:
    return nbformat.v4.new_code_cell(source, id=name)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Executed:
    """What came out."""

    lesson: Lesson
    path: Path
    messages: str

    def appended(self, prefix: str) -> list[str]:
        """What the tests' own cells printed whose id begins with `prefix`."""
        return [printed(cell) for cell in self._cells() if cell.id.startswith(prefix)]

    def tagged(self, role: str) -> list[str]:
        """What the notebook's cells with this tag printed."""
        return [printed(cell) for cell in self._cells() if role in cell.metadata.get("tags", [])]

    def own(self) -> Any:
        """The executed notebook as a learner would have it, without the tests' own cells."""
        notebook = nbformat.read(self.path, as_version=4)  # type: ignore[no-untyped-call]
        notebook.cells = [cell for cell in notebook.cells if not cell.id.startswith(APPENDED)]
        return notebook

    def _cells(self) -> list[Any]:
        return list(nbformat.read(self.path, as_version=4).cells)  # type: ignore[no-untyped-call]


def printed(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


NARROW = ("10_quantized_networks", "12_putting_it_together")
"""Train in bfloat16 and int8, which takes minutes on processors without instructions for them: there, third tier."""


def lessons() -> list[Any]:
    slow = not BF16_FLAGS & Machine.here().cpu_flags
    return [
        pytest.param(path, id=path.stem, marks=pytest.mark.exhaustive if slow and path.stem in NARROW else ())
        for path in LESSONS
    ]


@pytest.fixture(scope="module", params=lessons())
def executed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executed]:
    lesson = Lesson(request.param)
    folder = tmp_path_factory.mktemp(lesson.name)
    source, target = folder / "extended.ipynb", folder / request.param.name
    nbformat.write(extended(lesson), source)  # type: ignore[no-untyped-call]
    values = SMALL | ({"report": str(folder / "report.html")} if "report" in lesson.parameters else {})
    given = [word for name, value in values.items() for word in ("-p", name, str(value))]
    environment = {
        **os.environ,
        "LABKIT_UI": "static",
        "LABKIT_HOME": str(folder / "home"),
        # The kernel is started by the name `python`: the one that runs these tests.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "papermill", str(source), str(target), "-k", "python3", "--no-progress-bar", *given],
            cwd=folder,  # whatever a notebook writes beside itself lands here
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        yield Executed(lesson, target, done.stderr)
    finally:
        stop = [sys.executable, "-m", "labkit", "stop", "--all"]
        subprocess.run(stop, env=environment, capture_output=True, timeout=60)


def test_it_shows_something_and_stays_small(executed: Executed) -> None:
    assert "unknown parameter" not in executed.messages.lower()
    notebook = executed.own()
    size = len(nbformat.writes(notebook).encode())  # type: ignore[no-untyped-call]
    assert size <= MAX_BYTES, f"{size} bytes executed: a figure carries its library, or a table is too long"
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert "application/vnd.plotly.v1+json" in kinds, "a lesson that shows no figure"
    assert "application/vnd.jupyter.widget-view+json" not in kinds, "static mode shows no widget"
    assert "widgets" not in notebook.metadata
    warned = [output.text for output in outputs if output.get("name") == "stderr"]
    assert not warned, "a learner would see this in red"


def test_its_claims_hold(executed: Executed) -> None:
    assert executed.tagged("claims") == ["All of it held.\n"]


def test_open_exercises_do_not_stop_it(executed: Executed) -> None:
    said = executed.tagged("check")
    assert said == [f"Exercise {number} is still open.\n" for number in range(1, len(said) + 1)]


def test_solutions_pass_their_checks(executed: Executed) -> None:
    said = executed.appended("solved-")
    assert len(said) == len(executed.lesson.exercises)
    assert all(f"Exercise {number} is right" in text for number, text in enumerate(said, 1)), said


def test_wrong_answers_do_not_pass(executed: Executed) -> None:
    verdicts = [json.loads(text.splitlines()[-1]) for text in executed.appended("wrong-")]
    assert len(verdicts) == len(executed.lesson.exercises)
    assert all(not verdict["held"] and verdict["message"] for verdict in verdicts), verdicts


def test_every_claim_fails_on_falsified_results(executed: Executed) -> None:
    """Each lie is noticed, and there is no claim that none of the lies could break."""
    verdicts = [json.loads(text.splitlines()[-1]) for text in executed.appended("falsified-")]
    lies = FALSIFIED[executed.lesson.name]
    believed = [lie for lie, verdict in zip(lies, verdicts, strict=True) if verdict["held"]]
    assert not believed
    assert {verdict["message"] for verdict in verdicts} == executed.lesson.messages


def test_every_lesson_has_lies_and_wrong_answers() -> None:
    """A new lesson comes with both."""
    names = {path.stem for path in LESSONS}
    assert set(FALSIFIED) == names
    assert set(WRONG) == names
