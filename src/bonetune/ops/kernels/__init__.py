"""Triton kernels for what no library product does, one file a kernel's family, each beside its equations.

They are called through `bonetune.ops.operators`; nothing else imports this room, for it needs Triton. Each takes contiguous
matrices in bfloat16, float16 or float32 and accumulates in float32. What several programs contribute to is summed in a second
pass in a fixed order, so that the same input gives the same bits.
"""
