"""Custom operators: an eager reference, a Triton kernel for GPUs and, if needed, a formula for the gradient.

Each operator is a ``torch.library.triton_op``, so ``torch.compile`` can trace it and fuse surrounding operations. CPUs
run the reference. ``docs/gpu.md`` has their speed on a GPU.
"""
