"""Gradients of all ranks added up in buckets, and ZeRO stages 1 and 2 on top of it (Rajbhandari et al. 2020).

| stage | each rank keeps of the                     | reduction of gradients | after the update      |
|-------|--------------------------------------------|------------------------|-----------------------|
| 0     | everything                                 | all-reduce             |                       |
| 1     | 1/N of the optimizer state                 | reduce-scatter         | all-gather parameters |
| 2     | … and 1/N of the gradients                 | reduce-scatter         | all-gather parameters |

(Stage 3, 1/N of the parameters too, is torch's `fully_shard`: see parallel/shard.py.)

A bucket is a stretch of memory that holds the gradients of some parameters one after the other, so that they can be
reduced in one message (bucket.py); with ZeRO such a stretch also holds the parameters themselves, rank r owns its r-th
shard, and the optimizer sees only that shard (zero.py). The reduction of a bucket starts as soon as the last of its
gradients has been computed, while the backward pass continues (gradient_sync.py). Over which ranks gradients are summed
follows from how their parameters are sharded (axes.py).
"""

from labkit.parallel.sync.axes import norm_share, summed_axes
from labkit.parallel.sync.gradient_sync import GradientSync
from labkit.parallel.sync.zero import Zero1Bucket

__all__ = ["GradientSync", "Zero1Bucket", "norm_share", "summed_axes"]
