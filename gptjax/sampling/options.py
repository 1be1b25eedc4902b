# SPDX-License-Identifier: Apache-2.0
"""What a request for text may ask for, in the names of transformers' generate and OpenAI's API."""

import dataclasses
import difflib
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from gptjax.configs import errors

MOST_LOGPROBS = 20  # alternatives a token, as in OpenAI's API


@dataclasses.dataclass(frozen=True)
class Options:
    """The decode section of configs/base.py, where each field is explained."""

    max_new_tokens: int
    max_length: int
    min_new_tokens: int
    min_length: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram_size: int
    bad_words_ids: tuple[tuple[int, ...], ...]
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...]
    logit_bias: tuple[tuple[int, float], ...]
    num_beams: int
    num_beam_groups: int
    diversity_penalty: float
    length_penalty: float
    early_stopping: bool | Literal['never']
    num_return_sequences: int
    eos_token_id: tuple[int, ...]
    stop_strings: tuple[str, ...]
    split_special_tokens: bool
    logprobs: int
    echo: bool
    beyond_context: Literal['error', 'slide']
    prompt_lookup_num_tokens: int
    seed: int

    def __post_init__(self) -> None:
        errors.require_between(
            self,
            0,
            2**31 - 1,
            'max_new_tokens',
            'max_length',
            'min_new_tokens',
            'min_length',
            'top_k',
            'no_repeat_ngram_size',
            'seed',
        )
        errors.require(
            self.max_new_tokens + self.max_length > 0,
            'give max_new_tokens, or max_length, which includes the prompt',
        )
        errors.require_between(self, 0.0, 1e4, 'temperature')
        for field in ('top_p', 'typical_p'):
            value = getattr(self, field)
            errors.require(0.0 < value <= 1.0, f'{field} must be in (0, 1], got {value}')
        errors.require_between(self, 0.0, 1.0, 'min_p')
        errors.require_positive(
            self, 'repetition_penalty', 'num_beams', 'num_beam_groups', 'num_return_sequences'
        )
        errors.require_between(self, -2.0, 2.0, 'presence_penalty', 'frequency_penalty')
        errors.require_between(self, 0.0, 1e9, 'diversity_penalty')
        errors.require(
            math.isfinite(self.length_penalty),
            f'length_penalty must be finite, got {self.length_penalty}',
        )
        errors.require_choice(self, 'early_stopping', (False, True, 'never'))
        errors.require_choice(self, 'beyond_context', ('error', 'slide'))
        errors.require_between(self, -1, MOST_LOGPROBS, 'logprobs')
        errors.require_between(self, 0, 64, 'prompt_lookup_num_tokens')
        errors.require(
            self.num_beams % self.num_beam_groups == 0,
            f'num_beams = {self.num_beams} is not a multiple of num_beam_groups = '
            f'{self.num_beam_groups}',
        )
        errors.require(
            self.diversity_penalty == 0 or self.num_beam_groups > 1,
            'diversity_penalty needs num_beam_groups above 1 (and num_beams a multiple of it)',
        )
        errors.require(
            self.num_beams == 1 or self.num_return_sequences <= self.num_beams,
            f'num_return_sequences = {self.num_return_sequences} exceeds num_beams = '
            f'{self.num_beams}; beam search returns that many at most',
        )
        errors.require(
            self.num_beams > 1 or self.num_return_sequences == 1 or self.samples,
            f'num_return_sequences = {self.num_return_sequences} without do_sample or num_beams '
            'would return the same text every time; set do_sample=True or num_beams',
        )
        errors.require(
            self.num_beams == 1 or (self.beyond_context == 'error' and not self.echo),
            "num_beams above 1 goes with beyond_context='error' and without echo",
        )
        errors.require(
            self.prompt_lookup_num_tokens == 0 or (self.num_beams == 1 and not self.echo),
            'prompt_lookup_num_tokens goes with num_beams = 1 and without echo',
        )
        errors.require(
            all(self.stop_strings), 'a stop string is empty; it would stop every text at once'
        )
        errors.require(
            self.num_beams == 1 or self.logprobs <= 0,
            'logprobs above 0 goes with num_beams = 1: beams keep those of their own tokens alone',
        )
        for words, bias in self.biases():
            errors.require(
                bool(words) and all(i >= 0 for i in words) and not math.isnan(bias),
                'biases and bad words are of non-empty sequences of token ids, and no NaN; got '
                f'{list(words)}: {bias}',
            )

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn; temperature 0 means the most likely one, as in OpenAI's API."""
        return self.do_sample and self.temperature > 0

    @property
    def by_itself(self) -> bool:
        """Whether it cannot be decoded in a slot among other requests."""
        return self.num_beams > 1 or self.echo or self.prompt_lookup_num_tokens > 0

    def biases(self) -> list[tuple[tuple[int, ...], float]]:
        """(tokens, what is added to the logit of the last where the others precede it).

        Bad words are biases of minus infinity; a word that is one end token alone is left out.
        """
        ends = {(i,) for i in self.eos_token_id}
        bad = [(words, -math.inf) for words in self.bad_words_ids if words not in ends]
        single = [((token,), bias) for token, bias in self.logit_bias]
        return [*self.sequence_bias, *single, *bad]

    def limit(self, prompt: int) -> int:
        """The most tokens of prompt and text together.

        Raises:
          InputError: the prompt alone has as many.
        """
        if self.max_new_tokens:
            return prompt + self.max_new_tokens
        if prompt >= self.max_length:
            raise errors.InputError(
                f'a prompt of {prompt} tokens leaves nothing of max_length = {self.max_length}, '
                'which includes the prompt; raise it, or give max_new_tokens'
            )
        return self.max_length


def make(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Options:
    """Options from a complete set of defaults and what a user gave, in any of the usual forms.

    None leaves a default alone. An id may stand for a list of ids, a string for a list of strings,
    a dict for a list of pairs. `stop` is another name of stop_strings, `n` of num_return_sequences,
    `max_tokens` of max_new_tokens (OpenAI's).

    Raises:
      UsageError: an option is unknown (the message names the nearest), or a value is out of range.
    """
    values = plain(defaults, given)
    try:
        for name, form in _FORMS.items():
            values[name] = form(values[name])
        for field in dataclasses.fields(Options):
            if field.type in (int, float):
                values[field.name] = _number(field.type, values[field.name])
            elif not isinstance(values[field.name], bool) and field.type is bool:
                raise TypeError(f'{field.name} is True or False, not {values[field.name]!r}')
        if values['early_stopping'] in (0, 1):
            values['early_stopping'] = bool(values['early_stopping'])
        return Options(**values)
    except (TypeError, ValueError, KeyError, ArithmeticError) as e:
        if isinstance(e, errors.InputError):
            raise
        raise errors.UsageError(f'a generation option has a value of the wrong type: {e}') from e


def plain(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults with what was given in their place; not yet checked but for names. As make()."""
    known = [field.name for field in dataclasses.fields(Options)]
    values = dict(defaults)
    named = {_SYNONYMS.get(k, k): v for k, v in given.items()}
    for name, value in named.items():
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *_SYNONYMS], 1, cutoff=0.5)
            hint = f'; did you mean {near[0]!r}?' if near else f'; there are: {", ".join(known)}'
            raise errors.UsageError(f'unknown generation option {name!r}{hint}')
        if value is not None:
            values[name] = value
    if named.get('max_length') and named.get('max_new_tokens'):
        warnings.warn('max_new_tokens is given, too: max_length is ignored', stacklevel=3)
    elif named.get('max_length'):
        values['max_new_tokens'] = 0
    return values


def _number(kind: type, value: Any) -> Any:
    if isinstance(value, (bool, str)) or (kind is int and value != int(value)):
        raise TypeError(f'expected {kind.__name__}, got {value!r}')
    return kind(value)


def _ids(value: Any) -> tuple[int, ...]:
    value = value if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    return tuple(_number(int, i) for i in value)


def _strings(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(str(s) for s in value)


def _words(value: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(_ids(words) for words in value)


def _word_biases(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    return tuple((_ids(words), float(bias)) for words, bias in pairs)


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    return tuple((int(str(token)), float(bias)) for token, bias in pairs)  # JSON has string keys


_SYNONYMS = {'stop': 'stop_strings', 'n': 'num_return_sequences', 'max_tokens': 'max_new_tokens'}
_FORMS = {
    'bad_words_ids': _words,
    'sequence_bias': _word_biases,
    'logit_bias': _biases,
    'eos_token_id': _ids,
    'stop_strings': _strings,
}
