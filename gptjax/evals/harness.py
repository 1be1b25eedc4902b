# SPDX-License-Identifier: Apache-2.0
"""gptjax as a model of EleutherAI's lm-evaluation-harness: all its tasks run on our weights.

  python -m gptjax.evaluate harness --model_args pretrained=PATH --tasks lambada_openai,piqa

takes lm_eval's own arguments, among them --apply_chat_template, --system_instruction and
--fewshot_as_multiturn. model_args: pretrained (a workdir, published folder or .gguf file), dtype,
max_length (tokens), batch_tokens (scored at once), max_gen_toks, prefix_token_id, add_bos_token.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Any

import tqdm

from gptjax.configs import errors
from gptjax.runtime import mesh as mesh_lib
from gptjax.runtime import program, streams
from gptjax.sampling import loaded as loaded_lib
from gptjax.sampling import options, router, score, texts
from gptjax.text import chat, codec

try:
    from lm_eval.api import model as harness_model
    from lm_eval.api import registry
    from lm_eval.models import utils as harness_utils
except ImportError as e:
    raise errors.InputError(f"the harness needs: pip install 'gptjax[eval]' ({e})") from e

_log = logging.getLogger('gptjax')


def main(arguments: Sequence[str]) -> int:
    """Runs lm_eval with gptjax as its model; returns the exit code."""
    from lm_eval import __main__ as command

    streams.set_up()
    program.set_up_logging()
    first = list(arguments[:1])
    arguments = list(arguments)
    evaluates = first != ['ls'] and first != ['validate'] and not {'-h', '--help'} & set(arguments)
    if evaluates and not any(a.partition('=')[0] in ('--model', '-M') for a in arguments):
        arguments += ['--model', 'gptjax']
    sys.argv = ['evaluate harness', *arguments]
    program.keep_memory()
    try:
        command.cli_evaluate()
    except (errors.InputError, ValueError) as e:  # lm_eval tells of unknown tasks so
        print(f'error: {_line(e)}', file=sys.stderr)
        return 1
    except Exception as e:  # of tasks, which are code and data of others
        _log.debug('lm_eval failed', exc_info=True)
        print(f'error: lm_eval: {type(e).__name__}: {_line(e)}', file=sys.stderr)
        return 1
    return 0


def _line(error: Exception) -> str:
    return ' '.join(str(error).split())


@registry.register_model('gptjax')
class Model(harness_model.TemplateLM):
    """What the harness asks of a model: log-likelihoods, whole or of continuations, and texts."""

    def __init__(
        self,
        pretrained: str = '',
        dtype: str | None = None,
        max_length: int = 0,
        batch_tokens: int = 1024,
        max_gen_toks: int = 256,
        batch_size: int | str = 8,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        **ignored: Any,
    ) -> None:
        """Args: as the module says; batch_size is of texts that are generated side by side.

        prefix_token_id: what an empty context is; None = bos, else the end of text.
        add_bos_token: whether every context begins with bos; None = as the tokenizer says.
        """
        super().__init__()
        errors.require(bool(pretrained), 'give --model_args pretrained=<weights>')
        unknown = [name for name in ignored if name not in ('device', 'max_batch_size')]
        errors.require(not unknown, f'unknown model_args: {", ".join(unknown)}')
        self._mesh = mesh_lib.one_device()
        with self._mesh.scope():
            self._loaded = loaded_lib.load(pretrained, dtype, mesh=self._mesh, raw=True)
        if self._loaded.tokenizer is None:
            raise errors.InputError(f'{pretrained} has no tokenizer; the harness asks in text')
        self._tokens = self._loaded.tokenizer
        most = self._loaded.decoder.most_tokens
        errors.require(
            most is None or max_length <= most,
            f'max_length = {max_length} is beyond n_ctx = {most}',
        )
        self.max_length = int(max_length) or most or 2048
        self._max_gen_toks, self._batch_tokens = int(max_gen_toks), int(batch_tokens)
        self._batch_size = int(batch_size) if str(batch_size).isdecimal() else 8
        usual = [self._tokens.beginning] if add_bos_token else []
        self._before = self._tokens.prefix if add_bos_token is None else usual
        self._first = self._prefix() if prefix_token_id is None else int(prefix_token_id)
        self._template, self._name = '', pretrained

    def _prefix(self) -> int:
        """What an empty context is: bos where the tokenizer names it, else the end of text."""
        known = codec.Codec(self._tokens)
        named = (known.bos_token_id, known.eos_token_id)
        return next((i for i in named if i is not None), texts.prompt_ids(self._tokens, '')[0])

    @property
    def eot_token_id(self) -> int:
        end = self._tokens.end_of_text
        return self._first if end < 0 else end

    @property
    def prefix_token_id(self) -> int:
        return self._first

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace('/', '__')

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that apply_chat_template() will use: the default one, or the one named."""
        if not chat_template:
            return None
        self._template = chat_template if isinstance(chat_template, str) else ''
        return chat.select(self._tokens.described, self._template)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as a text; without those of the system where the template takes none."""
        chat.select(self._tokens.described, self._template)
        form = {
            'name': self._template,
            'add_generation_prompt': add_generation_prompt,
            'continue_final_message': not add_generation_prompt,
        }
        try:
            return chat.render(self._tokens.described, chat_history, **form)
        except errors.InputError:
            others = [message for message in chat_history if message['role'] != 'system']
            if others == chat_history:
                raise
            _log.warning('the chat template takes no message of the system: left out')
            return chat.render(self._tokens.described, others, **form)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **ignored: Any
    ) -> list[int]:
        """Ids; what goes before every text in front, unless the text has it or it is refused."""
        before = self._tokens.prefix if add_special_tokens else self._before
        first = self._tokens.decode([self._first])
        begun = bool(first) and string.startswith(first)
        if add_special_tokens is False or (add_special_tokens is None and begun):
            before = []
        return [*before, *self._tokens.encode(string, allow_special=True)]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **ignored: Any,
    ) -> list[tuple[float, bool]]:
        found = self._scores(
            [self._fitting(context, target) for _, context, target in requests], disable_tqdm
        )
        for (texts_, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial('loglikelihood', texts_, answer)
        return found

    def _fitting(self, context: Sequence[int], target: Sequence[int]) -> score.Query:
        """The last max_length tokens that are read, as the harness cuts them."""
        spare = len(context) + len(target) - 1 - self.max_length
        cut = min(max(spare, 0), len(context) - 1)
        return score.Query(tuple(context[cut:]), tuple(target))

    def _scores(self, asked: Sequence[score.Query], quiet: bool) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        bar = tqdm.tqdm(total=len(asked), disable=quiet, desc='log-likelihoods', unit=' requests')
        with bar, self._mesh.scope():
            scorer = score.Scorer(self._loaded.decoder, self._loaded.params, self._batch_tokens)
            for batch in scorer.score(asked, bar.update):
                found |= {i: (one.log_prob, one.greedy) for i, one in batch}
        return [found[i] for i in range(len(asked))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list:
        """Log-probs of whole texts, in windows of max_length; the first is behind the prefix."""
        asked, owners = [], []
        for number, request in enumerate(requests):
            ids = (
                self.prefix_token_id,
                *self.tok_encode(request.args[0], add_special_tokens=False),
            )
            windows = score.windows(ids, self.max_length)
            asked += windows
            owners += [number] * len(windows)
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._scores(asked, disable_tqdm), strict=True):
            totals[owner] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first stop string; requests with the same settings go together."""
        self._loaded.prepare()
        sender = router.Router(self._loaded)
        found: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        bar = tqdm.tqdm(total=len(requests), disable=disable_tqdm, desc='texts', unit=' texts')
        with bar, self._mesh.scope():
            for numbers in groups.values():
                asked, until = self._options(requests[numbers[0]].args[1])
                room = self.max_length - asked.max_new_tokens
                errors.require(
                    room > 0, f'{asked.max_new_tokens} new tokens do not fit {self.max_length}'
                )
                ids = {
                    i: self.tok_encode(requests[i].args[0])[-room:] or [self.eot_token_id]
                    for i in numbers
                }
                order = sorted(numbers, key=lambda i: -len(ids[i]))
                for start in range(0, len(order), self._batch_size):
                    some = order[start : start + self._batch_size]
                    said = sender.texts([(ids[i], asked) for i in some], some)
                    for i, one in zip(some, said, strict=True):
                        found[i] = texts.before_stop(self._tokens, ids[i], one[0].tokens, until)
                    bar.update(len(some))
        for i, request in enumerate(requests):
            self.cache_hook.add_partial('generate_until', request.args, found[i])
        return [found[i] for i in range(len(requests))]

    def _options(self, given: dict[str, Any]) -> tuple[options.Options, list[str]]:
        """The harness's generation settings as ours; what we do not know is an error."""
        given = dict(harness_utils.normalize_gen_kwargs(given, self._max_gen_toks))
        until = [text for text in given.pop('until') if text]
        settings = {
            'max_new_tokens': given.pop('max_gen_toks'),
            'stop_strings': tuple(until),
            'do_sample': False,
        }
        if given.get('do_sample'):
            settings['temperature'] = 1.0
        else:
            given.pop('temperature', None)
        return self._loaded.asked(settings | given), until
