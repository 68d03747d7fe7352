"""The hot loops for the CPU, compiled by Numba; `pipeline.kernels.twin` is the readable form."""
