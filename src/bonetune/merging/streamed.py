"""A merge that never holds the model: each file of the base model is read, changed and written beside, a few rows at a time."""

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from bonetune.errors import RunError
from bonetune.formats.checkpoint import DTYPES, Stored
from bonetune.merging.plan import Change, Output, Plan
from bonetune.merging.staging import Staging
from bonetune.ops import merge_rows, row_pieces

# What one thread reads, changes and writes at a time: elements of a weight, bytes of what is only copied.
_PIECE_ELEMENTS, _COPY_BYTES, _HASH_BYTES = 1 << 22, 1 << 26, 1 << 22
# After so many bytes, the disk begins to take what is written; the last fsync has little left to do then.
_FLUSH_BYTES = 1 << 26
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The kernel cannot copy between these files itself.
_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
# Held by who has a whole weight in memory.
WHOLE = Lock()
Job = Callable[[], None]


def stream(plan: Plan, staging: Staging, on_file: Callable[[str], list[Job]] = lambda file: []) -> None:
    """Write each file of the merged model that is not finished yet.

    Every thread holds a few rows of one weight. A weight that is stored otherwise than as (out, in), such as GPT-2's, is held
    whole, one at a time. A file gets its name when it is on the disk.

    Args:
        plan: what to write.
        staging: where to.
        on_file: called with the name of each finished file; the jobs that it returns are done beside the next one's.

    Raises:
        RunError: a merged weight has values that are not finite, or that its dtype does not reach; it is named.
    """
    jobs: list[Future[None]] = []
    writer: _Writer | None = None
    closing: tuple[str, Future[str]] | None = None
    # one thread to wait for the disk and to hash, so that the others need not
    with _threads() as pool, ThreadPoolExecutor(1) as closer:
        try:
            for file in plan.files:
                if file in staging.finished:
                    jobs += [pool.submit(job) for job in on_file(file)]
                    continue
                writer = _Writer(plan, file, staging.folder, closer)
                parts = [pool.submit(job) for job in writer.jobs()]
                if closing is not None:
                    jobs += _closed(*closing, staging, pool, on_file)
                    closing = None
                for part in parts:
                    part.result()
                closing, writer = (file, closer.submit(writer.close)), None
            if closing is not None:
                jobs += _closed(*closing, staging, pool, on_file)
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            if writer is not None:
                writer.abandon()
            raise


def _closed(
    file: str, digest: Future[str], staging: Staging, pool: ThreadPoolExecutor, on_file: Callable[[str], list[Job]]
) -> list[Future[None]]:
    staging.finish(file, digest.result())
    return [pool.submit(job) for job in on_file(file)]


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """A thread for each processor, within which torch uses no further ones."""
    before, processors = torch.get_num_threads(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max(2, processors), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


class _Writer:
    """One file of the merged model, while it is written."""

    def __init__(self, plan: Plan, file: str, folder: Path, flusher: ThreadPoolExecutor) -> None:
        self.outs, self.path, self.part = plan.files[file], folder / file, folder / f".{file}.part"
        self._flusher, self._unflushed = flusher, 0
        self._flushes: list[Future[None]] = []
        self.source = os.open(plan.checkpoint.folder / file, os.O_RDONLY)
        self.target = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            header, self.starts = _header(plan, file, self.source)
            os.ftruncate(self.target, len(header) + plan.bytes_of(file))
            _write(self.target, header, 0)
        except BaseException:
            self.abandon()
            raise

    def jobs(self) -> Iterator[Job]:
        """What is to be done, in any order."""
        run: tuple[int, int, int] | None = None  # from, to, length of what is copied as it is
        for out, start in zip(self.outs, self.starts, strict=True):
            length = out.source.stop - out.source.start
            if out.change is None and out.dtype == DTYPES[out.source.dtype]:
                if run is not None and (run[0] + run[2], run[1] + run[2]) == (out.source.start, start):
                    run = run[0], run[1], run[2] + length
                    continue
                yield from self._copies(run)
                run = out.source.start, start, length
            else:
                yield from self._pieces(out, start)
        yield from self._copies(run)

    def close(self) -> str:
        """Have it on the disk under its name; its hash."""
        digest = hashlib.sha256()
        buffer = bytearray(_HASH_BYTES)
        at = 0
        while number := os.preadv(self.target, [buffer], at):
            digest.update(memoryview(buffer)[:number])
            at += number
        for flush in self._flushes:  # a disk says only once that it failed
            flush.result()
        os.fsync(self.target)
        os.close(self.target)
        os.close(self.source)
        self.part.replace(self.path)
        return digest.hexdigest()

    def abandon(self) -> None:
        """Remove what is there of it."""
        os.close(self.target)
        os.close(self.source)
        self.part.unlink(missing_ok=True)

    def _copies(self, run: tuple[int, int, int] | None) -> Iterator[Job]:
        if run is None:
            return
        for done in range(0, run[2], _COPY_BYTES):
            yield lambda done=done: self._copy(run[0] + done, run[1] + done, min(_COPY_BYTES, run[2] - done))

    def _copy(self, source: int, target: int, length: int) -> None:
        copy_bytes(self.source, self.target, source, target, length)
        self._wrote(length)

    def _pieces(self, out: Output, start: int) -> Iterator[Job]:
        """The rows of a tensor that is changed."""
        shape, change = out.source.shape, out.change or Change()
        if change.bone is not None and not lies_as_its_matrix(change.bone, shape):
            yield lambda: self._make_stacked(out, change, start)
            return
        number, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        for rows in row_pieces(number, width, [update.spec for update in change.updates], _PIECE_ELEMENTS):
            yield lambda rows=rows: self._make_rows(out, change, rows, start)

    def _make_rows(self, out: Output, change: Change, rows: slice, start: int) -> None:
        source = frozen_rows(self.source, out.source, change, rows)
        result = torch.empty_like(source, dtype=out.dtype)
        if change.updates:
            _check_values(out, merge_rows(source, change.updates, rows.start, result))
        else:
            result.copy_(source)
            _check_range(out, source, result)
        size = math.prod(out.source.shape[1:]) * out.dtype.itemsize
        self._put(result, start + rows.start * size)

    def _make_stacked(self, out: Output, change: Change, start: int) -> None:
        assert change.bone is not None
        with WHOLE:
            source = change.bone.matrices(frozen_rows(self.source, out.source, change, slice(0, out.source.shape[0])))
            result = torch.empty(source.shape, dtype=out.dtype)
            _check_values(out, merge_rows(source, change.updates, 0, result))
            self._put(change.bone.as_stored(result).contiguous(), start)

    def _put(self, tensor: Tensor, at: int) -> None:
        _write(self.target, bytes_of(tensor), at)
        self._wrote(tensor.numel() * tensor.element_size())

    def _wrote(self, number: int) -> None:
        self._unflushed += number
        if self._unflushed > _FLUSH_BYTES and (not self._flushes or self._flushes[-1].done()):
            self._unflushed = 0
            self._flushes.append(self._flusher.submit(os.fsync, self.target))


def frozen_rows(file: int, stored: Stored, change: Change, rows: slice) -> Tensor:
    """Rows of the tensor that updates are added to: as stored, but for what an adapter puts in its place."""
    dtype = DTYPES[stored.dtype]
    if change.whole is not None:
        return change.whole[rows].to(dtype) if stored.shape else change.whole.to(dtype)
    source = read_rows(file, stored, rows)
    if change.rows is not None:
        indices, values = change.rows
        inside = (indices >= rows.start) & (indices < rows.stop)
        source[indices[inside] - rows.start] = values[inside].to(dtype)
    return source


def read_rows(file: int, stored: Stored, rows: slice) -> Tensor:
    """Rows of a stored tensor."""
    shape, dtype = stored.shape, DTYPES[stored.dtype]
    size = math.prod(shape[1:]) * dtype.itemsize
    result = torch.empty((rows.stop - rows.start, *shape[1:]) if shape else (), dtype=dtype)
    content, at = bytes_of(result), stored.start + rows.start * size
    while content:
        number = os.preadv(file, [content], at)
        if not number:
            raise RunError(f"The base model's file {stored.file} ended while it was read: something else is writing to it.")
        content, at = content[number:], at + number
    return result


def lies_as_its_matrix(bone: Any, shape: tuple[int, ...]) -> bool:
    """Whether a layer's stored tensor of that shape is one matrix (out, in), row by row."""
    like = torch.empty(shape, device="meta")
    matrices = bone.matrices(like)
    return len(shape) == 2 and (matrices.shape, matrices.stride()) == (like.shape, like.stride())


def copy_bytes(source: int, target: int, start: int, at: int, length: int) -> None:
    """Copy a part of one open file into another; the kernel does it where it can."""
    while length:
        try:
            number = os.copy_file_range(source, target, length, start, at)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _CANNOT_COPY:
                raise
            number = _write(target, os.pread(source, min(length, _HASH_BYTES), start), at)
        if not number:
            raise RunError("A file of the base model ended while it was read: something else is writing to it.")
        start, at, length = start + number, at + number, length - number


def _header(plan: Plan, file: str, source: int) -> tuple[bytes, list[int]]:
    """The merged file's header, and where each of its tensors begins."""
    header = plan.checkpoint.headers[file]
    raw = os.pread(source, header.data_start, 0)
    content: dict[str, Any] = json.loads(raw[8:])
    offset, offsets, same = 0, [], True
    for out in plan.files[file]:
        size = math.prod(out.source.shape) * out.dtype.itemsize
        entry = {"dtype": _NAMES[out.dtype], "shape": [*out.source.shape], "data_offsets": [offset, offset + size]}
        same = same and content.get(out.name) == entry
        content[out.name] = entry
        offsets.append(offset)
        offset += size
    if not same:
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # as safetensors has it, so that tensors are aligned
        raw = len(text).to_bytes(8, "little") + text
    return raw, [len(raw) + offset for offset in offsets]


def _check_values(out: Output, bounds: tuple[float, float]) -> None:
    lowest, highest = bounds
    limit = torch.finfo(out.dtype).max
    if not -limit <= lowest <= highest <= limit:
        raise RunError(
            f"The merged {out.name} would have values that are not finite as {str(out.dtype).removeprefix('torch.')} "
            f"({lowest:.3g} to {highest:.3g}): its weight, or an adapter's scale, is out of range."
        )


def _check_range(out: Output, source: Tensor, result: Tensor) -> None:
    """A dtype that does not reach as far may turn values into infinity; what the base model has of it stays."""
    if result.is_floating_point() and result.dtype != source.dtype and torch.isinf(result).sum() > torch.isinf(source).sum():
        low, high = torch.aminmax(source)
        _check_values(out, (low.item(), high.item()))


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's own bytes, to be read and written."""
    content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(content) if tensor.numel() else memoryview(b"")


def _write(file: int, content: bytes | memoryview, at: int) -> int:
    left = memoryview(content)
    while left:
        number = os.pwrite(file, left, at)
        left, at = left[number:], at + number
    return len(content)
