"""labkit: a laboratory for parallel training of neural networks that lives in notebooks."""

__version__ = "0.1.0"
