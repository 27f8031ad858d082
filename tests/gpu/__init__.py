"""What is run on a machine with an NVIDIA GPU: functional runs, facts of its kernels, and speeds (`make gpu`)."""
