"""A CUDA that needs no GPU: real numbers on the CPU, and a device label on every storage.

A rank of a run computes as it would on a GPU, as far as Python can see: `tensor.device` and `is_cuda` tell the label.
What would fail on a GPU, or would make it wait, is a finding with file and line:

- an operation on tensors of both devices, and numpy on a tensor of the GPU (operations.py);
- a tensor of the host in a group of NCCL, and send and receive of a GPU's tensors over gloo, which torch does not have;
  messages that are not contiguous or of a type that NCCL does not know; collectives in another order on another rank
  (groups.py);
- a wait of the host for the GPU inside a step, and memory of the GPU that grows from step to step (steps.py).

What it cannot see: kernels, streams, and everything that C++ allocates by itself. `rank.py` runs an experiment on it.
"""
