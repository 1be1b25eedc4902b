# SPDX-License-Identifier: Apache-2.0
"""A first trial of a vocabulary or chat template of somebody else, in a process of its own.

The libraries that read such files end the process on some of them, fill the memory on others, or
never come back; a child under limits may. What passed is remembered by its sha256.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import resource
import signal
import string
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from gptjax.configs import errors
from gptjax.storage import files

MOST_IDS = 2**24  # of a vocabulary
_VERSION = 1  # of what is tried: what passed an older one is tried again
_MEMORY, _CPU_SECS, _WALL_SECS = 2**30, 10, 300
LONGEST = 2**16  # characters of a token
_GROWTH = 64  # tokens a character of text, at most
_PRINTED = [c for c in string.printable if c.isprintable()]
_SAMPLE = (
    'The quick brown fox, 1234567890 times; don\'t "ask" <why>.\n\t\r\n  x  \n\n',
    'Ünïcödé ﷺ ﬁ ½ 한국어 日本語 العربية हिन्दी 👩‍👩‍👧 e\u0301\u200d\u202e\0\ufffd',
    *(c * 40 + '\1' for c in _PRINTED),  # runs on which patterns go back and forth
    *(f'{a}{b}' * 20 for a, b in itertools.pairwise(_PRINTED)),
)


def is_of_library(error: BaseException) -> bool:
    """Whether a library may have raised it for its input: a panic of Rust is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == 'PanicException'


def tried(path: pathlib.Path) -> bytes:
    """The content of a tokenizer.json or *.model that passes, now or before.

    Raises:
      InputError: it cannot be read, or not within the limits; the message names the file.
    """
    found = files.content(path)
    _once('model' if path.suffix == '.model' else 'json', f'{path} is no tokenizer', found)
    return found


def try_template(template: str) -> None:
    """Raises InputError where a chat template does not end within the limits."""
    _once('template', 'the chat template is none', template.encode(errors='replace'))


def _once(kind: str, wrong: str, content: bytes) -> None:
    if not _note(content).is_file():
        _try(kind, wrong, content)
        remember(content)


def _try(kind: str, wrong: str, content: bytes) -> None:
    root = str(pathlib.Path(__file__).parents[2])
    places = os.pathsep.join(filter(None, (root, os.environ.get('PYTHONPATH', ''))))
    try:
        child = subprocess.run(
            [sys.executable, '-m', 'gptjax.text.trial', kind],
            input=content,
            capture_output=True,
            timeout=_WALL_SECS,
            env={**os.environ, 'PYTHONPATH': places, 'TOKENIZERS_PARALLELISM': 'false'},
        )
        code, said = child.returncode, child.stdout.decode(errors='replace').strip()
    except subprocess.TimeoutExpired:
        code, said = -signal.SIGXCPU, ''
    if code == 0:
        return
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        said = f'it takes more than {_CPU_SECS} s on a short text'
    elif not said:
        said = f'its library ends with signal {-code}, as for want of memory'
    raise errors.InputError(f'{wrong} that can be read: {said}; fetch it again')


def remember(content: bytes) -> None:
    """Notes that a vocabulary needs no trial: it passed, or is ours."""
    with contextlib.suppress(OSError):
        note = _note(content)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def _note(content: bytes) -> pathlib.Path:
    digest = hashlib.sha256(content).hexdigest()
    return files.cache_dir() / 'vocabularies' / f'{digest}.{_VERSION}'


def _main(kind: str) -> None:
    """The child: prints what is wrong, and ends with 1."""
    content = sys.stdin.buffer.read()
    memory = _MEMORY + 24 * len(content)
    for limit, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, _CPU_SECS + len(content) // 2**20),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        {'model': _try_model, 'json': _try_json, 'template': _try_template}[kind](content)
    except BaseException as e:  # a panic of Rust is no Exception
        print(' '.join(str(e).split())[:500] or type(e).__name__)
        sys.stdout.flush()
        os._exit(1)


def _try_json(content: bytes) -> None:
    import tokenizers

    text = files.decoded(content)
    said = json.loads(text)
    backend = tokenizers.Tokenizer.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    words = [*_texts({name: said.get(name) for name in said if name not in ('model', 'version')})]
    vocabulary = backend.get_vocab(with_added_tokens=True)
    longest, last = max(map(len, vocabulary), default=0), max(vocabulary.values(), default=0)
    if longest > LONGEST or last >= MOST_IDS:
        raise ValueError(f'it has a token of {longest} characters, or with the id {last}')
    for part in (
        part for name in ('normalizer', 'pre_tokenizer') for part in _parts(said.get(name))
    ):
        _check_replacements(part.get('precompiled_charsmap') or '')
    samples = [*_SAMPLE, ' '.join(word[:1000] for word in words)[: 2**16]]
    for plain in (True, False):
        backend.encode_special_tokens = plain
        for sample in samples:
            ids = backend.encode(sample, add_special_tokens=False).ids
            if len(ids) > _GROWTH * (len(sample) + 16):
                raise ValueError(f'it makes {len(ids)} tokens of {len(sample)} characters')
            backend.decode(ids, skip_special_tokens=False)
    backend.encode('a')
    size = backend.get_vocab_size(with_added_tokens=True)
    for start in range(0, size, 2**14):
        backend.decode([*range(start, min(size, start + 2**14))], skip_special_tokens=False)


def _try_model(content: bytes) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    for sample in _SAMPLE:
        ids = processor.encode(sample)
        if len(ids) > _GROWTH * (len(sample) + 16):
            raise ValueError(f'it makes {len(ids)} tokens of {len(sample)} characters')
        processor.decode(ids)
    size = processor.vocab_size()
    processor.decode([*range(size)])
    if (longest := max(len(processor.id_to_piece(i)) for i in range(size))) > LONGEST:
        raise ValueError(f'one of its tokens has {longest} characters')


def _try_template(content: bytes) -> None:
    from gptjax.text import chat

    roles = ('system', 'user', 'assistant', 'user')
    messages = [{'role': role, 'content': f'{_SAMPLE[0]} {role}'} for role in roles]
    for some in (messages, messages[1:], messages[-1:]):
        try:
            chat.rendered(content.decode(), some)
        except MemoryError:
            raise
        except Exception:  # what it refuses, it may refuse
            continue


def _check_replacements(charsmap: str) -> None:
    """Raises ValueError where SentencePiece's table of replacements is none, or makes long ones."""
    table = base64.b64decode(charsmap)
    size = int.from_bytes(table[:4], 'little')
    if table and size > len(table) - 4:
        raise ValueError('its table of replacements is cut short')
    longest = max(map(len, table[4 + size :].split(b'\0')))
    if longest > 1024:
        raise ValueError(f'it replaces a character by {longest} bytes')


def _parts(said: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value."""
    if isinstance(said, dict):
        yield said
    inner = said.values() if isinstance(said, dict) else said if isinstance(said, list) else ()
    for value in inner:
        yield from _parts(value)


def _texts(said: Any) -> Iterator[str]:
    """Every text in a JSON value: names and patterns among them."""
    if isinstance(said, str):
        yield said
    inner = said.values() if isinstance(said, dict) else said if isinstance(said, list) else ()
    for value in inner:
        yield from _texts(value)


if __name__ == '__main__':
    _main(sys.argv[1])
