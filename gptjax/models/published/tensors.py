# SPDX-License-Identifier: Apache-2.0
"""Tensors of published weight files, read one by one: safetensors, and torch's own pickles.

Files are read, not mapped: mapped pages would count as memory in use.
"""

import io
import json
import math
import pathlib
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from gptjax.configs import errors
from gptjax.models.published import pickled
from gptjax.storage import files

_DTYPES = {
    'F64': np.float64,
    'F32': np.float32,
    'F16': np.float16,
    'BF16': ml_dtypes.bfloat16,
    'I64': np.int64,
    'I32': np.int32,
    'I16': np.int16,
    'I8': np.int8,
    'U8': np.uint8,
    'BOOL': np.bool_,
}


class Stored(NamedTuple):
    """A tensor in a file, and how to read it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def find(folder: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of a folder's model.safetensors or pytorch_model.bin, in one file or many.

    Raises:
      InputError: there is neither, or a file is missing, damaged, or holds more than tensors.
    """
    for name, reader in (('model.safetensors', _safetensors), ('pytorch_model.bin', _torch)):
        path, paths = folder / name, []
        found: dict[str, Stored] = {}
        try:
            paths = _shards(folder, name)
            for path in paths:
                found |= reader(path)
        except errors.InputError:
            raise
        except Exception as e:  # what a damaged file makes the libraries raise
            raise errors.InputError(f'cannot read {path}: {e}; fetch it again') from e
        if paths:
            return found
    raise errors.InputError(
        f'{folder} holds neither model.safetensors nor pytorch_model.bin, in one file or with an '
        'index of several'
    )


def write(
    folder: pathlib.Path,
    tensors: Iterator[tuple[str, int, Callable[[], np.ndarray]]],
    shard_bytes: int,
    progress: Callable[[int], None],
) -> list[str]:
    """Writes safetensors in files of at most `shard_bytes`, with an index where there are several.

    Args:
      tensors: (name, bytes, how to get it); at most one file's worth is held at a time.
      progress: is told the bytes written.

    Returns:
      the names of the files.
    """
    shards: list[list] = [[]]
    held = 0
    for name, size, get in tensors:
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append((name, size, get))
        held += size
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        one = len(shards) == 1
        path = f'model-{number:05d}-of-{len(shards):05d}.safetensors' if not one else _ONE
        partial = folder / f'{path}.partial'
        partial.unlink(missing_ok=True)  # a link is not followed
        partial.touch()
        mode = partial.stat().st_mode  # as other files have it; save_file makes private ones
        arrays = {name: get() for name, _, get in shard}
        try:
            safetensors_numpy.save_file(arrays, partial, {'format': 'pt'})
        except safetensors.SafetensorError as e:  # of the system, in its words
            raise errors.InputError(f'{folder / path} cannot be written: {e}; make room') from e
        partial.chmod(mode)
        partial.replace(folder / path)
        index |= dict.fromkeys((name for name, _, _ in shard), path)
        progress(sum(size for _, size, _ in shard))
    if len(shards) > 1:
        total = sum(size for shard in shards for _, size, _ in shard)
        text = json.dumps({'metadata': {'total_size': total}, 'weight_map': index}, indent=2)
        files.replace(folder / f'{_ONE}.index.json', text + '\n')
        return [*sorted(set(index.values())), f'{_ONE}.index.json']
    return sorted(set(index.values()))


_ONE = 'model.safetensors'


def _shards(folder: pathlib.Path, name: str) -> list[pathlib.Path]:
    """The files that make up `name`; none where there is no such thing."""
    if (folder / name).is_file():
        return [folder / name]
    index = folder / f'{name}.index.json'
    if not index.is_file():
        return []
    said = json.loads(files.decoded(files.content(index)))['weight_map']
    names = sorted(files.plain_name(shard, index) for shard in set(said.values()))
    for shard in names:
        if not (folder / shard).is_file():
            raise errors.InputError(f'{index} names {shard}, which is missing; fetch it')
    return [folder / shard for shard in names]


def _safetensors(path: pathlib.Path) -> dict[str, Stored]:
    # Its pread backend reads what is asked for and keeps no page of the file in memory.
    file = safetensors.safe_open(path, 'numpy', backend='pread')
    found = {}
    for name in file.keys():  # noqa: SIM118, it is no mapping
        part = file.get_slice(name)
        if part.get_dtype() not in _DTYPES:
            raise errors.InputError(f'{path}: {name} has the unknown dtype {part.get_dtype()}')
        dtype = np.dtype(_DTYPES[part.get_dtype()])
        found[name] = Stored(
            tuple(part.get_shape()), dtype, lambda name=name: file.get_tensor(name)
        )
    return found


def _torch(path: pathlib.Path) -> dict[str, Stored]:
    """A state dict of torch.save, in its zip form or the one before torch 1.6."""
    with path.open('rb') as file:
        if not zipfile.is_zipfile(path):
            tree, spans = _legacy(file, path)
        else:
            with zipfile.ZipFile(file) as archive:
                tree, spans = _zipped(archive, path)
    length = path.stat().st_size
    if not isinstance(tree, dict) or not all(isinstance(x, pickled.Strided) for x in tree.values()):
        raise errors.InputError(f'{path} is no plain state dict: names to tensors')

    def stored(tensor: pickled.Strided) -> Stored:
        dtype = tensor.storage.dtype
        start, size = spans[tensor.storage.key]
        last = tensor.offset + sum(
            (n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)
        )
        elements = 0 if 0 in tensor.shape else last + 1 - tensor.offset
        most = max(last + 1, math.prod(tensor.shape))  # of which none is another
        if most * dtype.itemsize > size or start + size > length:
            raise errors.InputError(f'{path}: a tensor reaches beyond its storage; fetch it again')

        def read() -> np.ndarray:
            flat = np.fromfile(path, dtype, elements, offset=start + tensor.offset * dtype.itemsize)
            if len(flat) != elements:
                raise errors.InputError(f'{path} is cut short; fetch it again')
            strides = tuple(s * dtype.itemsize for s in tensor.strides)
            return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)

        return Stored(tensor.shape, dtype, read)

    return {name: stored(tensor) for name, tensor in tree.items()}


# Where each storage's bytes are in the file: key -> (first byte, bytes).
_Spans = dict[str, tuple[int, int]]


def _zipped(archive: zipfile.ZipFile, path: pathlib.Path) -> tuple[Any, _Spans]:
    infos = {info.filename: info for info in archive.infolist()}
    name = next((name for name in infos if name.endswith('/data.pkl')), '')
    if not name:
        raise errors.InputError(f'cannot read {path}: it holds no data.pkl; fetch it again')
    root = name.removesuffix('data.pkl') + 'data/'
    wanted = {key: info for key, info in infos.items() if key == name or key.startswith(root)}
    if any(info.compress_type != zipfile.ZIP_STORED for info in wanted.values()):
        raise errors.InputError(f'{path} is compressed; torch does not write such files')
    if infos[name].file_size > pickled.MOST_BYTES:
        raise errors.InputError(f'{path} describes its tensors in {infos[name].file_size:,} bytes')
    tree = pickled.Unpickler(io.BytesIO(archive.read(name)), path).load()
    spans = {}
    for key, info in wanted.items():
        # The local header's name and extra field may be longer than the directory's.
        archive.fp.seek(info.header_offset + 26)
        lengths = struct.unpack('<HH', archive.fp.read(4))
        start = info.header_offset + 30 + sum(lengths)
        spans[key.removeprefix(root)] = (start, info.file_size)
    return tree, spans


def _legacy(file: Any, path: pathlib.Path) -> tuple[Any, _Spans]:
    head = io.BytesIO(file.read(pickled.MOST_BYTES))
    if head.getvalue()[:2] == b'PK':
        raise errors.InputError(f'{path} is a zip file that is cut short; fetch it again')
    magic = pickled.Unpickler(head, path).load()
    if magic != 0x1950A86A20F9469CFC6C:
        raise errors.InputError(f'{path} is no file of torch.save')
    pickled.Unpickler(head, path).load()  # protocol version
    pickled.Unpickler(head, path).load()  # sizes of C types
    unpickler = pickled.Unpickler(head, path)
    tree, keys = unpickler.load(), pickled.Unpickler(head, path).load()
    spans, place, end = {}, head.tell(), file.seek(0, io.SEEK_END)
    if not isinstance(keys, list) or not all(type(key) is str for key in keys):
        raise errors.InputError(f'{path} holds storages without names')
    for key in keys:
        file.seek(place)
        (elements,) = struct.unpack('<Q', file.read(8))
        spans[key] = (place + 8, elements * unpickler.itemsizes[key])
        place = sum(spans[key])
        if place > end:
            raise errors.InputError(f'{path} is cut short; fetch it again')
    return tree, spans


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Uninitialised memory that starts where jax can take it over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
