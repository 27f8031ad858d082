"""Every refusal of a layout has evidence: what would come out, or what the library would say, without the rule.

EVIDENCE maps what a rule says to a demonstration below the rule. A walk over layouts and over the source of the rules
makes sure that no reason is without one.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.testing._internal.distributed.fake_pg import FakeStore

from labkit.experiment import Experiment, Layout, Machine
from labkit.experiment.layout import AXES
from labkit.experiment.schedules import SCHEDULES
from labkit.gradients.exchange import GradientReducer
from labkit.parallel import context, expert, recompute, rules, tensor
from labkit.parallel.context import Ring
from labkit.parallel.cut import shard_spec_of
from labkit.parallel.mesh import Mesh
from labkit.parallel.stages import minimal_maximum, split_into_stages
from labkit.parallel.sync import GradientSync
from labkit.proofs.cases import FAMILIES
from labkit.workloads import driving, language, vision
from labkit.workloads.base import Blocks
from labkit.workloads.models.experts import MixtureOfExperts
from labkit.workloads.models.gpt import gpt
from labkit.workloads.models.resnet import resnet
from tests.parallel import below

EVIDENCE: dict[str, Callable[[], None]] = {}


def protects_from(*reasons: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register the evidence for rules that say this (regular expressions)."""

    def register(shown: Callable[[], None]) -> Callable[[], None]:
        EVIDENCE.update(dict.fromkeys(reasons, shown))
        return shown

    return register


class Unconnected(Mesh):
    """A place in a layout with nobody to talk to."""

    def __init__(self, rank: int = 0, **sizes: int) -> None:
        super().__init__(Layout(**sizes), rank, "cpu", connect=False)

    def group(self, *axes: str) -> Any:
        return object()


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in model.parameters()]


# -- tensor parallelism -----------------------------------------------------------------------------------------------


@protects_from("no plan for cutting the layers of .+")
def a_foreign_model_stays_whole() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    before = shapes(model)
    tensor.apply(model, Unconnected(tp=2), sequence=False)
    assert shapes(model) == before, "two ranks would do the work of one, both of them all of it"


@protects_from(r"\d+ ranks do not divide the \d+ attention heads", r"\d+ ranks do not divide \w+ \d+$")
def a_rank_would_hold_a_part_of_a_head() -> None:
    heads, width, ranks = 8, 32, 3
    parts = torch.eye(width).chunk(ranks)
    assert [len(part) for part in parts] == [11, 11, 10]
    x = torch.ones(2, 5, width)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        nn.functional.linear(x, parts[0]).view(2, 5, -1, width // heads)


@protects_from(r"\d+ ranks do not divide a vocabulary of \d+")
def tokens_would_meet_the_rows_of_others() -> None:
    table = torch.arange(256.0).unsqueeze(1)
    parts, tokens = table.chunk(3), torch.tensor([171, 172, 255])
    found = torch.zeros(3)
    for index, part in enumerate(parts):  # as VocabParallelEmbedding finds its own tokens
        local = tokens - index * len(part)
        mine = (local >= 0) & (local < len(part))
        found += part[local.where(mine, 0), 0] * mine
    assert found.tolist() != table[tokens, 0].tolist()


@protects_from(r"\d+ ranks do not divide the \d+ channel groups of a width of \d+")
def group_norm_would_see_other_groups() -> None:
    x = torch.randn(2, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = nn.functional.group_norm(x, 4)
    parts = [nn.functional.group_norm(part, 2) for part in x.chunk(3, 1)]  # 4 channels each, 4/3 groups would be due
    assert (torch.cat(parts, 1) - whole).abs().max() > 0.1


@protects_from(r"\d+ ranks do not divide a width of \d+")
def parts_would_not_fit_together() -> None:
    parts = torch.arange(32).chunk(3)
    assert {3 * len(part) for part in parts} == {33, 30}, "gathering makes room for equal parts: 32 is neither"


@protects_from("this network has no sequence to cut")
def channels_would_be_cut_instead() -> None:
    model = resnet(1, 10, 16, 8, 1)
    x = model.blocks["stem"](torch.ones(2, 1, 16, 16))
    rest = list(model.blocks.values())[1]
    with pytest.raises(RuntimeError, match=r"expected input.*to have 8 channels, but got 4"):
        rest(context.zigzag(x, context.SEQUENCE, 0, 2))


@protects_from("does not cut the norms of a model of transformers")
def a_norm_would_learn_from_its_part_of_the_sequence() -> None:
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    gradients = []
    for part in (x, x.chunk(2, 1)[0]):
        norm = nn.RMSNorm(4)
        norm(part).pow(3).sum().backward()
        gradients.append(norm.weight.grad)
    assert not torch.allclose(*gradients), "nobody adds up the parts"


@protects_from(r"\d+ ranks do not divide a sequence of \d+")
def positions_would_be_lost() -> None:
    length, ranks = 7, 2
    room = length // ranks  # as `reduce_scatter_to_sequence_region` makes it
    assert room * ranks < length


# -- context and experts ----------------------------------------------------------------------------------------------


@protects_from("only what ZeRO stage 3 shards can be offloaded to the host's memory")
def buckets_would_stay_where_they_are() -> None:
    parameter = nn.Parameter(torch.zeros(4, device="meta"))
    own = Experiment()
    sync = GradientSync(
        [("one", parameter, shard_spec_of(parameter))],
        Unconnected(),
        0,
        own.gradients,
        GradientReducer(own, own.training.steps),
    )
    [bucket] = sync.buckets
    assert bucket.gradient.device == parameter.device, "nothing tells a bucket to lie elsewhere than its parameters"
    assert "offload" not in inspect.signature(GradientSync).parameters


@protects_from("the ring has no dropout")
def dropout_would_be_left_out() -> None:
    x = torch.randn(1, 1, 8, 4)
    attend = nn.functional.scaled_dot_product_attention
    assert not torch.equal(attend(x, x, x, dropout_p=0.4), attend(x, x, x)), "it changes what is computed"
    with pytest.raises(TypeError, match="dropout_p"):
        Ring(None)(x, x, x, dropout_p=0.4)  # type: ignore[arg-type, call-arg]


@protects_from("no ring for the attention of .+")
def tokens_would_see_their_own_part_only() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    context.apply(model, Unconnected(cp=2))
    x = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, part = model(x, x, x)[0], x[:, :4]
    assert not torch.allclose(model(part, part, part)[0], whole[:, :4])


@protects_from(r"\d+ chunks of one size .* do not divide a sequence of \d+")
def a_rank_would_have_no_second_chunk() -> None:
    with pytest.raises(IndexError):
        context.zigzag(torch.arange(6), 0, 0, 2)


@protects_from("an expert's capacity is counted over whole sequences")
def other_tokens_would_find_room() -> None:
    torch.manual_seed(0)
    model = MixtureOfExperts(8, 4, 2, 0.75, 0.0)
    x = torch.randn(2, 16, 8)
    halves = torch.cat([model(half) for half in x.chunk(2, 1)], 1)
    assert not torch.allclose(halves, model(x))


@protects_from("this network has no experts to distribute")
def nothing_would_be_dealt_out() -> None:
    model = gpt(16, 8, 8, 1, 2)
    before = shapes(model)
    expert.apply(model, Unconnected(ep=2))
    assert shapes(model) == before


@protects_from(r"\d+ ranks do not divide \d+ experts")
def tokens_would_go_to_no_expert() -> None:
    with pytest.raises(RuntimeError, match="invalid for input of size 8"):
        torch.zeros(8).view(
            3, -1
        )  # tokens of every expert, by the rank that holds it: as `TokenDispatcher` counts them


# -- pipeline ---------------------------------------------------------------------------------------------------------


@protects_from("cannot split .+ into blocks")
def there_is_nothing_to_cut() -> None:
    pytest.importorskip("transformers")
    from labkit.workloads.models.transformers import causal_model

    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}
    assert not isinstance(causal_model(config, "", 16, 256, 0), Blocks)


@protects_from(r".+ does not cut .+ blocks into \d+ stages", r"\d+ stages need \d+ blocks, the model has \d+")
def a_stage_would_be_empty() -> None:
    names = ["embed", "layer", "head"]
    with pytest.raises(ValueError, match="do not make the 3 blocks"):
        split_into_stages(names, [1, 1])
    with pytest.raises(ValueError, match="cannot be cut into 4 stages"):
        minimal_maximum([1.0] * 3, 4)


@protects_from(r"\d+ microbatches of one size")
def a_short_microbatch_would_not_fit() -> None:
    if torch.__version__ < (2, 13):
        pytest.skip("under torch 2.11 the other rank waits for the one that failed")
    first, last = below.on_ranks(2, below.unequal_microbatches)["unequal_microbatches"]
    assert last == [8, 4], "eight rows come out of seven samples: the short microbatch keeps a row of the one before"
    assert "Failed to run stage backward" in first


@protects_from("splits the backward pass of a block in two")
def what_was_recomputed_would_be_gone() -> None:
    block = Blocks({"one": nn.Sequential(nn.Linear(4, 4), nn.Tanh())})
    recompute.apply(block, "selective")
    x = torch.ones(2, 4, requires_grad=True)
    weights = list(block.parameters())
    _, parameter_groups = stage_backward_input([block(x).sum()], None, [x], iter(weights))
    with pytest.raises(RuntimeError, match=r"(?s)selective|checkpoint"):
        stage_backward_weight(iter(weights), parameter_groups)


@pytest.fixture(scope="module", autouse=True)
def two_pretended_ranks() -> Iterator[None]:
    """torch's schedules are made, not run: for that a process group that talks to nobody is enough."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def schedule(name: str, stages: int, microbatches: int) -> Any:
    """torch's schedule on rank 0 of two."""
    held = [PipelineStage(nn.Linear(2, 2), 2 * place, 2 * stages, torch.device("cpu")) for place in range(stages)]
    made = getattr(torch_schedules, SCHEDULES[name].torch_class)
    single = issubclass(made, torch_schedules.PipelineScheduleSingle)
    return made(held[0] if single and stages == 1 else held, microbatches, loss_fn=lambda output, target: output.sum())


@protects_from("folds the pipeline and needs exactly 2 stages per rank")
def torch_wants_two_stages() -> None:
    for name in ("zbv", "dualpipev"):
        with pytest.raises(ValueError, match="requires exactly 2 stages per rank, but got 3"):
            schedule(name, 3, 8)


@protects_from("needs at least 2 stages per rank")
def there_would_be_nothing_to_interleave() -> None:
    for name in ("interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble"):
        actions = [action for action in schedule(name, 1, 4).pipeline_order[0] if action is not None]
        assert {action.stage_index for action in actions} == {0}


@protects_from("runs one stage per rank")
def torch_takes_a_single_stage() -> None:
    for name in ("naive", "gpipe", "1f1b"):
        with pytest.raises(AttributeError, match="'list' object has no attribute"):
            schedule(name, 2, 4)


@protects_from("needs at least as many microbatches as stages")
def torch_wants_a_full_pipeline() -> None:
    with pytest.raises(ValueError, match=r"Number of microbatches \(1\) must be greater than or equal"):
        schedule("1f1b", 1, 1)
    with pytest.raises(ValueError, match="at least as many microbatches as stages, but got 3"):
        schedule("dualpipev", 2, 3)


@protects_from(r"needs a multiple of \d+ microbatches")
def torch_wants_whole_rounds() -> None:
    for name in ("interleaved_1f1b", "interleaved_zero_bubble"):
        with pytest.raises(ValueError, match=r"multiple of the number of rounds \(2\), but got 5"):
            schedule(name, 2, 5)


# -- the batch and the processes --------------------------------------------------------------------------------------


@protects_from(r"need at least \d+ samples per update")
def a_rank_without_samples_has_no_loss() -> None:
    loss = nn.functional.cross_entropy(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert str(loss.item()) == str(nan), "and one NaN is enough to spoil the sum of all ranks"


@protects_from("independent copies are defined only for plain data parallelism")
def a_part_of_a_model_would_be_alone() -> None:
    with pytest.raises(KeyError):
        Mesh(Layout(tp=2), 0, "cpu", connect=False).group("tp")


BOUNDS = (
    r"\d+ ranks are more than \d+ times the \d+ (cores|GPUs)",  # what the machine bears
    "gradients on GPUs cannot be exchanged through host memory",  # tests/parallel/test_shared_memory.py
)


@pytest.mark.parametrize(
    "shown", sorted(set(EVIDENCE.values()), key=lambda each: each.__name__), ids=lambda f: f.__name__
)
def test_without_the_rule(shown: Callable[[], None]) -> None:
    shown()


# -- no reason without evidence ---------------------------------------------------------------------------------------


def evidence_for(reason: str) -> list[str]:
    return [said for said in (*EVIDENCE, *BOUNDS) if re.search(said, reason)]


sizes = st.sampled_from([1, 1, 1, 2, 3, 4])
layouts = st.fixed_dictionaries(
    dict.fromkeys(AXES, sizes)
    | {
        "sequence_parallel": st.booleans(),
        "zero_stage": st.sampled_from([1, 2, 3]),
        "schedule": st.sampled_from([name for name, schedule in SCHEDULES.items() if not schedule.asynchronous]),
        "microbatches": st.integers(1, 9),
        "stages_per_rank": st.integers(1, 3),
        "activation_checkpointing": st.sampled_from(["none", "selective", "full"]),
        "cpu_offload": st.booleans(),
        "stage_blocks": st.none() | st.lists(st.integers(0, 4), min_size=1, max_size=6),
    }
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([*FAMILIES, "gpt2"]),
    layouts,
    st.integers(1, 64),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([0.0, 1.25]),
)
def test_every_reason_that_random_layouts_meet(
    family: str, layout: dict[str, Any], batch: int, passes: int, isolated: bool, capacity: float
) -> None:
    if family == "gpt2":
        workload = {"name": "language", "model": "transformers", "transformers_config": {"model_type": "gpt2"}}
    else:
        workload = FAMILIES[family].workload | ({"capacity": capacity} if "experts" in family else {})
    experiment = Experiment().set(
        {
            "workload": workload,
            "layout": layout,
            "training.global_batch": batch,
            "gradients.accumulation": passes,
            "launch.isolated": isolated,
        }
    )
    roomy = replace(Machine.here(), memory_bytes=2**50)  # layouts are on trial, not what this machine can hold
    for problem in experiment.problems(roomy):
        assert evidence_for(problem.reason), f"no evidence for: {problem}"


def said(node: ast.expr) -> Iterator[str]:
    """What the reason of a Problem may read, with 1 for what is filled in."""
    if isinstance(node, ast.IfExp):
        yield from said(node.body)
        yield from said(node.orelse)
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "1" for part in node.values)
    elif isinstance(node, ast.Constant):
        yield str(node.value)


def test_every_reason_in_the_source_of_the_rules() -> None:
    tree = ast.parse(Path(rules.__file__).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Problem"]
    reasons = {reason for call in calls for reason in said(call.args[1])}
    # One sentence for all that tp distributes over ranks; what that is, the workloads describe.
    reasons.remove(tp := "1 ranks do not divide 1")
    sources = [ast.parse(Path(file.__file__).read_text()) for file in (vision, language, driving)]
    for node in (node for source in sources for node in ast.walk(source) if isinstance(node, ast.keyword)):
        if node.arg == "tp_sizes":
            keys = node.value.keys if isinstance(node.value, ast.Dict) else [node.value.key]
            reasons |= {tp[:-1] + words for key in keys for words in said(key)}
        elif node.arg == "keeps_norms_whole":
            reasons |= set(said(node.value))
    assert len(reasons) >= 15
    for reason in reasons:
        assert evidence_for(reason), f"no evidence for: {reason}"


# -- what is not refused because it was made right --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch 2.11's own V-shaped schedules wait for ever")
def test_torch_trains_shards_wrongly_where_the_backward_pass_is_split_and_labkit_does_not() -> None:
    found = below.on_ranks(4, below.sharded_in_torchs_schedules, below.sharded_in_labkits)
    exact = below.alone()
    for theirs, ours in zip(*found.values(), strict=True):
        assert theirs["interleaved_1f1b"] == pytest.approx(exact, abs=1e-12), "torch is right where it is not split"
        for name in below.SPLITTING:
            wrong = [abs(a - b) for a, b in zip(theirs[name], exact, strict=True)]
            assert wrong[0] < 1e-12, "the first loss comes before the first update"
            assert min(wrong[1:]) > 1e-4, "torch has repaired it: `labkit/parallel/shard.py` may become simpler"
        for losses in ours.values():
            assert losses == pytest.approx(exact, abs=1e-12)
