# SPDX-License-Identifier: Apache-2.0
"""Tokenizers made from text: the byte-level BPE, SentencePiece or bytes that a config asks for."""

import dataclasses
import io
import logging
from collections.abc import Iterable, Iterator
from typing import Literal

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptjax.configs import errors
from gptjax.storage import scratch
from gptjax.text import pieces, trial, unicode
from gptjax.text import tokenizer as tokenizer_lib

_LONGEST = 1000  # characters of a line, at most 4,000 bytes
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Config:
    """The tokenizer section of configs/base.py."""

    kind: Literal['bpe', 'sentencepiece', 'bytes', 'file']
    path: str
    dir: str
    n_vocab: int
    sample_bytes: int

    def __post_init__(self) -> None:
        errors.require_choice(self, 'kind', ('bpe', 'sentencepiece', 'bytes', 'file'))
        errors.require_positive(self, 'sample_bytes')
        errors.require_between(self, 1, trial.MOST_IDS, 'n_vocab')
        errors.require(
            self.kind != 'bpe' or self.n_vocab > 257,
            f'n_vocab = {self.n_vocab} is too small for byte-level BPE: 256 bytes and end-of-text '
            'come first; use 258 or more',
        )
        errors.require(
            (self.kind == 'file') == bool(self.path),
            f'tokenizer.path = {self.path!r} does not fit tokenizer.kind = {self.kind!r}; '
            'kind=file reads path, the others have none',
        )


def train(config: Config, texts: Iterable[str]) -> tokenizer_lib.Tokenizer:
    """Trains (or, for kind=bytes and kind=file, builds) the tokenizer a config asks for.

    Raises:
      InputError: there is no text to train on, or too little for the vocabulary.
    """
    if config.kind == 'bytes':
        return tokenizer_lib.Bytes()
    if config.kind == 'file':
        path = scratch.here(config.path)
        scratch.small(path.parent)  # some kinds are two files, one of them named
        return tokenizer_lib.load(scratch.small(path))
    texts = _nonempty(texts)
    if config.kind == 'sentencepiece':
        return _told(_train_sentencepiece(texts, config.n_vocab), config.n_vocab)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.n_vocab,
        special_tokens=[tokenizer_lib.END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((unicode.check(text) for text in texts), trainer)
    return _told(tokenizer_lib.Subwords(backend), config.n_vocab)


def _told(tokenizer: tokenizer_lib.Tokenizer, n_vocab: int) -> tokenizer_lib.Tokenizer:
    if tokenizer.n_vocab < n_vocab:
        _log.warning(
            'only %d ids of n_vocab = %d came out: the text holds no more that repeats; give more '
            'text, or ask for fewer',
            *(tokenizer.n_vocab, n_vocab),
        )
    return tokenizer


def _train_sentencepiece(texts: Iterator[str], n_vocab: int) -> pieces.SentencePiece:
    import sentencepiece  # a second of import, for those who use it

    model = io.BytesIO()
    lines = (line for text in texts for line in _lines(unicode.check(text)))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=n_vocab,
            model_type='bpe',
            byte_fallback=True,  # no text is unknown
            normalization_rule_name='identity',
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    except RuntimeError as e:
        raise errors.InputError(
            f'SentencePiece could not train n_vocab = {n_vocab} on this corpus: {e}; '
            'use a smaller vocabulary (above 260) or more text'
        ) from e
    return pieces.SentencePiece(model.getvalue())


def _lines(text: str) -> Iterator[str]:
    """Lines, long ones cut before spaces: above 4,192 bytes SentencePiece leaves them out."""
    for line in text.splitlines():
        while len(line) > _LONGEST:
            place = max(line.rfind(' ', 1, _LONGEST), 0) or _LONGEST
            yield line[:place]
            line = line[place:]
        if line:
            yield line


def _nonempty(texts: Iterable[str]) -> Iterator[str]:
    texts = iter(texts)
    first = next((text for text in texts if text), None)
    if first is None:
        raise errors.InputError('the corpus holds no text to train a tokenizer on')

    def chained() -> Iterator[str]:
        yield first
        yield from texts

    return chained()
