"""Triton kernels, one operation a file, each beside a twin in plain torch that says what it computes."""
