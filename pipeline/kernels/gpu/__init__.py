"""The hot loops for NVIDIA GPUs, in Triton; `pipeline.kernels.twin` is the readable form.

One program is one row and, for groups, one warp: what belongs to the row alone is a scalar, loops
end with the row's own last event, and reductions stay inside the warp. Products and sums are kept
apart (no fused multiply-add), so that results agree with the plain form.
"""
