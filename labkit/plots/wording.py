"""Names for the settings of a run: its gradient method, its emulated link, its sparsity and precision."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from labkit.experiment import Experiment, own_methods
from labkit.experiment.registry import Registry, registry
from labkit.experiment.sections import AUTO, Gradients
from labkit.plots import theme

PLAIN, DENSE = "plain averaging", "dense float32"
MAX_CHANGES = 4
_UNITS = {"_mb": "MB", "_s": "s", "_ms": "ms"}


def method(experiment: Experiment) -> list[str]:
    """Return the gradient settings that are not the default: `["PowerSGD rank 1"]`, `["no overlap"]`; else [].

    Names are those of the registered classes; options appear if they differ from their defaults.
    """
    gradients = experiment.gradients
    words: list[str] = []
    for knob, choice, default in (
        ("gradients.compression", gradients.compression, "none"),
        ("gradients.update", gradients.update, "synchronous"),
    ):
        if choice.method != default:
            words.append(" ".join([_title(registry(knob), choice.method), *_changed(registry(knob), choice)]))
    return words + changed(
        gradients, [name for name in Gradients.model_fields if name not in ("compression", "update")]
    )


def changed(section: BaseModel, names: Iterable[str]) -> list[str]:
    """Return those of the named settings of a section that differ from their defaults, in words."""
    defaults = type(section).model_fields
    values = {name: getattr(section, name) for name in names}
    return [_setting_in_words(name, value) for name, value in values.items() if value != defaults[name].get_default()]


def low_precision(experiment: Experiment) -> list[str]:
    """Return what is not dense float32, or []: `["int8"]`, `["Static 90 % csr"]`, `["QAT int4", "8 bits of state"]`."""
    settings, sparsity = experiment.quantization, experiment.sparsity
    words = []
    if settings.training not in (AUTO, "fp32"):
        words.append(_title(registry("quantization.training"), settings.training))
    if settings.qat != "none":
        words.append(f"QAT {settings.qat}")
    if experiment.optimizer.state_bits != 32:
        words.append(f"{experiment.optimizer.state_bits} bits of state")
    if sparsity.method != "none":
        options = sparsity.options
        name = f"{_title(registry('sparsity'), sparsity.method)} {100 * sparsity.target:g} %"
        name = f"{options['n']}:{options['m']}" if sparsity.method == "n_m" else name
        words.append(name if options.get("kernel", "dense") == "dense" else f"{name} {options['kernel']}")
    return words


def link(experiment: Experiment) -> list[str]:
    """Return the emulated link and slowed ranks: `["200 Mbit/s", "rank 3 slowed 4 times"]`."""
    words, network = [], experiment.launch.network
    if network is not None:
        words.append(rate(network.rate_mbit))
        if network.delay_ms:
            words.append(f"{network.delay_ms:g} ms delay")
        hosts = getattr(network, "hosts", 1)
        if hosts > 1:
            words.append(f"{hosts} hosts")
    slowed = getattr(experiment.launch, "slowdown", {})
    return words + [f"rank {rank} slowed {factor:g} times" for rank, factor in slowed.items() if factor != 1]


def rate(mbit: float) -> str:
    """Return a link rate as text: `200 Mbit/s`, `1.50 Gbit/s`."""
    return f"{theme.number(mbit / 1000)} Gbit/s" if mbit >= 1000 else f"{theme.number(mbit)} Mbit/s"


def opening(sentence: str) -> str:
    """Return the sentence with a capital first letter, unless it begins with a name in mixed case."""
    word = sentence.split(" ", 1)[0]
    return sentence[:1].upper() + sentence[1:] if word.islower() and word.isalpha() else sentence


def _title(methods: Registry, key: str) -> str:
    """Return the class name of a method; the key for number formats (`int8`)."""
    if own_methods.is_own(key):
        return own_methods.class_name(key)
    target = methods[key].target if key in methods else None
    return target.rpartition(":")[2] if target and key.replace("_", "").isalpha() else key


def _changed(methods: Registry, choice: Any) -> list[str]:
    """Return the options that differ from the defaults of the method, in words."""
    fields = methods.options(choice.method).model_fields
    changed = [
        _setting_in_words(name, value)
        for name, value in choice.options.items()
        if name in fields and value != fields[name].get_default(call_default_factory=True)
    ]
    return changed[:MAX_CHANGES]


def _setting_in_words(name: str, value: Any) -> str:
    """Return a setting in words: `rank 1`, `no error feedback`, `bucket 5 MB`."""
    for suffix, unit in _UNITS.items():
        if name.endswith(suffix):
            return f"{name.removesuffix(suffix).replace('_', ' ')} {value:g} {unit}"
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}"
