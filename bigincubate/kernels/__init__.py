"""Custom operators: an eager reference, a Triton kernel for GPUs and, where needed, a formula for the gradient.

Each is a ``torch.library.triton_op``, so ``torch.compile`` can trace it and fuse around it. CPUs run the reference. No
operator has been measured on a GPU yet, so recipes have to opt in.
"""
