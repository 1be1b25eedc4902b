# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a published model: its config, its tensors (dequantised), its tokenizer."""

import functools
import json
import logging
import pathlib
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gptjax.configs import errors
from gptjax.models import gpt
from gptjax.models.published import gguf_header, llama
from gptjax.models.published.tensors import Stored
from gptjax.text import described, trial
from gptjax.text import tokenizer as tokenizer_lib

_KINDS = gguf.GGMLQuantizationType
_HALVES = {_KINDS.F16: np.dtype(np.float16), _KINDS.BF16: np.dtype(ml_dtypes.bfloat16)}
_PLAIN = {_KINDS.F32: np.dtype(np.float32), **_HALVES}
_CONTROL = 3  # tokenizer.ggml.token_type of special tokens
_USER_DEFINED = 4

# The pre-tokenizers that GGUF names without their pattern, as Hugging Face's tokenizer.json files
# of the same models have them; each compared with llama.cpp 0.3.16's ids on 70 hard texts.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_ENDS = r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_SPLITS = {
    'llama-bpe': _CONTRACTIONS + r'\p{N}{1,3}' + _ENDS,
    'qwen2': _CONTRACTIONS + r'\p{N}' + _ENDS,
}
_FIELDS = frozenset(
    f'llama.{name}'
    for name in (
        'block_count',
        'context_length',
        'embedding_length',
        'feed_forward_length',
        'vocab_size',
        'attention.head_count',
        'attention.head_count_kv',
        'attention.key_length',
        'attention.value_length',
        'attention.layer_norm_rms_epsilon',
        'rope.dimension_count',
        'rope.freq_base',
    )
)
_PRE_TOKENIZERS = ('gpt-2', 'smollm', *_SPLITS)
_BEGINNING = ('llama-bpe',)  # with these a text begins with bos where the file does not say
_TEMPLATE = 'tokenizer.chat_template'
_log = logging.getLogger(__name__)
_ROLES = {  # role of a token -> what GGUF calls it
    'bos_token': 'bos',
    'eos_token': 'eos',
    'unk_token': 'unknown',
    'sep_token': 'seperator',
    'pad_token': 'padding',
    'cls_token': 'cls',
    'mask_token': 'mask',
}


class File:
    """An opened GGUF file. Raises InputError where it is none, or of an unknown architecture."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._fields, self._places = gguf_header.read(path)
        architecture = self._value('general.architecture')
        if architecture != 'llama':
            raise errors.InputError(f'{path} holds a {architecture!r}; of GGUF only llama is read')

    def tensors(self) -> dict[str, Stored]:
        """Every tensor; quantised ones are read as float32, float16 and bfloat16 as they are."""
        return {
            name: Stored(
                place.shape,
                np.dtype(_HALVES.get(place.kind, np.float32)),
                functools.partial(_read, self._path, place),
            )
            for name, place in self._places.items()
        }

    def quantisation(self) -> str:
        """The file's kind, as 'Q4_1'; say it beside every score."""
        number = self._value('general.file_type', None)
        if number not in list(gguf.LlamaFileType):
            kinds = sorted({place.kind.name for place in self._places.values()})
            return ', '.join(kinds)
        kind = gguf.LlamaFileType(number)
        return kind.name.removeprefix('MOSTLY_').removeprefix('ALL_')

    def beside(self) -> dict[str, bytes]:
        """What a published folder would say beside tensors and vocabulary: name -> content."""
        ends = [self._id(name) for name in ('eos', 'eot', 'eom')]
        ends = [i for i in dict.fromkeys(ends) if i is not None]
        found = {'bos_token_id': self._id('bos'), 'pad_token_id': self._id('padding')}
        found |= {'eos_token_id': ends[0] if len(ends) == 1 else ends or None}
        found = {name: i for name, i in found.items() if i is not None}
        general = {
            name: self._value(name) for name in sorted(self._fields) if name.startswith('general.')
        }
        files = {'generation_config.json': found, 'gguf_metadata.json': general}
        return {name: (json.dumps(said, indent=2) + '\n').encode() for name, said in files.items()}

    def config(self) -> gpt.Config:
        """Our Config. Raises InputError on what ours does not compute."""
        unknown = [
            name for name in self._fields if name.startswith('llama.') and name not in _FIELDS
        ]
        unknown += ['rope_freqs.weight'] if 'rope_freqs.weight' in self.tensors() else []
        if unknown or self._value('split.count', 1) > 1:
            raise errors.InputError(
                f'{self._path} has {unknown[0] if unknown else "split.count"}, which is not known '
                'here and may change what is computed: load the safetensors of the same model'
            )
        n_heads = self._value('llama.attention.head_count')
        d_model = self._value('llama.embedding_length')
        d_head = self._value('llama.attention.key_length', d_model // n_heads)
        if self._value('llama.rope.dimension_count', d_head) != d_head:
            raise errors.InputError(f'{self._path} rotates a part of each head only')
        return llama.LLAMA.config(
            {
                'num_hidden_layers': self._value('llama.block_count'),
                'hidden_size': d_model,
                'num_attention_heads': n_heads,
                'num_key_value_heads': self._value('llama.attention.head_count_kv', n_heads),
                'head_dim': d_head,
                'intermediate_size': self._value('llama.feed_forward_length'),
                'max_position_embeddings': self._value('llama.context_length'),
                'vocab_size': self.tensors()['token_embd.weight'].shape[0],
                'rms_norm_eps': self._value('llama.attention.layer_norm_rms_epsilon'),
                'rope_theta': self._value('llama.rope.freq_base', 1e4),
                'tie_word_embeddings': 'output.weight' not in self.tensors(),
                'attention_bias': 'blk.0.attn_q.bias' in self.tensors(),
            }
        )

    def tokenizer(self) -> tokenizer_lib.Tokenizer | None:
        """Its byte-level BPE; None where it has no tokenizer.

        Raises:
          InputError: its kind, or its pre-tokenizer, is not among the verified ones.
        """
        kind = self._value('tokenizer.ggml.model', 'none')
        if kind == 'none':
            return None
        if kind != 'gpt2':
            raise errors.InputError(
                f'{self._path} has a tokenizer of kind {kind!r}; of GGUF only gpt2 (byte-level '
                'BPE) is read: load the Hugging Face folder of the same model'
            )
        name = self._value('tokenizer.ggml.pre', 'default')
        if name not in _PRE_TOKENIZERS:
            raise errors.InputError(
                f'{self._path} names the pre-tokenizer {name!r} without saying what it is; '
                f'verified are: {", ".join(_PRE_TOKENIZERS)}. Load the Hugging Face folder of the '
                'same model'
            )
        names = self._value('tokenizer.ggml.tokens')
        kinds = self._value('tokenizer.ggml.token_type')
        if max(map(len, names), default=0) > trial.LONGEST:
            raise errors.InputError(f'{self._path} has tokens of more than {trial.LONGEST} letters')
        merges = [tuple(merge.split(' ')) for merge in self._value('tokenizer.ggml.merges')]
        vocabulary = {token: i for i, token in enumerate(names)}
        # Llama 3 takes a word that is a token whole, even where no merges lead to it.
        whole = name == 'llama-bpe'
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole))
        backend.pre_tokenizer = _pre_tokenizer(name)
        backend.decoder = decoders.ByteLevel()
        control = [names[i] for i, kind in enumerate(kinds) if kind == _CONTROL]
        backend.add_special_tokens(control)
        backend.add_tokens([names[i] for i, kind in enumerate(kinds) if kind == _USER_DEFINED])
        said = self._described(names, name)
        described.frame(backend, said)
        return tokenizer_lib.Subwords(backend, said)

    def _described(self, names: list[str], pre: str) -> described.Described:
        """As a tokenizer_config.json; defaults are llama.cpp's for the pre-tokenizer."""
        ids = {role: self._id(name) for role, name in _ROLES.items()}
        fields: dict[str, Any] = {role: names[i] for role, i in ids.items() if i is not None}
        fields |= {
            'add_bos_token': self._value('tokenizer.ggml.add_bos_token', pre in _BEGINNING) is True,
            'add_eos_token': self._value('tokenizer.ggml.add_eos_token', False) is True,
            'clean_up_tokenization_spaces': False,
            'model_max_length': self._value('llama.context_length'),
            'tokenizer_class': 'PreTrainedTokenizerFast',
        }
        templates = {
            field.removeprefix(_TEMPLATE).removeprefix('.') or 'default': str(self._value(field))
            for field in self._fields
            if field == _TEMPLATE or field.startswith(f'{_TEMPLATE}.')
        }
        fields |= {'chat_template': described.templates(templates)} if templates else {}
        return described.Described(fields)

    def _id(self, name: str) -> int | None:
        """The id of a token that has a role, as 'bos'; None where it has none, or an absurd one."""
        found = self._value(f'tokenizer.ggml.{name}_token_id', None)
        size = len(self._value('tokenizer.ggml.tokens', ()))
        if found is not None and not (isinstance(found, int) and 0 <= found < size):
            _log.warning(
                '%s: %s_token_id = %r is none of its %d tokens: left out',
                self._path,
                name,
                found,
                size,
            )
            return None
        return found

    def _value(self, name: str, *default: Any) -> Any:
        if name in self._fields:
            found = self._fields[name]
            return found.tolist() if isinstance(found, np.ndarray) else found
        if default:
            return default[0]
        raise errors.InputError(f'{self._path} has no field {name}; it is damaged or too old')


def _read(path: pathlib.Path, place: gguf_header.Place) -> np.ndarray:
    stored = np.fromfile(path, np.uint8, place.size, offset=place.start)
    if len(stored) != place.size:
        raise errors.InputError('it is cut short; fetch it again')
    if place.kind in _PLAIN:
        return stored.view(_PLAIN[place.kind]).reshape(place.shape)
    rows = stored.reshape(*place.shape[:-1], -1)
    try:
        return gguf.quants.dequantize(rows, place.kind).reshape(place.shape)
    except NotImplementedError as e:
        raise errors.InputError(f'its kind {place.kind.name} is not known here') from e


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in _SPLITS)
    if name in _SPLITS:
        split = pre_tokenizers.Split(tokenizers.Regex(_SPLITS[name]), 'isolated')
        return pre_tokenizers.Sequence([split, byte_level])
    if name == 'smollm':
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level])
    return byte_level
