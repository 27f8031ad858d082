"""The trial of a task before step 1, so that a run that cannot work ends at once, with one sentence."""
