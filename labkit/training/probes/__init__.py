"""What is measured in single steps of a run, on request."""
