"""Model architectures on top of the kernels, and where their weights come from."""
