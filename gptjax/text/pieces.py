# SPDX-License-Identifier: Apache-2.0
"""SentencePiece models as tokenizers."""

import itertools
import logging
import re
from collections.abc import Sequence

from gptjax.text import cuts, described, unicode

_NOTHING = described.Described()
_log = logging.getLogger(__name__)


class SentencePiece(cuts.OneByOne):
    """A SentencePiece model; its </s> separates documents. Its normalisation may lose text."""

    def __init__(self, model: bytes, said: described.Described = _NOTHING) -> None:
        import sentencepiece  # a second of import, for those who use it

        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces, piece = self._processor.vocab_size(), self._processor.id_to_piece
        names = {piece(i): i for i in range(pieces) if self._processor.is_control(i)}
        words = {}  # tokens beside the model's that are text
        for i, token in said.added.items():
            if i == max([pieces, *(1 + n for n in (*names.values(), *words.values()))]):
                (names if token.special else words)[token.content] = i
            elif i >= pieces or piece(i) != token.content:
                _log.warning('the added token %r cannot have id %d: left out', token.content, i)
        of_model = self._processor.piece_to_id
        named = {name: of_model(name) for name in said.special if name not in names}
        names |= {name: i for name, i in named.items() if piece(i) == name}
        self._names, self._words = names, words
        self._added = {i: name for name, i in (names | words).items() if i >= pieces}
        self.n_vocab = pieces + len(self._added)
        self.special = frozenset(names.values())
        self.described, roles = said, said.roles(names, self.special)
        self.end_of_text = roles.get('eos_token', self._processor.eos_id())
        self.variant = described.variant(self.end_of_text, self._processor.eos_id(), self._added)
        begins, asked = self._processor.bos_id(), said.fields.get('add_bos_token')
        first = roles.get('bos_token', begins if asked else -1)
        self.beginning = self.end_of_text if first < 0 else first
        self.prefix = [first] if asked and first >= 0 else []
        described.check_frame(said, self.prefix, [])

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        text = unicode.check(text)
        apart = self._words | (self._names if allow_special else {})
        if not apart:
            return self._processor.encode(text)
        longest_first = sorted(apart, key=len, reverse=True)
        parts = re.split(f'({"|".join(map(re.escape, longest_first))})', text)
        return [
            i
            for n, part in enumerate(parts)
            for i in ([apart[part]] if n % 2 else self._processor.encode(part))
        ]

    def decode(self, ids: Sequence[int]) -> str:
        apart = self.special.union(self._added)
        parts = itertools.groupby(map(int, ids), key=apart.__contains__)
        return ''.join(
            ''.join(map(self._piece, part)) if alone else self._processor.decode(list(part))
            for alone, part in parts
        )

    def _piece(self, i: int) -> str:
        return self._added[i] if i in self._added else self._processor.id_to_piece(i)

    def serialized(self) -> dict[str, bytes]:
        return {'tokenizer.model': self._model}
