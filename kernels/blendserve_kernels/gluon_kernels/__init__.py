"""Kernels for Hopper, written in Gluon: warps share out the work. Imported only where such a GPU runs them."""
