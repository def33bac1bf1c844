"""What Triton's interpreter needs to run the kernels on CPU tensors as a GPU would."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Within it, the interpreter multiplies bfloat16 as numbers. It keeps them as the integers of their bits."""
    import triton.language as tl
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, wide(a), wide(b), *others)

    with mock.patch.object(interpreter.InterpreterBuilder, "create_dot", create_dot):
        yield
