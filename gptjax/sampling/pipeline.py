# SPDX-License-Identifier: Apache-2.0
"""Text in three lines, as transformers' pipeline gives it:

from gptjax.sampling.pipeline import pipeline
generate = pipeline('text-generation', model='SmolLM2.gguf')
generate('The capital of France is', max_new_tokens=20, do_sample=False)[0]['generated_text']
"""

import contextlib
import dataclasses
import numbers
import pathlib
from collections.abc import Sequence
from typing import Any

from gptjax.configs import base, errors
from gptjax.models import quantize
from gptjax.runtime import mesh as mesh_lib
from gptjax.sampling import decode, options, router, speculative, texts
from gptjax.sampling import loaded as loaded_lib
from gptjax.text import codec

_CALL = ('return_full_text', 'return_tensors', 'batch_size', 'pad_token_id')


def pipeline(
    task: str,
    model: str | pathlib.Path,
    *,
    dtype: str | None = None,
    weights: quantize.Weights = '',
    cache_dtype: str = '',
    draft: str | pathlib.Path | None = None,
    mesh: mesh_lib.Mesh | None = None,
) -> 'TextGeneration':
    """A function from prompts to texts.

    Args:
      task: 'text-generation'.
      model: a workdir, a published folder or a GGUF file; what models.pretrained.load reads.
      dtype: of the parameters; None = as stored.
      weights: 'int8' or 'int4' quantises them.
      cache_dtype: 'int8' quantises keys and values.
      draft: a small model of the same vocabulary, for speculative decoding.
      mesh: the devices; None = the first one.

    Raises:
      UsageError: another task. InputError: the weights cannot be read.
    """
    errors.require(task == 'text-generation', f"no task {task!r}; there is 'text-generation'")
    with _scope(mesh):
        loaded = loaded_lib.load(model, dtype, weights, cache_dtype, mesh)
        number = base.get_config().engine.draft_tokens
        drafted = loaded_lib.draft(draft, number, dtype, mesh)
    return TextGeneration(loaded, drafted, mesh)


class TextGeneration:
    """What pipeline('text-generation') gives."""

    def __init__(
        self,
        loaded: loaded_lib.Loaded,
        draft: speculative.Draft | None,
        mesh: mesh_lib.Mesh | None,
    ) -> None:
        self._router, self._loaded, self._mesh = router.Router(loaded, draft), loaded, mesh
        self._draft = draft
        self._defaults, tokenizer = loaded.defaults, loaded.tokenizer
        self.tokenizer = None if tokenizer is None else codec.Codec(tokenizer)

    def __call__(self, text_inputs: Any, **given: Any) -> Any:
        """Texts of prompts.

        Args:
          text_inputs: a string, a list of token ids, or a list of strings or of lists of ids.
          given: transformers' generate() keywords as in configs/base.py's decode section, OpenAI's
            presence_penalty, frequency_penalty, logit_bias and logprobs, and of the pipeline
            return_full_text (True), return_tensors (False: generated_token_ids, the prompt
            included, instead of generated_text), batch_size (1), pad_token_id.

        Returns:
          a list with {'generated_text': ...} for each of num_return_sequences; of several prompts,
          a list of such lists.

        Raises:
          UsageError: an unknown option; the message names the nearest. InputError: a prompt does
          not fit.
        """
        one = isinstance(text_inputs, str) or _is_ids(text_inputs)
        errors.require(
            one or isinstance(text_inputs, (list, tuple)),
            f'prompts are a text, a list of ids, or a list of such; got {text_inputs!r}',
        )
        prompts = [text_inputs] if one else list(text_inputs)
        for prompt in prompts:
            errors.require(
                isinstance(prompt, str) or _is_ids(prompt),
                f'a prompt is a text or a list of token ids, not {prompt!r}',
            )
        call = {name: given.pop(name) for name in _CALL if name in given}
        call = {name: value for name, value in call.items() if value is not None}
        pad = call.get('pad_token_id', self._defaults.get('pad_token_id'))
        size = call.get('batch_size', 1)
        errors.require(size > 0, f'batch_size must be above 0, got {size}')
        jobs = [self._job(prompt, given, i) for i, prompt in enumerate(prompts)]
        found: list[list[decode.Text]] = []
        with _scope(self._mesh):
            for start in range(0, len(jobs), size):
                found += self._router.texts(jobs[start : start + size])
        answers = [
            self._answer(prompt, *job, texts_, pad, call)
            for prompt, job, texts_ in zip(prompts, jobs, found, strict=True)
        ]
        return answers[0] if one else answers

    def _job(self, prompt: Any, given: dict[str, Any], place: int) -> router.Job:
        """As generate's: the prompts of a call have seed, seed + 1, ..."""
        ids, asked = self._loaded.job(prompt, given, self._draft)
        return ids, dataclasses.replace(asked, seed=(asked.seed + place) % 2**31)

    def _answer(
        self,
        prompt: Any,
        ids: Sequence[int],
        asked: options.Options,
        found: Sequence[decode.Text],
        pad: int | None,
        call: dict[str, Any],
    ) -> list[dict[str, Any]]:
        """Records as transformers' pipeline makes them; padded where texts differ in length."""
        longest = max(len(text.tokens) for text in found)
        records: list[dict[str, Any]] = []
        for text in found:
            if call.get('return_tensors') or self._loaded.tokenizer is None:
                spare = [_padding(asked, pad)] * (longest - len(text.tokens))
                record: dict[str, Any] = {'generated_token_ids': [*ids, *text.tokens, *spare]}
            else:
                new = texts.continuation(self._loaded.tokenizer, ids, text.tokens)
                full = call.get('return_full_text', True) and isinstance(prompt, str)
                record = {'generated_text': prompt + new if full else new}
            if asked.logprobs >= 0:
                record |= {'logprobs': text.logprobs, 'score': text.score}
                record |= {'top_logprobs': text.top} if text.top else {}
            if asked.echo:
                record |= {'prompt_logprobs': text.prompt_logprobs}
                record |= {'prompt_top_logprobs': text.prompt_top} if text.prompt_top else {}
            records.append(record)
        return records


def _padding(asked: options.Options, pad: int | None) -> int:
    """What transformers fills shorter texts up with; its beam search takes a pad of 0 for none."""
    missing = not pad if asked.num_beams > 1 else pad is None
    return asked.eos_token_id[0] if missing and asked.eos_token_id else pad or 0


def _is_ids(prompt: Any) -> bool:
    """Whether it is a list of token ids, numpy's included; an empty one is, too."""
    if isinstance(prompt, str) or not hasattr(prompt, '__len__'):
        return False
    return all(isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in prompt)


def _scope(mesh: mesh_lib.Mesh | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if mesh is None else mesh.scope()
