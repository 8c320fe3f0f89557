"""Writing safetensors files one tensor at a time: the format of https://github.com/huggingface/safetensors.

A file is 8 bytes with the length of the header, the header in JSON, and the tensors' bytes. The library writes a whole
file at once, from memory that holds all of it; a plan knows every shape beforehand, so we need hold one tensor only.
"""

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any, Self

import torch

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
PIECE = 1 << 16  # bytes per write; Linux takes 8 MB at once 3 times slower, looking for memory in large pieces
CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Size of a tensor's data."""
    return math.prod(shape) * dtype.itemsize


def split_into_shards(shapes: Shapes, max_bytes: int) -> list[list[str]]:
    """Names per file, in order; no file is larger than `max_bytes` unless a single tensor is.

    Wide types come first in each file, so that every tensor begins at a multiple of its entries' size.
    """
    shards: list[list[str]] = [[]]
    used = 0
    for name, (shape, dtype) in shapes.items():
        size = num_bytes(shape, dtype)
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return [sorted(names, key=lambda name: -shapes[name][1].itemsize) for names in shards]


def shard_names(count: int) -> list[str]:
    """File names as Transformers gives them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


class ShardWriter:
    """A safetensors file that is written tensor by tensor, in the order of `shapes`, and hashed on the way.

    After the block, `close` flushes the file to disk, and `sha256` is known.
    """

    def __init__(self, path: Path, shapes: Shapes) -> None:
        self.path, self.shapes, self.left = path, dict(shapes), deque(shapes)
        self.sha256 = ""
        self._hash = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)  # hashing releases the interpreter, so it runs beside writing
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        self._file = open(self.path, "wb", buffering=0)
        try:
            self._write(header_of(self.shapes))
        except OSError:
            self._file.close()
            raise
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor."""
        shape, dtype = self.shapes[name]
        following = self.left.popleft()
        assert following == name and tuple(tensor.shape) == shape and tensor.dtype == dtype, name
        self._write(content(tensor))

    def _write(self, data: bytes | memoryview) -> None:
        if self._pending is not None:
            self._pending.result()
        self._pending = self._pool.submit(self._hash.update, data)
        view = memoryview(data)
        while view:
            view = view[self._file.write(view[:PIECE]) :]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert error is not None or not self.left, self.left[0]
        if error is not None:
            self._pool.shutdown()
            self._file.close()

    def close(self) -> None:
        """Wait until everything is on the disk."""
        self._pool.shutdown()
        with self._file:
            os.fsync(self._file.fileno())
        self.sha256 = self._hash.hexdigest()


def header_of(shapes: Shapes) -> bytes:
    """The length and the JSON header of a file, padded so that the data begins at a multiple of 8."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (shape, dtype) in shapes.items():
        end = start + num_bytes(shape, dtype)
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def sha256_of(path: Path, stop: Event | None = None) -> str:
    """The digest of a file that exists; of a part of it if `stop` is set meanwhile."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 18)
    with path.open("rb", buffering=0) as file:
        while (size := file.readinto(buffer)) and not (stop is not None and stop.is_set()):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()


def content(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes."""
    data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)
