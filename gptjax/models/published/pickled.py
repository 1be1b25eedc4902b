# SPDX-License-Identifier: Apache-2.0
"""The pickles in files of torch.save: dictionaries of tensors, and nothing else.

Read by Python's own unpickler, without the operations and globals that such files do not need: each
of them is a way to run code, to fill the memory, or to end the process.
"""

import io
import pathlib
import pickle
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gptjax.configs import errors

MOST_BYTES = 2**24  # of a pickle: some 60,000 tensors
# torch storages that a weight file may name -> dtype; anything else is refused.
_STORAGES = {
    'DoubleStorage': np.float64,
    'FloatStorage': np.float32,
    'HalfStorage': np.float16,
    'BFloat16Storage': ml_dtypes.bfloat16,
    'LongStorage': np.int64,
    'IntStorage': np.int32,
    'ShortStorage': np.int16,
    'CharStorage': np.int8,
    'ByteStorage': np.uint8,
    'BoolStorage': np.bool_,
}
# Of the numbers, texts, tuples, lists, dictionaries and globals of protocols 2 to 4.
_OPERATIONS = (
    *('PROTO', 'FRAME', 'STOP', 'MARK', 'NONE', 'NEWTRUE', 'NEWFALSE', 'BININT', 'BININT1'),
    *('BININT2', 'LONG1', 'BINFLOAT', 'SHORT_BINSTRING', 'BINSTRING', 'SHORT_BINUNICODE'),
    *('BINUNICODE', 'EMPTY_TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3', 'TUPLE', 'EMPTY_LIST', 'APPEND'),
    *('APPENDS', 'EMPTY_DICT', 'SETITEM', 'SETITEMS', 'BINGET', 'LONG_BINGET', 'BINPUT'),
    *('LONG_BINPUT', 'MEMOIZE', 'GLOBAL', 'STACK_GLOBAL', 'REDUCE', 'BINPERSID', 'BUILD'),
)
_CODES = [getattr(pickle, name)[0] for name in _OPERATIONS]
_DISPATCH = {code: pickle._Unpickler.dispatch[code] for code in _CODES}


class Kind(NamedTuple):
    """What stands for a storage class."""

    name: str


class Storage(NamedTuple):
    """A flat array of a torch file, by its key there."""

    dtype: np.dtype
    key: str


class Strided(NamedTuple):
    """A tensor over a storage, as torch pickles it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Unpickler(pickle._Unpickler):
    """Rebuilds dictionaries of tensors, and refuses every other operation and global."""

    def __init__(self, content: io.BytesIO, path: pathlib.Path) -> None:
        super().__init__(content, encoding='utf-8')
        self._path = path
        self.itemsizes: dict[str, int] = {}  # of the storages named so far

    def load(self) -> Any:
        """The next object. Raises InputError where it is none that weights are made of."""
        try:
            return super().load()
        except KeyError as e:
            raise errors.InputError(
                f'{self._path} is damaged, or holds more than tensors (its pickle has {e}); only '
                'tensors are read. Fetch it again, or save it as safetensors where you trust it'
            ) from e
        except EOFError as e:
            raise errors.InputError(f'{self._path} is cut short; fetch it again') from e

    def find_class(self, module: str, name: str) -> Any:
        # Everything handed out is made anew: a pickle may call it with what it likes.
        if module == 'torch' and name in _STORAGES:
            return Kind(name)
        known = {
            ('collections', 'OrderedDict'): lambda: {},
            ('torch._utils', '_rebuild_tensor_v2'): lambda *args: _rebuild_tensor(*args),
            ('torch._utils', '_rebuild_parameter'): lambda tensor, *_: tensor,
        }
        if (module, name) not in known:
            raise errors.InputError(
                f'{self._path} wants {module}.{name}, which is no weight; only tensors are read. '
                'Save it as safetensors where you trust it'
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage, key, _, _, *view = pid
        known = kind == 'storage' and isinstance(storage, Kind) and type(key) is str
        if not known or any(view):
            raise errors.InputError(f'{self._path} holds a storage of an unknown kind')
        dtype = np.dtype(_STORAGES[storage.name])
        self.itemsizes[key] = dtype.itemsize
        return Storage(dtype, key)

    def _set(self, items: list) -> None:
        """Adds to the dictionary on the stack; keys are texts, as to hash others may not end."""
        if type(self.stack[-1]) is not dict or not all(type(key) is str for key in items[::2]):
            raise errors.InputError(f'{self._path} holds a table of other than names')
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set_items(self) -> None:
        self._set(self.pop_mark())

    def _leave(self) -> None:
        self.stack.pop()  # what BUILD would set: the versions of modules

    dispatch = _DISPATCH | {
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.BUILD[0]: _leave,
    }


def _rebuild_tensor(
    storage: Storage, offset: int, shape: tuple, strides: tuple, *_: Any
) -> Strided:
    axes = (shape, strides)
    fits = isinstance(storage, Storage) and all(type(x) is tuple and len(x) <= 8 for x in axes)
    if not fits or not all(type(n) is int and 0 <= n < 2**60 for n in (offset, *shape, *strides)):
        raise ValueError('a tensor has a shape, strides or a storage that are none')
    return Strided(storage, offset, tuple(shape), tuple(strides))
