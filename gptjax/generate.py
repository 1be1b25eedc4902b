# SPDX-License-Identifier: Apache-2.0
"""Continues prompts with a trained model; prints them and writes WORKDIR/samples.jsonl.

Laptop:
  python -m gptjax.generate --config=experiments/quickstart.py --workdir=runs/quickstart \
      --prompt="Return a list of" --config.decode.temperature=0.8 --config.decode.top_k=40
Published weights, beams, tokens as they come:
  python -m gptjax.generate --config.init_from=SmolLM2.gguf --workdir=runs/smollm2 \
      --prompt="The capital of France is" --config.decode.num_beams=5
  python -m gptjax.generate --config.init_from=SmolLM2.gguf --workdir=runs/smollm2 --stream \
      --prompt="Once upon a time" --config.engine.weights=int8
Many prompts: a line each, or .jsonl with {"prompt": ..., option: ...}; - reads stdin. Stopped, the
same command goes on:
  python -m gptjax.generate --config.init_from=SmolLM2.gguf --workdir=runs/batch \
      --prompts=prompts.jsonl --out=jsonl --config.decode.logprobs=3 > scored.jsonl
TPU VM, the same; the weights are spread over --config.mesh.tensor devices:
  python -m gptjax.generate --config=experiments/gpt2/pretrain.py --workdir=/data/run \
      --prompt="Once upon a time" --config.mesh.tensor=4
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from gptjax.configs import base, cli, errors
from gptjax.models import pretrained
from gptjax.runtime import checkpoint, program, progress
from gptjax.runtime import mesh as mesh_lib
from gptjax.sampling import (
    decode,
    engine,
    options,
    pipeline,
    requests,
    speculative,
    texts,
)
from gptjax.text import files

SAMPLES = 'samples.jsonl'
_log = logging.getLogger('gptjax')
_Job = tuple[list[int], options.Options]


def define(values: flags.FlagValues) -> None:
    """The program's own flags."""
    flags.DEFINE_multi_string(
        'prompt', [], 'A prompt; may be given several times.', flag_values=values
    )
    flags.DEFINE_string(
        'prompts', '', 'A file of prompts, one a line, or .jsonl; - reads stdin.',
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum(
        'out', 'text', ['text', 'jsonl'], 'What is printed; the file is JSONL.', flag_values=values
    )
    flags.DEFINE_bool('stream', False, 'Print text as it comes.', flag_values=values)


def main(args: cli.Args) -> None:
    """Continues every prompt."""
    config = engine.Config(**args.config.engine)
    options.make(args.config.decode.to_dict(), {})  # says what is wrong before anything is read
    wanted = _prompts(args)
    weights = args.config.init_from or args.workdir
    mesh = mesh_lib.Mesh(mesh_lib.Config(**args.config.mesh))
    if pretrained.wants_one_device(weights):
        mesh = mesh_lib.one_device()
    with mesh.scope():
        with progress.Progress('read', None, ' parameters') as bar:
            loaded = pipeline.load(
                weights, config.dtype or None, config.weights, config.cache_dtype, mesh,
                bar.advance,
            )  # fmt: skip
        jobs = [_job(args, loaded, i, prompt) for i, prompt in enumerate(wanted)]
        for prompt, asked in jobs:
            decode.check(loaded.decoder, prompt, asked)
        alone = [bool(config.draft) or _by_itself(asked) for _, asked in jobs]
        errors.require(
            not (args.flags.stream and (any(alone) or args.flags.out == 'jsonl')),
            '--stream is for text, decoded without beams, echo and drafts',
        )
        errors.require(
            not config.draft or all(asked.num_beams == 1 for _, asked in jobs),
            'engine.draft is for decoding without beams',
        )
        one, job = program.only_one(pathlib.Path(args.workdir)), _fingerprint(args, weights, wanted)
        with one, program.graceful_stop(), _Out(args, wanted, jobs, loaded, job) as out:
            for found in _texts(args, config, loaded, jobs[out.done :], out, mesh):
                out.write(found)
                if program.stop_requested():
                    raise program.Preempted
    _log.info('wrote %s', out.path)


def _prompts(args: cli.Args) -> list[dict[str, Any]]:
    """[{'prompt': text or ids, option: value, ...}] of the flags, a file or stdin."""
    wanted: list[dict[str, Any]] = [{'prompt': prompt} for prompt in args.flags.prompt]
    path = args.flags.prompts
    if path:
        try:
            text = sys.stdin.read() if path == '-' else pathlib.Path(path).read_text('utf-8')
        except UnicodeDecodeError as e:
            raise errors.InputError(f'{path} is no UTF-8 text: {e}') from e
        lines = text.split('\n')  # splitlines() also cuts at characters that JSON strings may hold
        is_json = path.endswith('.jsonl') or (path == '-' and text.lstrip()[:1] == '{')
        for number, line in enumerate(lines, 1):
            if line.strip():
                wanted.append(_line(path, number, line) if is_json else {'prompt': line})
    errors.require(bool(wanted), 'give --prompt="..." (several are allowed) or --prompts=FILE')
    return wanted


def _line(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as e:
        raise errors.InputError(f'{path}:{number} is no JSON: {e}') from e
    prompt = found.get('prompt') if isinstance(found, dict) else None
    ids = isinstance(prompt, list) and all(type(i) is int for i in prompt)
    if not isinstance(prompt, str) and not ids:
        raise errors.InputError(
            f'{path}:{number} is not an object with a "prompt", a text or a list of token ids'
        )
    return found


def _job(args: cli.Args, loaded: pipeline.Loaded, i: int, wanted: dict[str, Any]) -> _Job:
    """A prompt's ids and options; the end token is the model's where none is given."""
    defaults = args.config.decode.to_dict()
    if not defaults['eos_token_id']:
        defaults['eos_token_id'] = loaded.defaults.get('eos_token_id', ())
    defaults['seed'] += i
    asked = options.make(defaults, {k: v for k, v in wanted.items() if k != 'prompt'})
    if isinstance(wanted['prompt'], list):
        return wanted['prompt'], asked
    if loaded.tokenizer is None:
        raise errors.InputError(
            'these weights have no tokenizer, so no text can be read; give token ids by --prompts'
        )
    return texts.prompt_ids(loaded.tokenizer, wanted['prompt']), asked


def _fingerprint(args: cli.Args, weights: str, wanted: list[dict[str, Any]]) -> str:
    """Equal for commands that would write the same file."""
    path = pathlib.Path(weights)
    step = checkpoint.newest_meta(path).get('step', '')
    stored = (
        [path] if path.is_file() else sorted([*path.glob('*.safetensors'), *path.glob('*.bin')])
    )
    times = [file.stat().st_mtime_ns for file in stored]
    engine_ = args.config.engine
    parts = [str(weights), step, times, wanted, args.config.decode.to_dict(), engine_.weights,
             engine_.dtype, engine_.cache_dtype, engine_.draft, engine_.draft_tokens]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class _Out:
    """The file of results, one line a text in the prompts' order, and what is printed."""

    def __init__(
        self,
        args: cli.Args,
        wanted: list[dict[str, Any]],
        jobs: list[_Job],
        loaded: pipeline.Loaded,
        fingerprint: str,
    ) -> None:
        """Finds out how many prompts are done; another command's results are put aside."""
        self.path = pathlib.Path(args.workdir) / SAMPLES
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._form, self._stream = args.flags.out, args.flags.stream
        self._wanted, self._jobs, self._tokenizer = wanted, jobs, loaded.tokenizer
        self._fingerprint = fingerprint
        lines = self._earlier()
        self.done = 0
        kept = 0
        for _, asked in jobs:
            if kept + asked.num_return_sequences > len(lines):
                break
            kept += asked.num_return_sequences
            self.done += 1
        if lines:
            _log.info('%d of %d prompts were done before', self.done, len(jobs))
        for line in lines[:kept]:
            self._print(line)
        text = ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines[:kept])
        files.replace(self.path, text)
        self._open = contextlib.ExitStack()
        self._bar: progress.Progress | None = None

    def __enter__(self) -> '_Out':
        self._file = self._open.enter_context(self.path.open('a', encoding='utf-8'))
        if not self._stream:
            bar = progress.Progress('generate', len(self._jobs), ' prompts', self.done)
            self._bar = self._open.enter_context(bar)
        return self

    def __exit__(self, *raised: Any) -> None:
        self._open.close()

    def _earlier(self) -> list[dict[str, Any]]:
        """The whole lines that this very command wrote before."""
        if not self.path.exists():
            return []
        found, expected = [], [
            (i, sample) for i, (_, asked) in enumerate(self._jobs)
            for sample in range(asked.num_return_sequences)
        ]  # fmt: skip
        ours = True
        for line in self.path.read_text(encoding='utf-8', errors='replace').split('\n'):
            try:
                record = json.loads(line)
            except ValueError:  # the last line may be cut off
                break
            ours = isinstance(record, dict) and record.get('job') == self._fingerprint
            place = (record['index'], record['sample']) if ours else None
            if place not in expected[len(found) : len(found) + 1]:
                break
            found.append(record)
        if not ours:
            number = 1
            while (aside := self.path.with_name(f'samples-{number}.jsonl')).exists():
                number += 1
            self.path.rename(aside)
            _log.info('results of another command are kept as %s', aside)
            return []
        return found

    def write(self, found: list[decode.Text]) -> None:
        """The texts of the next prompt."""
        prompt, asked = self._jobs[self.done]
        for sample, text in enumerate(found):
            line = self._record(prompt, asked, self._wanted[self.done]['prompt'], text)
            line |= {'index': self.done, 'sample': sample, 'job': self._fingerprint}
            self._file.write(json.dumps(line, ensure_ascii=False) + '\n')
            if not self._stream:
                self._print(line)
        self._file.flush()
        self.done += 1
        if self._bar:
            self._bar.advance(1)

    def _record(
        self, ids: list[int], asked: options.Options, prompt: Any, text: decode.Text
    ) -> dict[str, Any]:
        record = {'prompt': prompt, 'reason': text.reason, 'score': text.score}
        if self._tokenizer is not None:
            new = texts.continuation(self._tokenizer, ids, text.tokens)
            record['text'] = texts.before_stop(new, asked.stop_strings)
        if self._tokenizer is None or asked.logprobs >= 0:
            record['tokens'] = text.tokens
        if asked.logprobs >= 0:
            record['logprobs'] = text.logprobs
            record |= {'top_logprobs': text.top} if text.top else {}
        if asked.echo:
            record |= {'prompt_tokens': ids, 'prompt_logprobs': text.prompt_logprobs}
            record |= {'prompt_top_logprobs': text.prompt_top} if text.prompt_top else {}
        return record

    def _print(self, line: dict[str, Any]) -> None:
        if self._form == 'jsonl':
            print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            prompt = line['prompt'] if isinstance(line['prompt'], str) else ''
            print(f'{prompt}{line.get("text", line.get("tokens"))}\n---', flush=True)

    def begin_stream(self) -> None:
        """Prints the prompt whose text will be streamed next."""
        prompt = self._wanted[self.done]['prompt']
        print(prompt if isinstance(prompt, str) else '', end='', flush=True)


def _texts(
    args: cli.Args,
    config: engine.Config,
    loaded: pipeline.Loaded,
    jobs: list[_Job],
    out: _Out,
    mesh: mesh_lib.Mesh,
) -> Iterator[list[decode.Text]]:
    """The texts of every prompt, in order."""
    if not config.draft and not any(_by_itself(asked) for _, asked in jobs):
        yield from _served(config, loaded, jobs, out if args.flags.stream else None)
        return
    draft = None
    if config.draft:
        other = pipeline.load(config.draft, config.dtype or None, mesh=mesh)
        draft = speculative.Draft(other.decoder, other.params)
    for prompt, asked in jobs:
        yield loaded.texts([prompt], asked, draft, config.draft_tokens)[0]


def _by_itself(asked: options.Options) -> bool:
    return asked.num_beams > 1 or asked.echo or asked.prompt_lookup_num_tokens > 0


def _served(
    config: engine.Config, loaded: pipeline.Loaded, jobs: list[_Job], stream: _Out | None
) -> Iterator[list[decode.Text]]:
    """Through the engine: as many side by side as it has slots, and one after another to stream."""
    longest = max((asked.limit(len(prompt)) for prompt, asked in jobs), default=1)
    slots = min(config.slots, sum(asked.num_return_sequences for _, asked in jobs))
    config = dataclasses.replace(
        config, max_tokens=config.max_tokens or longest, slots=1 if stream else max(1, slots)
    )
    served = engine.Engine(loaded.decoder, loaded.params, config, loaded.tokenizer)
    ahead = 1 if stream else 2 * config.slots
    waiting: list[list[requests.Request]] = []
    ready = 0

    def submit(i: int) -> list[requests.Request]:
        prompt, asked = jobs[i]
        on_text = None
        if stream:
            stream.begin_stream()
            on_text = lambda piece, tokens: print(piece, end='', flush=True)  # noqa: E731
        submitted = []
        for copy in range(asked.num_return_sequences):
            submitted.append(served.submit(prompt, asked, copy=copy, on_text=on_text))
            if stream:
                while served.step() and not program.stop_requested():
                    pass
                print('\n---', flush=True)
                if copy + 1 < asked.num_return_sequences:
                    stream.begin_stream()
        return submitted

    while ready < len(jobs) or waiting:
        while ready < len(jobs) and len(waiting) < ahead:
            waiting.append(submit(ready))
            ready += 1
        served.step()
        while waiting and all(request.done for request in waiting[0]):
            yield [request.result() for request in waiting.pop(0)]
        if program.stop_requested():
            raise program.Preempted


if __name__ == '__main__':
    program.run(main, __doc__, define, default_config=base.__file__)
