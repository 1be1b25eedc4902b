# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file: its fields, and where its tensors are.

Every length in it is held against the bytes that are left before anything is read or made by it.
Source: docs/gguf.md of ggml.
"""

import io
import math
import pathlib
import struct
from typing import Any, NamedTuple

import gguf
import numpy as np

from gptjax.configs import errors

_VERSIONS = (2, 3)
_ALIGNMENT = 'general.alignment'
_MOST_DIMS = 4  # GGML_MAX_DIMS
_SCALARS = {
    gguf.GGUFValueType.UINT8: 'u1',
    gguf.GGUFValueType.INT8: 'i1',
    gguf.GGUFValueType.UINT16: '<u2',
    gguf.GGUFValueType.INT16: '<i2',
    gguf.GGUFValueType.UINT32: '<u4',
    gguf.GGUFValueType.INT32: '<i4',
    gguf.GGUFValueType.FLOAT32: '<f4',
    gguf.GGUFValueType.BOOL: '?',
    gguf.GGUFValueType.UINT64: '<u8',
    gguf.GGUFValueType.INT64: '<i8',
    gguf.GGUFValueType.FLOAT64: '<f8',
}
_STRING, _ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY


class Place(NamedTuple):
    """A tensor of the file, its axes in numpy's order."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int  # of its first byte in the file
    size: int  # in bytes


class Header(NamedTuple):
    """What a file says before its tensors' numbers; arrays of numbers are numpy's."""

    fields: dict[str, Any]
    tensors: dict[str, Place]


def read(path: pathlib.Path) -> Header:
    """Reads a header.

    Raises:
      InputError: it is none, or says what cannot be.
    """
    size = path.stat().st_size
    with path.open('rb') as file:
        try:
            return _read(_Reader(file, size))
        except (ValueError, struct.error) as e:
            raise errors.InputError(f'cannot read {path} as GGUF: {e}; fetch it again') from e


class _Reader:
    """Values one after the other; ValueError where the file has no room for one."""

    def __init__(self, file: io.BufferedReader, size: int) -> None:
        self._file, self.size = file, size

    @property
    def place(self) -> int:
        return self._file.tell()

    def bytes(self, count: int) -> bytes:
        left = self.size - self.place
        if count > left:
            raise ValueError(f'at byte {self.place} it claims {count} bytes, {left} are left')
        return self._file.read(count)

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.bytes(size), 'little')

    def text(self) -> str:
        return self.bytes(self.unsigned(8)).decode()

    def numbers(self, kind: int, count: int) -> np.ndarray:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.bytes(dtype.itemsize * count), dtype)

    def value(self) -> Any:
        kind = self.unsigned(4)
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.numbers(kind, 1)[0].item()
        if kind != _ARRAY:
            raise ValueError(f'it has a value of the unknown kind {kind}')
        kind, count = self.unsigned(4), self.unsigned(8)
        if kind == _STRING:
            if 8 * count > self.size - self.place:  # each has its length before it
                raise ValueError(f'it claims {count} texts, and has no room for them')
            return [self.text() for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f'it has an array of the unknown kind {kind}')
        return self.numbers(kind, count)


def _read(reader: _Reader) -> Header:
    magic, version = reader.bytes(4), reader.unsigned(4)
    if magic != b'GGUF' or version not in _VERSIONS:
        raise ValueError(f'it begins with {magic!r} and version {version}, not b"GGUF" and 2 or 3')
    n_tensors, n_fields = reader.unsigned(8), reader.unsigned(8)
    fields: dict[str, Any] = {}
    for _ in range(n_fields):  # as many as there are bytes for, at most
        name = reader.text()
        if name in fields:
            raise ValueError(f'it has the field {name!r} twice')
        fields[name] = reader.value()
    alignment = fields.get(_ALIGNMENT, 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f'{_ALIGNMENT} = {alignment!r} is no power of two')
    told: dict[str, tuple] = {}
    for _ in range(n_tensors):
        name = reader.text()
        if name in told:
            raise ValueError(f'it has the tensor {name!r} twice')
        told[name] = _told(reader)
    start = -(-reader.place // alignment) * alignment
    tensors = {}
    for name, (shape, kind, offset) in told.items():
        try:
            tensors[name] = _place(shape, kind, start, offset, alignment, reader.size)
        except ValueError as e:
            raise ValueError(f'the tensor {name!r} {e}') from e
    _check_apart(tensors)
    return Header(fields, tensors)


def _told(reader: _Reader) -> tuple[tuple[int, ...], int, int]:
    """(shape, kind, offset) of a tensor as they stand there."""
    n_dims = reader.unsigned(4)
    if not 1 <= n_dims <= _MOST_DIMS:
        raise ValueError(f'it has a tensor of {n_dims} axes')
    dims = struct.unpack(f'<{n_dims}Q', reader.bytes(8 * n_dims))
    return dims[::-1], reader.unsigned(4), reader.unsigned(8)


def _place(
    shape: tuple[int, ...], number: int, start: int, offset: int, alignment: int, end: int
) -> Place:
    """A tensor's place. Raises ValueError where it cannot be there: '<name> ...'."""
    if number not in list(gguf.GGMLQuantizationType):
        raise ValueError(f'is of the unknown kind {number}')
    kind = gguf.GGMLQuantizationType(number)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % block:
        raise ValueError(f'has the shape {shape}, which {kind.name} cannot have')
    size = math.prod(shape) // block * block_bytes
    if offset % alignment or start + offset + size > end:
        raise ValueError(
            f'claims {size} bytes from {start + offset} on, which are not there or not aligned'
        )
    return Place(shape, kind, start + offset, size)


def _check_apart(tensors: dict[str, Place]) -> None:
    end, before = 0, ''
    for name, place in sorted(tensors.items(), key=lambda item: item[1].start):
        if place.start < end:
            raise ValueError(f'the tensors {before!r} and {name!r} overlap')
        end, before = place.start + place.size, name
