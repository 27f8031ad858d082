"""Measurements after the training: the trained network in other forms."""
