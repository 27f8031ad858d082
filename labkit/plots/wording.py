"""Words for the method of a run: how its ranks combined what they learned, over what link, sparse or narrow how."""

from __future__ import annotations

from typing import Any

from labkit.experiment import Experiment
from labkit.experiment.registry import Registry, registry
from labkit.experiment.schema import Gradients
from labkit.plots import theme

PLAIN, DENSE = "plain averaging", "dense float32"
MAX_CHANGES = 4
_UNITS = {"_mb": "MB", "_s": "s", "_ms": "ms"}


def method(experiment: Experiment) -> list[str]:
    """`["PowerSGD rank 1"]`, `["LocalSGD every 16"]`, `["no overlap"]`: what is not the default; [] if nothing is.

    Names are those of the classes that the registries name; options appear where they differ from their defaults.
    """
    gradients = experiment.gradients
    found = []
    for knob, choice, usual in (
        ("gradients.compression", gradients.compression, "none"),
        ("gradients.update", gradients.update, "synchronous"),
    ):
        if choice.method != usual:
            found.append(" ".join([_title(registry(knob), choice.method), *_changed(registry(knob), choice)]))
    for name, info in Gradients.model_fields.items():
        value = getattr(gradients, name)
        if name not in ("compression", "update") and value != info.get_default():
            found.append(_said(name, value))
    return found


def narrowed(experiment: Experiment) -> list[str]:
    """`["int8"]`, `["Static 90 % csr"]`, `["QAT int4", "8 bits of state"]`: what is not dense float32; [] if all is."""
    settings, sparsity = experiment.quantization, experiment.sparsity
    found = []
    if settings.training != "fp32":
        found.append(_title(registry("quantization.training"), settings.training))
    if settings.qat != "none":
        found.append(f"QAT {settings.qat}")
    if experiment.optimizer.state_bits != 32:
        found.append(f"{experiment.optimizer.state_bits} bits of state")
    if sparsity.method != "none":
        options = sparsity.options
        name = f"{_title(registry('sparsity'), sparsity.method)} {100 * sparsity.target:g} %"
        name = f"{options['n']}:{options['m']}" if sparsity.method == "n_m" else name
        found.append(name if options.get("kernel", "dense") == "dense" else f"{name} {options['kernel']}")
    return found


def link(experiment: Experiment) -> list[str]:
    """`["200 Mbit/s", "rank 3 slowed 4 times"]`: what was made slow on purpose."""
    found, network = [], experiment.launch.network
    if network is not None:
        found.append(rate(network.rate_mbit))
        if network.delay_ms:
            found.append(f"{network.delay_ms:g} ms delay")
        hosts = getattr(network, "hosts", 1)
        if hosts > 1:
            found.append(f"{hosts} hosts")
    slowed = getattr(experiment.launch, "slowdown", {})
    return found + [f"rank {rank} slowed {factor:g} times" for rank, factor in slowed.items() if factor != 1]


def rate(mbit: float) -> str:
    """`200 Mbit/s`, `1.50 Gbit/s`."""
    return f"{theme.number(mbit / 1000)} Gbit/s" if mbit >= 1000 else f"{theme.number(mbit)} Mbit/s"


def opening(sentence: str) -> str:
    """A sentence begins with a capital letter; a name that has one inside keeps its own spelling."""
    word = sentence.split(" ", 1)[0]
    return sentence[:1].upper() + sentence[1:] if word.islower() and word.isalpha() else sentence


def _title(methods: Registry, key: str) -> str:
    """As its class is spelled; number formats (`int8`) as their key."""
    target = methods[key].target if key in methods else None
    return target.rpartition(":")[2] if target and key.replace("_", "").isalpha() else key


def _changed(methods: Registry, choice: Any) -> list[str]:
    """The options that are not the defaults of the method."""
    fields = methods.options(choice.method).model_fields if methods[choice.method].available else {}
    changed = [
        _said(name, value)
        for name, value in choice.options.items()
        if name in fields and value != fields[name].get_default(call_default_factory=True)
    ]
    return changed[:MAX_CHANGES]


def _said(name: str, value: Any) -> str:
    """`rank 1`, `no error feedback`, `bucket 5 MB`."""
    for suffix, unit in _UNITS.items():
        if name.endswith(suffix):
            return f"{name.removesuffix(suffix).replace('_', ' ')} {value:g} {unit}"
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}"
