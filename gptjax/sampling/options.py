# SPDX-License-Identifier: Apache-2.0
"""What a request for text may ask for, in the names of transformers' generate and OpenAI's API."""

import dataclasses
import difflib
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from gptjax.configs import errors

MOST_BEAMS = 2**10
MOST_TEXTS = 2**14  # of one prompt
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
    top_h: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    epsilon_cutoff: float
    eta_cutoff: float
    guidance_scale: float
    encoder_repetition_penalty: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram_size: int
    encoder_no_repeat_ngram_size: int
    bad_words_ids: tuple[tuple[int, ...], ...]
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...]
    logit_bias: tuple[tuple[int, float], ...]
    suppress_tokens: tuple[int, ...]
    begin_suppress_tokens: tuple[int, ...]
    forced_bos_token_id: int
    forced_eos_token_id: tuple[int, ...]
    exponential_decay_length_penalty: tuple[float, ...]
    remove_invalid_values: bool
    renormalize_logits: bool
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
            'encoder_no_repeat_ngram_size',
            'seed',
        )
        errors.require(
            self.max_new_tokens + self.max_length > 0,
            'give max_new_tokens, or max_length, which includes the prompt',
        )
        errors.require_between(self, 0.0, 1e4, 'temperature', 'guidance_scale')
        for field in ('top_p', 'typical_p'):
            value = getattr(self, field)
            errors.require(
                0.0 < value <= 1.0,
                f'{field} must be in (0, 1], got {value}; for the most likely token say '
                'do_sample=False',
            )
        errors.require_between(self, 0.0, 1.0, 'min_p', 'top_h')
        for field in ('epsilon_cutoff', 'eta_cutoff'):
            value = getattr(self, field)
            errors.require(0.0 <= value < 1.0, f'{field} must be in [0, 1), got {value}')
        errors.require_positive(
            self,
            'repetition_penalty',
            'encoder_repetition_penalty',
            'num_beams',
            'num_beam_groups',
            'num_return_sequences',
        )
        errors.require_between(self, 1e-9, 1e9, 'repetition_penalty', 'encoder_repetition_penalty')
        errors.require_between(self, 1, MOST_BEAMS, 'num_beams')
        errors.require_between(self, 1, MOST_TEXTS, 'num_return_sequences')
        errors.require_between(self, -2.0, 2.0, 'presence_penalty', 'frequency_penalty')
        errors.require_between(self, 0.0, 1e9, 'diversity_penalty')
        errors.require_between(self, -1e3, 1e3, 'length_penalty')
        errors.require_choice(self, 'early_stopping', (False, True, 'never'))
        errors.require_choice(self, 'beyond_context', ('error', 'slide'))
        errors.require_between(self, -1, MOST_LOGPROBS, 'logprobs')
        errors.require_between(self, 0, 64, 'prompt_lookup_num_tokens')
        errors.require(
            all(self.stop_strings), 'a stop string is empty; it would stop every text at once'
        )
        self._check_tokens()
        self._check_together()

    def _check_tokens(self) -> None:
        """What names tokens, as far as it can be known without a vocabulary."""
        for name, ids in self.named():
            errors.require(
                bool(ids) and min(ids) >= 0,
                f'{name} is of token ids from 0 on, at least one in a sequence; got {list(ids)}',
            )
        for words, bias in self.biases():
            errors.require(
                not math.isnan(bias), f'sequence_bias and logit_bias are numbers; {words} has a NaN'
            )
        for forced in (self.forced_bos, self.forced_eos_token_id):
            errors.require(
                not forced or not {*forced} <= {*self.suppress_tokens},
                f'suppress_tokens holds all of {list(forced)}, one of which is forced; take it out',
            )
        decay = self.exponential_decay_length_penalty
        pair = len(decay) == 2 and decay[0] >= 0 and decay[0] % 1 == 0 and 1e30 > decay[1] > 0
        errors.require(
            not decay or pair,
            'exponential_decay_length_penalty is (whole number of tokens, factor above 0), got '
            f'{decay}',
        )

    def _check_together(self) -> None:
        """What options ask of one another."""
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
            not self.looks_up or (self.num_beams == 1 and not self.echo),
            'prompt_lookup_num_tokens goes with num_beams = 1 and without echo',
        )
        errors.require(
            self.num_beams == 1 or self.logprobs <= 0,
            'logprobs above 0 goes with num_beams = 1: beams keep those of their own tokens alone',
        )
        slides = self.beyond_context == 'slide'
        errors.require(
            not (self.guided and (self.num_beams > 1 or self.echo or slides or self.looks_up)),
            "guidance_scale goes with num_beams = 1 and beyond_context='error', without echo and "
            'prompt_lookup_num_tokens',
        )

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn; temperature 0 means the most likely one, as in OpenAI's API."""
        return self.do_sample and self.temperature > 0

    @property
    def guided(self) -> bool:
        """Whether the text without its prompt is decoded beside it."""
        return self.guidance_scale != 1

    @property
    def looks_up(self) -> bool:
        """Whether drafts are found in the text so far."""
        return self.prompt_lookup_num_tokens > 0

    @property
    def by_itself(self) -> bool:
        """Whether it cannot be decoded in a slot among other requests."""
        return self.num_beams > 1 or self.echo or self.looks_up or self.guided

    @property
    def forced_bos(self) -> tuple[int, ...]:
        """forced_bos_token_id where there is one."""
        return () if self.forced_bos_token_id == -1 else (self.forced_bos_token_id,)

    def named(self) -> list[tuple[str, tuple[int, ...]]]:
        """(option, token ids) of all that name tokens but the end tokens."""
        lists = {
            'suppress_tokens': self.suppress_tokens,
            'begin_suppress_tokens': self.begin_suppress_tokens,
            'forced_bos_token_id': self.forced_bos,
            'forced_eos_token_id': self.forced_eos_token_id,
        }
        return [
            *(('bad_words_ids', words) for words in self.bad_words_ids),
            *(('sequence_bias', words) for words, _ in self.sequence_bias),
            *(('logit_bias', (token,)) for token, _ in self.logit_bias),
            *((name, ids) for name, ids in lists.items() if ids),
        ]

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
    said = {name: word for word, name in _SYNONYMS.items() if given.get(word) is not None}
    for field in dataclasses.fields(Options):
        form, what = _FORMS.get(field.name) or _FORMS_OF_TYPES.get(field.type, (None, ''))
        value = values[field.name]
        try:
            values[field.name] = form(value) if form else value
        except (TypeError, ValueError, ArithmeticError) as e:
            name = said.get(field.name, field.name)
            raise errors.UsageError(f'{name} is {what}, got {value!r}') from e
    asked = Options(**values)
    idle = [name for name in _DRAWING if given.get(name) is not None]
    if idle and not asked.do_sample and asked.temperature > 0:
        warnings.warn(f'{", ".join(idle)}: no effect without do_sample=True', stacklevel=2)
    return asked


def plain(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults with what was given in their place; not yet checked but for names. As make()."""
    known = [field.name for field in dataclasses.fields(Options)]
    values = dict(defaults)
    named = {_SYNONYMS.get(k, k): v for k, v in given.items()}
    for name, value in named.items():
        if name not in known:
            if name in _ELSEWHERE:
                raise errors.UsageError(f'{name} is no generation option here: {_ELSEWHERE[name]}')
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


def _whole(value: Any) -> int:
    if isinstance(value, (bool, str)) or value != int(value) or abs(value) >= 2**31:
        raise TypeError
    return int(value)


def _real(value: Any) -> float:
    if isinstance(value, (bool, str)):
        raise TypeError
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _early(value: Any) -> Any:
    return bool(value) if value in (0, 1) else value


def _ids(value: Any) -> tuple[int, ...]:
    value = value if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    return tuple(_whole(i) for i in value)


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


def _reals(value: Any) -> tuple[float, ...]:
    return tuple(_real(x) for x in value)


_SYNONYMS = {'stop': 'stop_strings', 'n': 'num_return_sequences', 'max_tokens': 'max_new_tokens'}
_DRAWING = (
    'temperature',
    'top_h',
    'top_k',
    'top_p',
    'min_p',
    'typical_p',
    'epsilon_cutoff',
    'eta_cutoff',
)
_NOT_BUILT = "it is transformers' and not built"
_ELSEWHERE = {
    'streamer': "generate's --stream prints text as it comes; in Python Router.streamed() of "
    'sampling.router tells a Stream, and submit() of sampling.engine its on_text',
    'assistant_model': 'give a draft to the pipeline, or --config.engine.draft to generate',
    'penalty_alpha': _NOT_BUILT,
    'dola_layers': _NOT_BUILT,
    'constraints': _NOT_BUILT,
    'force_words_ids': _NOT_BUILT,
    'prefix_allowed_tokens_fn': _NOT_BUILT,
    'logits_processor': _NOT_BUILT,
    'stopping_criteria': _NOT_BUILT,
    'watermarking_config': _NOT_BUILT,
}
_ID_LIST = (_ids, 'a token id or a list of them')
_FORMS_OF_TYPES = {
    int: (_whole, 'a whole number'),
    float: (_real, 'a number'),
    bool: (_flag, 'True or False'),
}
_FORMS = {
    'bad_words_ids': (_words, 'a list of lists of token ids'),
    'sequence_bias': (_word_biases, 'a dict from tuples of token ids to numbers'),
    'logit_bias': (_biases, 'a dict from token ids to numbers'),
    'suppress_tokens': _ID_LIST,
    'begin_suppress_tokens': _ID_LIST,
    'forced_eos_token_id': _ID_LIST,
    'eos_token_id': _ID_LIST,
    'exponential_decay_length_penalty': (_reals, 'a pair (start, factor)'),
    'early_stopping': (_early, "True, False or 'never'"),
    'stop_strings': (_strings, 'a string or a list of them'),
}
