"""What the exchange of gradients costs a step: hand-written DDP with buckets of several sizes, and with no exchange.

With the default there is one bucket for the 0.75 MB of the vision recipe's model, so it leaves when the backward pass
is over; with small ones the exchange can overlap. Two ranks with one thread each.
"""

from __future__ import annotations

from _common import arguments, by_hand, interleave, median_and_range, ratios, report

STEPS, WARMUP = 100, 20
CASES = {"DDP as it is": "default", "buckets of 0.3 MB": "0.3", "buckets of 0.1 MB": "0.1", "no exchange": "none"}


def main() -> int:
    options = arguments(__doc__ or "")
    figures = interleave(
        {name: lambda bucket=bucket: by_hand(STEPS, WARMUP, bucket) for name, bucket in CASES.items()}, options.repeats
    )
    rows = []
    for name, values in figures.items():
        share = median_and_range(ratios(figures, name, "DDP as it is"))
        rows.append((name, f"{median_and_range([1000 * value for value in values])} ms/step, of DDP {share}"))
    return report("Exchange of gradients, 2 ranks, vision recipe by hand", rows, [], options, figures)


if __name__ == "__main__":
    raise SystemExit(main())
