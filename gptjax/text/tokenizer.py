# SPDX-License-Identifier: Apache-2.0
"""Strings <-> ids behind one protocol: byte-level BPE, SentencePiece, bytes.

Which tokens begin and end a text, and which are special, is what the files beside a vocabulary say
(text/described.py); an end token by a usual name where they say nothing.

The text '<|endoftext|>' is ordinary text unless special tokens are allowed, as they are in what a
user writes: a corpus cannot end a document by spelling it.
"""

import contextlib
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gptjax.configs import errors
from gptjax.storage import files, sums
from gptjax.text import cuts, described, gpt1, pieces, trial, unicode
from gptjax.text import merges as merges_lib

END_OF_TEXT = '<|endoftext|>'
# What published tokenizers call the token between documents, in order of preference.
_END_NAMES = (END_OF_TEXT, '</s>', '<|end_of_text|>', '[EOS]', '<eos>')
_NOTHING = described.Described()
_log = logging.getLogger(__name__)


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back."""

    n_vocab: int  # ids are below this
    end_of_text: int  # the id between documents; -1 where the vocabulary has none
    variant: str  # what was said beside the vocabulary and changes tokens; '' = nothing
    beginning: int  # the id that a text without any begins with: bos, else end_of_text
    prefix: list[int]  # ids that go before every prompt: Llama's <s>
    special: frozenset[int]  # ids that stand for no text
    described: described.Described  # what was said beside the vocabulary
    cut_before: str  # what long texts may be cut before (text/cuts.py); '' = nothing

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of a text; with allow_special, names of special tokens become their ids.

        Raises InputError on lone surrogates, which no UTF-8 text contains.
        """

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, as encode(); sooner where there are many."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens spelt out; bytes that are no UTF-8 become U+FFFD."""

    def serialized(self) -> dict[str, bytes]:
        """The vocabulary's files: name -> content."""


_REMEDY = (
    'run what made it again: python -m gptjax.train_tokenizer or train, or convert into a new '
    'folder'
)


def fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 over the vocabulary and the end of text: equal where texts become equal tokens."""
    digest = hashlib.sha256()
    for name, content in sorted(tokenizer.serialized().items()):
        digest.update(f'{name}\0{len(content)}\0'.encode() + content)
    digest.update(tokenizer.variant.encode())
    return digest.hexdigest()


def save(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Writes the tokenizer's files into `folder`, made where missing; their sums last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / sums.NAME).unlink(missing_ok=True)
    (folder / described.CONFIG).unlink(missing_ok=True)
    written = dict(tokenizer.serialized())
    if said := described.written(tokenizer.described):
        written[described.CONFIG] = said
    for name, content in written.items():
        files.replace(folder / name, content)
        trial.remember(content)
    sums.write(folder, written)


def find(folder: pathlib.Path) -> Tokenizer | None:
    """The tokenizer of a folder of weights; None where it has none. Errors as load()."""
    return load(folder) if _known_files(folder) else None


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that find() reads."""
    found = _known_files(folder)[:1]
    if found and found[0].name == 'gpt1.json':
        found.append(folder / 'vocab.json')
    if found and found[-1].name in merges_lib.FILES:
        found.append(folder / merges_lib.FILES[found[-1].name])
    return [*filter(pathlib.Path.is_file, found), *described.files_of(folder)]


def load(path: str | pathlib.Path) -> Tokenizer:
    """Reads a tokenizer from a file or a folder.

    Known are tokenizer.json (Hugging Face), *.model (SentencePiece), vocab.json + merges.txt or
    encoder.json + vocab.bpe (GPT-2), the former or encoder_bpe_40000.json + vocab_40000.bpe
    (GPT-1), and what save() wrote.

    Raises:
      InputError: nothing known is there, it cannot be read, or is not what save() wrote.
    """
    path = pathlib.Path(path)
    sums.check(path, _REMEDY, lambda name: not name.endswith('.safetensors'))
    for candidate in [path] if path.is_file() else _known_files(path):
        try:
            return _read(candidate)
        except errors.InputError:
            raise
        except BaseException as e:  # the libraries raise bare Exceptions
            if not trial.is_of_library(e):
                raise
            raise errors.InputError(f'{candidate} is no tokenizer that can be read: {e}') from e
    raise errors.InputError(
        f'no tokenizer at {path}; expected tokenizer.json, *.model, encoder.json with vocab.bpe, '
        'or a folder with one of these (python -m gptjax.train_tokenizer makes one)'
    )


class Bytes(cuts.OneByOne):
    """UTF-8 bytes as ids 0..255, then end-of-text."""

    n_vocab = 257
    end_of_text = beginning = 256
    variant = ''
    prefix: list[int] = []
    special = frozenset({256})
    described = _NOTHING
    cut_before = cuts.AFTER_LETTERS

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        if not allow_special:
            return list(unicode.check(text).encode())
        first, *rest = unicode.check(text).split(END_OF_TEXT)
        ids = list(first.encode())
        for part in rest:
            ids += [self.end_of_text, *part.encode()]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        parts = (bytes([i]) if i < 256 else END_OF_TEXT.encode() for i in ids)
        return b''.join(parts).decode('utf-8', errors='replace')

    def serialized(self) -> dict[str, bytes]:
        return {'bytes.json': b'{"kind": "bytes"}\n'}


class Subwords:
    """A `tokenizers` tokenizer: our own byte-level BPE, GPT-1's, GPT-2's, any tokenizer.json."""

    def __init__(self, backend: tokenizers.Tokenizer, said: described.Described = _NOTHING) -> None:
        said.add_to(backend)
        self.n_vocab = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        if self.n_vocab > trial.MOST_IDS:
            raise errors.InputError(
                f'a tokenizer has the id {self.n_vocab - 1}; ids are below {trial.MOST_IDS}'
            )
        self._content = backend.to_str().encode()
        self._plain = tokenizers.Tokenizer.from_str(self._content.decode())
        self._plain.encode_special_tokens = True  # spelt-out special tokens stay text
        self.cut_before = cuts.before(self._content)
        self._special = backend
        added = backend.get_added_tokens_decoder().items()
        self.special = frozenset(i for i, token in added if token.special)
        found = (backend.token_to_id(name) for name in _END_NAMES)
        usual_end = next((i for i in found if i is not None), -1)
        self.described = said
        roles = said.roles({token.content: i for i, token in added}, self.special)
        self.end_of_text = roles.get('eos_token', usual_end)
        self.variant = described.variant(self.end_of_text, usual_end)
        self.beginning = roles.get('bos_token', self.end_of_text)
        framed, plain = (backend.encode('a', add_special_tokens=a).ids for a in (True, False))
        place = max(0, _find(framed, plain))
        self.prefix = framed[:place]
        described.check_frame(said, self.prefix, framed[place + len(plain) :])

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        backend = self._special if allow_special else self._plain
        with _no_panic():
            return backend.encode(unicode.check(text), add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        whole = [unicode.check(text) for text in texts]
        with _no_panic():
            found = self._plain.encode_batch_fast(whole, add_special_tokens=False)
        return [each.ids for each in found]

    def decode(self, ids: Sequence[int]) -> str:
        with _no_panic():
            return self._plain.decode(list(ids), skip_special_tokens=False)

    def serialized(self) -> dict[str, bytes]:
        return {'tokenizer.json': self._content}


class Gpt1(cuts.OneByOne, Subwords):
    """GPT-1's vocabulary over its own words: lower-cased, '</w>' at their ends; not invertible.

    Args:
      kind: 'spacy', as OpenAI's code and transformers with ftfy and spaCy; 'basic', as transformers
        without them; '' = what is installed.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        merges: list[tuple[str, str]],
        kind: str,
        said: described.Described = _NOTHING,
    ) -> None:
        self.kind = kind or ('spacy' if gpt1.has_spacy() else 'basic')
        if self.kind == 'spacy' and not gpt1.has_spacy():
            raise errors.InputError(
                'this GPT-1 tokenizer cuts words with ftfy and spaCy, which are not installed: '
                "pip install 'gptjax[gpt1]'"
            )
        backend = tokenizers.Tokenizer(
            models.BPE(vocabulary, merges, unk_token=gpt1.UNKNOWN, end_of_word_suffix='</w>')
        )
        if self.kind == 'basic':
            backend.normalizer = normalizers.BertNormalizer(lowercase=True)
            backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.BPEDecoder(suffix='</w>')
        super().__init__(backend)
        self._vocabulary, self._merges, self.described = vocabulary, merges, said
        self.cut_before = ''  # words are cut elsewhere

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        text = unicode.check(text)
        spacy = self.kind == 'spacy'
        ids = []
        for word in gpt1.words(text) if spacy else gpt1.parts(text):
            known = word == gpt1.UNKNOWN or (spacy and word == gpt1.NEWLINE)
            ids += [self._vocabulary[word]] if known else super().encode(word)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode(ids).strip(' ')

    def serialized(self) -> dict[str, bytes]:
        lines = ['#version: 0.2', *(' '.join(pair) for pair in self._merges), '']
        return {
            'vocab.json': json.dumps(self._vocabulary).encode(),
            'merges.txt': '\n'.join(lines).encode(),
            'gpt1.json': json.dumps({'words': self.kind}).encode(),
        }


@contextlib.contextmanager
def _no_panic() -> Iterator[None]:
    """What ends the library of a vocabulary, as a pattern that goes back and forth, as one line."""
    try:
        yield
    except BaseException as e:
        if not trial.is_of_library(e) or isinstance(e, Exception):
            raise
        raise errors.InputError(f'the tokenizer fails on a text: {e}; use another one') from e


def _find(ids: list[int], part: list[int]) -> int:
    """Where a part of a list begins; -1 where it is none."""
    starts = range(len(ids) - len(part) + 1)
    return next((i for i in starts if part and ids[i : i + len(part)] == part), -1)


def _known_files(folder: pathlib.Path) -> list[pathlib.Path]:
    names = ('bytes.json', 'gpt1.json', 'tokenizer.json', 'vocab.json', 'encoder.json')
    names += ('encoder_bpe_40000.json',)
    found = [folder / name for name in names if (folder / name).is_file()]
    if _is_gpt1(folder / 'vocab.json'):  # its tokenizer.json, if any, cuts words without spaCy
        found.sort(key=lambda path: path.name not in ('gpt1.json', 'vocab.json'))
    return found + sorted(folder.glob('*.model')) if folder.is_dir() else []


def _is_gpt1(vocabulary: pathlib.Path) -> bool:
    return vocabulary.is_file() and b'".</w>"' in files.content(vocabulary)


def _read(path: pathlib.Path) -> Tokenizer:
    if path.name == 'bytes.json':
        return Bytes()
    if path.name in merges_lib.FILES:
        vocabulary, merges = (
            merges_lib.vocabulary(path),
            merges_lib.merges(path.with_name(merges_lib.FILES[path.name])),
        )
        said = described.read(path.parent)
        if '.</w>' in vocabulary:
            return Gpt1(vocabulary, merges, '', said)
        return Subwords(_gpt2(vocabulary, merges, said), said)
    if path.name == 'gpt1.json':
        vocabulary = merges_lib.vocabulary(path.with_name('vocab.json'))
        kind = json.loads(files.decoded(path.read_bytes()))['words']
        merges = merges_lib.merges(path.with_name('merges.txt'))
        return Gpt1(vocabulary, merges, kind, described.read(path.parent))
    if path.suffix == '.model':
        return pieces.SentencePiece(trial.tried(path), described.read(path.parent))
    backend = tokenizers.Tokenizer.from_str(files.decoded(trial.tried(path)))
    backend.no_truncation()
    backend.no_padding()
    return Subwords(backend, described.read(path.parent))


def _gpt2(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], said: described.Described
) -> tokenizers.Tokenizer:
    """OpenAI's GPT-2 files, and what transformers makes of others of this form."""
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    space = bool(said.fields.get('add_prefix_space'))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    backend.decoder = decoders.ByteLevel()
    if END_OF_TEXT in vocabulary:
        backend.add_special_tokens([END_OF_TEXT])
    said.add_to(backend)
    described.frame(backend, said)
    return backend
