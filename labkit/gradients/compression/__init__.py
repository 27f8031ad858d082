"""Compressors: what is sent of a gradient, one file per method."""
