"""Compressors, which decide what is sent of a gradient: one file per method."""
