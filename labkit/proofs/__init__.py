"""Proofs that runs compute what they should: parity with one process, case by case, and what methods learn together."""
