"""Custom operators: an eager reference, a Triton kernel for GPUs and, if needed, a formula for the gradient.

Each operator is a ``torch.library.triton_op``, so ``torch.compile`` can trace it and fuse surrounding operations. CPUs
run the reference. No operator has been measured on a GPU yet, so recipes must enable them.
"""
