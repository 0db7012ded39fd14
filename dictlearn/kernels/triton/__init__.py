"""The kernels for GPUs, in Triton; imported only where they are used. Public ones are in the modules above."""
