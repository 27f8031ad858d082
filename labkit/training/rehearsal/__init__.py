"""What is tried before step 1, so that a run that cannot work ends in one sentence."""
