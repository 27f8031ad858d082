"""The networks, one file each. They import torch; only ranks, tests and notebooks import them."""
