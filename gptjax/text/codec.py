# SPDX-License-Identifier: Apache-2.0
"""A tokenizer as people know it from transformers: encode, decode, batch_decode, *_token_id."""

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

from gptjax.configs import errors
from gptjax.text import chat, described
from gptjax.text import tokenizer as tokenizer_lib


class Codec:
    """Wraps a text.tokenizer.Tokenizer; `bos_token_id` and the like are None where it has none."""

    def __init__(self, tokenizer: tokenizer_lib.Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return self.tokenizer.n_vocab

    def __call__(self, text: str | Sequence[str], **given: Any) -> dict[str, list]:
        """{'input_ids', 'attention_mask'} of a text, or of several."""
        if isinstance(text, str):
            ids: list = self.encode(text, **given)
            return {'input_ids': ids, 'attention_mask': [1] * len(ids)}
        ids = [self.encode(one, **given) for one in text]
        return {'input_ids': ids, 'attention_mask': [[1] * len(one) for one in ids]}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; names of special tokens in it are these tokens.

        Args:
          add_special_tokens: what goes before every prompt is in front.
        """
        ids = self.tokenizer.encode(text, allow_special=True)
        return [*self.tokenizer.prefix, *ids] if add_special_tokens else ids

    def decode(
        self,
        token_ids: int | Iterable[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """The text of ids, as it is: spaces are cleaned up by nobody."""
        del clean_up_tokenization_spaces
        given = [token_ids] if isinstance(token_ids, numbers.Integral) else token_ids
        ids = [int(i) for i in given]
        wrong = [i for i in ids if not 0 <= i < len(self)]
        errors.require(not wrong, f'ids are from 0 to {len(self) - 1}, got {wrong[:1]}')
        left_out = self.tokenizer.special if skip_special_tokens else frozenset()
        return self.tokenizer.decode([i for i in ids if i not in left_out])

    def batch_decode(
        self, sequences: Iterable[Iterable[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        """The texts of several sequences of ids."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def apply_chat_template(
        self,
        conversation: Sequence[chat.Message],
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        chat_template: str = '',
        **more: Any,
    ) -> list[int] | str:
        """Messages as the ids, or the text, that the model was trained to read.

        Args:
          chat_template: the name of one, where several were published, or one itself.
          more: as text.chat.render().

        Raises:
          InputError: there is no template, or it refuses these messages.
        """
        text = chat.render(
            self.tokenizer.described,
            conversation,
            chat_template,
            add_generation_prompt=add_generation_prompt,
            **more,
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def __getattr__(self, name: str) -> Any:
        """eos_token, eos_token_id and so on, as the files beside the vocabulary name them."""
        role = name.removesuffix('_id')
        if role not in described.ROLES:
            raise AttributeError(f'a tokenizer has no {name!r} here')
        i = self._id(role)
        return i if name.endswith('_id') or i is None else self.tokenizer.decode([i])

    def _id(self, role: str) -> int | None:
        """By its name; where nothing is said of a vocabulary, bos and eos are what ends texts."""
        said = self.tokenizer.described
        if not said.fields and role in ('bos_token', 'eos_token'):
            return i if (i := self.tokenizer.end_of_text) >= 0 else None
        ids = self.tokenizer.encode(said.name(role), allow_special=True)
        return ids[0] if len(ids) == 1 and said.name(role) else None
