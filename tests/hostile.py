# SPDX-License-Identifier: Apache-2.0
"""Files that somebody made to do harm, or that a disk made so: generators, and a reader in limits.

Run as a program it reads every path it is given, with little more memory than it has at the start,
and prints a line for each: what a user would see.
"""

import base64
import io
import json
import pathlib
import random
import resource
import signal
import struct
import subprocess
import sys
import zipfile

ROOM = 3 * 2**29  # bytes beyond what the process has once everything is imported
SECS = 60  # a guard against what never ends
NUMBERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
VALUES = (None, True, -1, 0, 0.5, 1e308, 2**31, 2**63, 10**30, '', 'x' * 1000, '\n\x1b[2J', [], {})
VALUES += (
    [[]],
    {'': {}},
    [None] * 1000,
    float('nan'),
    float('inf'),
    '\ud800',
    '../x',
    '/etc/passwd',
)


def mutated(rng: random.Random, content: bytes, end: int) -> bytes:
    """A file with one to three numbers of its first `end` bytes replaced, or with bytes gone."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place, size = rng.randrange(end), rng.choice([1, 4, 8])
        number = rng.choice([*NUMBERS, rng.getrandbits(64)]) % 2 ** (8 * size)
        changed[place : place + size] = number.to_bytes(size, 'little')
    if rng.random() < 0.1:
        del changed[rng.randrange(len(changed)) :]
    return bytes(changed)


def altered(rng: random.Random, said: object) -> object:
    """A JSON value with one value in it replaced by an absurd one."""
    if isinstance(said, (dict, list)) and said and rng.random() < 0.9:
        copy = said.copy()
        key = rng.choice([*said] if isinstance(said, dict) else range(len(said)))
        copy[key] = altered(rng, said[key])
        return copy
    return rng.choice(VALUES)


def gguf(fields: bytes = b'', n_fields: int = 0, tensors: bytes = b'', n_tensors: int = 0) -> bytes:
    """A GGUF file of these."""
    return b'GGUF' + struct.pack('<IQQ', 3, n_tensors, n_fields) + fields + tensors + bytes(4096)


def _text(text: str, claimed: int | None = None) -> bytes:
    return struct.pack('<Q', len(text) if claimed is None else claimed) + text.encode()


def _tensor(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return _text(name) + struct.pack(f'<I{len(dims)}QIQ', len(dims), *dims, kind, offset)


def ggufs() -> dict[str, bytes]:
    """What GGUF headers can claim."""
    one = _text('a') + struct.pack('<II', 4, 1)
    good = _tensor('t', (4,), 0, 0)
    found = {
        'endless array': gguf(_text('a') + struct.pack('<IIQ', 9, 0, 2**60), 1),
        'endless array of texts': gguf(_text('a') + struct.pack('<IIQ', 9, 8, 2**60), 1),
        'array of arrays': gguf(_text('a') + struct.pack('<IIQ', 9, 9, 10**6), 1),
        'endless text': gguf(_text('a') + struct.pack('<I', 8) + _text('', 2**63), 1),
        'endless name': gguf(_text('', 2**64 - 1), 1),
        'endless fields': gguf(one, 2**60),
        'endless tensors': gguf(n_tensors=2**60),
        'field twice': gguf(one + one, 2),
        'unknown value': gguf(_text('a') + struct.pack('<I', 77), 1),
        'no text': gguf(struct.pack('<Q', 2) + b'\xff\xfe', 1),
        'tensor twice': gguf(tensors=good + good, n_tensors=2),
        'tensors overlap': gguf(tensors=good + _tensor('u', (4,), 0, 0), n_tensors=2),
        'misaligned': gguf(tensors=_tensor('t', (4,), 0, 3), n_tensors=1),
    }
    for dims in ((0,), (2**63,), (2**32, 2**32), (2**62, 4), (1,) * 5, (), (2**64 - 1,)):
        found[f'axes {dims}'] = gguf(tensors=_tensor('t', dims, 0, 0), n_tensors=1)
    for offset in (2**64 - 32, 2**63, 2**32):
        found[f'offset {offset}'] = gguf(tensors=_tensor('t', (4,), 0, offset), n_tensors=1)
    for kind in (4, 5, 31, 255, 2**31, 2**32 - 1):
        found[f'kind {kind}'] = gguf(tensors=_tensor('t', (32,), kind, 0), n_tensors=1)
    for size in (0, 3, 2**31):
        field = _text('general.alignment') + struct.pack('<II', 4, size)
        found[f'alignment {size}'] = gguf(field, 1, good, 1)
    return found


def safetensors(header: object, data: bytes = bytes(64), claimed: int | None = None) -> bytes:
    """A safetensors file with this header."""
    said = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(said) if claimed is None else claimed) + said + data


def safetensors_files() -> dict[str, bytes]:
    """What headers of safetensors can claim."""

    def one(shape: list, start: int, end: int, dtype: str = 'F32') -> dict:
        return {'dtype': dtype, 'shape': shape, 'data_offsets': [start, end]}

    headers = {
        'beyond': {'t': one([2**40], 0, 2**42)},
        'reversed': {'t': one([4], 16, 0)},
        'negative': {'t': one([-4], 0, 16)},
        'overlap': {'t': one([16], 0, 64), 'u': one([16], 0, 64)},
        'shape wraps': {'t': one([2**32, 2**32], 0, 0)},
        'unknown dtype': {'t': one([16], 0, 64, 'F7')},
        'eighths': {'t': one([64], 0, 64, 'F8_E4M3')},
        'no object': [],
        'deep': b'[' * 10**5,
        'nothing': b'',
        'not finite': {'t': one([float('inf')], 0, 64)},
    }
    found = {name: safetensors(header) for name, header in headers.items()}
    for claimed in (0, 2**31, 2**40, 2**63, 2**64 - 1):
        found[f'header of {claimed}'] = safetensors(headers['beyond'], claimed=claimed)
    return found


def zipped(pickled: bytes, data: bytes = bytes(64), **how: int) -> bytes:
    """A file of torch.save with this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', **how) as archive:
        archive.writestr('m/data.pkl', pickled)
        archive.writestr('m/data/0', data)
    return file.getvalue()


def tensor(offset: bytes = b'K\0', shape: bytes = b'K\4\x85', strides: bytes = b'K\1\x85') -> bytes:
    """The pickle of {'x': a tensor}, its numbers as pickled here."""
    return (
        b'\x80\x02}X\x01\0\0\0xctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n'
        b'FloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x10tQ'
        + offset
        + shape
        + strides
        + b'\x89}tRs.'
    )


def pickles() -> dict[str, bytes]:
    """Pickles that fill the memory, end the process or run code, in a reader that lets them."""
    huge = b'\x8a\x09' + bytes(8) + b'\x01'  # 2**64
    nested = b')' + b'\x85' * 10**5
    return {
        'inflates': zipped(bytes(2**23), compression=zipfile.ZIP_DEFLATED),
        'large': zipped(b'\x80\x02' + b'N' * 2**25 + b'.'),
        'memo': zipped(b'\x80\x02Nr' + (2**28).to_bytes(4, 'little') + b'.'),
        'memo of 2**32': zipped(b'\x80\x02Nr\xff\xff\xff\xff.'),
        'key': zipped(b'\x80\x02}' + nested + b'Ns.'),
        'keys': zipped(b'\x80\x02}(' + nested + b'Nu.'),
        'nested': zipped(b'\x80\x02' + nested + b'.'),
        'ordered': zipped(b'\x80\x02ccollections\nOrderedDict\n]' + nested + b'N\x86a\x85R.'),
        'pid': zipped(b'\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\n' + nested + b'NNtQ.'),
        'laughs': zipped(b'\x80\x02)q\0' + b'h\0h\0h\0\x87q\0' * 10**5 + b'.'),
        'call': zipped(b'\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x01\x85R.'),
        'text of 2**62': zipped(b'\x80\x04\x8d' + (2**62).to_bytes(8, 'little') + b'x.'),
        'bytes of 2**62': zipped(b'\x80\x04\x8e' + (2**62).to_bytes(8, 'little') + b'x.'),
        'frame of 2**62': zipped(b'\x80\x04\x95' + (2**62).to_bytes(8, 'little') + b'N.'),
        'digits': zipped(b'I' + b'9' * 10**6 + b'\n.'),
        'cut short': zipped(b'\x80\x02}'),
        'empty': zipped(b''),
        'shape': zipped(tensor(shape=huge + b'\x85')),
        'broadcast': zipped(tensor(shape=b'J\xff\xff\xff\x7f\x85', strides=b'K\0\x85')),
        'strides': zipped(tensor(strides=huge + b'\x85')),
        'offset': zipped(tensor(offset=huge)),
        'offset below': zipped(tensor(offset=b'J\xff\xff\xff\xff')),
        'more strides': zipped(tensor(strides=b'K\1K\1\x86')),
        'a stride that is a tuple': zipped(tensor(strides=b'K\1\x85\x85')),
        'no zip': b'\x80\x02' + b'N' * 100,
        'half a zip': zipped(tensor())[:100],
        'two pickles of names': b'\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.',
    }


def charsmap(content: bytes) -> dict:
    """A normalizer of SentencePiece, with this table."""
    return {'type': 'Precompiled', 'precompiled_charsmap': base64.b64encode(content).decode()}


def tokenizer_parts() -> dict[str, dict]:
    """What parts of a tokenizer.json can do: name -> fields of it."""

    def replace(pattern: dict, content: str) -> dict:
        return {'type': 'Replace', 'pattern': pattern, 'content': content}

    def split(pattern: str) -> dict:
        how = {'behavior': 'Isolated', 'invert': False}
        return {'pre_tokenizer': {'type': 'Split', 'pattern': {'Regex': pattern}, **how}}

    grow = replace({'String': 'a'}, 'a' * 30)
    return {
        'grows': {'normalizer': {'type': 'Sequence', 'normalizers': [grow] * 8}},
        'decoding grows': {'decoder': {'type': 'Sequence', 'decoders': [grow] * 8}},
        'replaces nothing': {'normalizer': replace({'String': ''}, 'aaaa')},
        'table': {'normalizer': charsmap(random.Random(0).randbytes(1000))},
        'long table': {'normalizer': charsmap((4).to_bytes(4, 'little') + b'x' * 10**5)},
        'goes back': split('(a+)+$'),
        'goes back far': split('(.*)*(.*)*(.*)*x$'),
        'no pattern': split('((('),
        'strips': {'decoder': {'type': 'Strip', 'content': 'a', 'start': 2**60, 'stop': 2**60}},
        'no length': {'pre_tokenizer': {'type': 'FixedLength', 'length': 0}},
        'no words': {'model': {'type': 'Unigram', 'vocab': [], 'unk_id': None}},
    }


def _limit() -> None:
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
    most = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def read(paths: list[pathlib.Path]) -> list[str]:
    """What a user would see of each path, from a process in limits; 'OK' where it can be read."""
    command = [sys.executable, '-m', 'tests.hostile', *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, errors='replace')
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f'{paths[len(lines)]} ended the reader: {done.stderr[-2000:]}'
    return lines


def _main(paths: list[str]) -> None:
    import jax.numpy as jnp

    from gptjax.configs import errors
    from gptjax.models import pretrained
    from gptjax.runtime import streams
    from gptjax.text import tokenizer

    jnp.zeros(3).block_until_ready()
    _limit()
    for path in map(pathlib.Path, paths):
        signal.alarm(SECS)
        kept = path.is_dir() and not (path / 'config.json').exists()
        try:
            (tokenizer.load if kept else pretrained.load)(path)
            said = 'OK'
        except errors.InputError as e:
            said = streams.one_line(f'{type(e).__name__}: {e}')
        print(said, flush=True)


if __name__ == '__main__':
    _main(sys.argv[1:])
