"""One file per method. A method sees tensors of one image and nothing else."""
