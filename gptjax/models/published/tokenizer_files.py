# SPDX-License-Identifier: Apache-2.0
"""A tokenizer as the files by which Hugging Face transformers knows it."""

import json
import logging

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gptjax.text import described
from gptjax.text import tokenizer as tokenizer_lib

_log = logging.getLogger(__name__)


def of(tokenizer: tokenizer_lib.Tokenizer, n_ctx: int) -> dict[str, bytes]:
    """Name -> content: what we read, and what transformers reads where its ids are the same."""
    found = tokenizer.serialized()
    if isinstance(tokenizer, tokenizer_lib.Bytes):
        found |= {'tokenizer.json': _bytes_as_bpe().to_str().encode()}
    said = dict(tokenizer.described.fields)
    if 'tokenizer.json' not in found and not said:
        _log.warning(
            'transformers would cut text otherwise than this %s tokenizer, so no '
            'tokenizer_config.json is written; gptjax reads the folder as it is',
            type(tokenizer).__name__,
        )
        return found
    first, end = (
        tokenizer.decode([i]) if i >= 0 else None
        for i in (tokenizer.beginning, tokenizer.end_of_text)
    )
    usual = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_max_length': n_ctx,
        'clean_up_tokenization_spaces': False,
        'bos_token': first,
        'eos_token': end,
    }
    return found | {described.CONFIG: (json.dumps(usual | said, indent=2) + '\n').encode()}


def _bytes_as_bpe() -> tokenizers.Tokenizer:
    """Bytes in Hugging Face's form: byte-level BPE without merges."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # stand for themselves
    others = (b for b in range(256) if b not in plain)
    letters = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
    vocabulary = {letters[b]: b for b in range(256)} | {tokenizer_lib.END_OF_TEXT: 256}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizer_lib.END_OF_TEXT])
    return backend
