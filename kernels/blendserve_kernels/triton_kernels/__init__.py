"""The kernels in Triton and their launchers. Imported only once a tensor lies on a GPU: a CPU host needs no Triton."""
