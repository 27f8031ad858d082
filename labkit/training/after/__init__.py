"""What is measured once the training is over: the trained network in other forms."""
