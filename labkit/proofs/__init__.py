"""Proofs that runs compute what they should: parity with one process, and combinations of methods that learn."""
