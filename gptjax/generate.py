# SPDX-License-Identifier: Apache-2.0
"""Continues prompts with a trained model; prints them and writes WORKDIR/samples.jsonl.

Laptop:
  python -m gptjax.generate --config=experiments/quickstart.py --workdir=runs/quickstart \
      --prompt="Return a list of" --config.decode.temperature=0.8 --config.decode.top_k=40
Published weights, beams, tokens as they come:
  python -m gptjax.generate --config.init_from=SmolLM2.gguf --workdir=runs/smollm2 \
      --prompt="The capital of France is" --config.decode.do_sample=False
  python -m gptjax.generate --config.init_from=SmolLM2.gguf --workdir=runs/smollm2 --stream \
      --prompt="Once upon a time" --config.engine.weights=int8
Many prompts: a line each, or .jsonl with {"prompt": ..., option: ...}; - reads stdin. Stopped, the
same command goes on:
  python -m gptjax.generate --config.init_from=SmolLM2.gguf --workdir=runs/batch \
      --prompts=prompts.jsonl --out=jsonl --config.decode.logprobs=3 > scored.jsonl
TPU VM, the same; the weights are spread over --config.mesh.tensor devices:
  python -m gptjax.generate --config=experiments/gpt2/pretrain.py --workdir=/data/run \
      --prompt="Once upon a time" --config.mesh.tensor=4
Several hosts, the same with --distributed on each; the first one prints and writes.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import sys
from typing import Any

from absl import flags

from gptjax.configs import base, cli, errors
from gptjax.models import sources, weights
from gptjax.runtime import alike, hosts, program, progress, signals
from gptjax.runtime import mesh as mesh_lib
from gptjax.sampling import decode, engine, options, router, speculative, texts
from gptjax.sampling import loaded as loaded_lib
from gptjax.storage import documents, files, scratch

READS = ('init_from', 'mesh', 'decode', 'engine')
SAMPLES = 'samples.jsonl'
_log = logging.getLogger('gptjax')


def define(values: flags.FlagValues) -> None:
    """The program's own flags."""
    flags.DEFINE_multi_string(
        'prompt', [], 'A prompt; may be given several times.', flag_values=values
    )
    flags.DEFINE_string(
        'prompts',
        '',
        'A file of prompts, one a line, or .jsonl; - reads stdin.',
        flag_values=values,
    )
    flags.DEFINE_enum(
        'out', 'text', ['text', 'jsonl'], 'What is printed; the file is JSONL.', flag_values=values
    )
    flags.DEFINE_string(
        'samples', SAMPLES, 'The file of results below the workdir.', flag_values=values
    )
    flags.DEFINE_bool('stream', False, 'Print text as it comes.', flag_values=values)


def main(args: cli.Args) -> None:
    """Continues every prompt."""
    config = args.section('engine', engine.Config)
    name = args.flags.samples
    errors.require(
        name.endswith('.jsonl') and pathlib.PurePath(name).name == name,
        f'--samples={name} is no name of a file; give one as samples.jsonl, below --workdir',
    )
    wanted = _prompts(args)
    source = sources.open(args.config.init_from or args.workdir)
    if hosts.is_first():
        files.check_writable(pathlib.Path(args.workdir))
    published = loaded_lib.published(source)
    loaded_lib.resolve(str(source.path), published, args.given('decode'))  # told at once
    mesh = mesh_lib.Mesh(args.section('mesh', mesh_lib.Config))
    with mesh.scope():
        form = (config.dtype or None, config.weights, config.cache_dtype, mesh)
        with progress.Progress('read', None, ' parameters') as bar:
            loaded = loaded_lib.load(source, *form, bar.advance)
        drafted = sources.open(config.draft) if config.draft else None
        draft = loaded_lib.draft(drafted, config.draft_tokens, config.dtype or None, mesh)
        sender = router.Router(loaded, draft)
        jobs = [_job(args, loaded, draft, i, prompt) for i, prompt in enumerate(wanted)]
        streams = args.flags.stream
        errors.require(not streams or args.flags.out == 'text', '--stream is for --out=text')
        for prompt, asked in jobs:
            sender.check(prompt, asked, config, streams)
        fingerprint = _fingerprint(config, source, drafted, wanted, jobs)
        alike.check_same(config=base.plain(args.config), command=fingerprint, stream=streams)
        one = program.only_one(pathlib.Path(args.workdir))
        with one, program.graceful_stop(), _Out(args, wanted, jobs, loaded, fingerprint) as out:
            left = jobs[out.done :]
            found = sender.streamed(left, config, out) if streams else sender.each(left, config)
            for texts_ in found:
                out.write(texts_)
                signals.unsaved('texts that are not whole')
    _log.info('wrote %s', out.path)


def _prompts(args: cli.Args) -> list[dict[str, Any]]:
    """[{'prompt': text or ids, option: value, ...}] of the flags, a file or stdin."""
    wanted: list[dict[str, Any]] = [{'prompt': prompt} for prompt in args.flags.prompt]
    path = args.flags.prompts
    if path:
        try:
            content = (
                sys.stdin.buffer.read()
                if path == '-'
                else files.content(scratch.need(scratch.here(path)))
            )
            text = files.decoded(content)
        except UnicodeDecodeError as e:
            raise errors.InputError(f'--prompts={path} is no UTF-8 text: {e}') from e
        except OSError as e:
            raise errors.InputError(f'--prompts={path} cannot be read: {e.strerror}') from e
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
    except (ValueError, RecursionError) as e:
        raise errors.InputError(f'{path}:{number} is no JSON: {e}') from e
    prompt = found.get('prompt') if isinstance(found, dict) else None
    ids = isinstance(prompt, list) and all(type(i) is int for i in prompt)
    if not isinstance(prompt, str) and not ids:
        raise errors.InputError(
            f'{path}:{number} is not an object with a "prompt", a text or a list of token ids'
        )
    return found


def _job(
    args: cli.Args,
    loaded: loaded_lib.Loaded,
    draft: speculative.Draft | None,
    i: int,
    wanted: dict[str, Any],
) -> router.Job:
    """A prompt's ids, and what is asked of it: as the Python call has them."""
    given = {'seed': (args.config.decode.seed + i) % 2**31}
    own = {name: value for name, value in wanted.items() if name != 'prompt'}
    return loaded.job(wanted['prompt'], args.given('decode') | given | own, draft)


def _fingerprint(
    of: engine.Config,
    source: weights.Source,
    draft: weights.Source | None,
    wanted: list[dict[str, Any]],
    jobs: list[router.Job],
) -> str:
    """Equal for commands that would write the same file."""
    parts = [source.identity(), of.weights, of.dtype, of.cache_dtype]
    parts += [draft.identity(), of.draft_tokens] if draft else []
    parts += [one['prompt'] for one in wanted]
    parts += [(list(ids), dataclasses.asdict(asked)) for ids, asked in jobs]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class _Out:
    """The file of results, one line a text in the prompts' order, and what is printed."""

    def __init__(
        self,
        args: cli.Args,
        wanted: list[dict[str, Any]],
        jobs: list[router.Job],
        loaded: loaded_lib.Loaded,
        fingerprint: str,
    ) -> None:
        """Finds out how many prompts are done; another command's results are put aside."""
        self.path = scratch.need(pathlib.Path(args.workdir, args.flags.samples))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._form, self._stream = args.flags.out, args.flags.stream
        self._wanted, self._jobs, self._tokenizer = wanted, jobs, loaded.tokenizer
        self._fingerprint = fingerprint
        lines = self._earlier() if hosts.is_first() else []
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
        if hosts.is_first():
            files.replace(self.path, documents.lines(lines[:kept]))
        self.done = hosts.first_says(self.done, 'which prompts are done')
        self._open = contextlib.ExitStack()
        self._bar: progress.Progress | None = None

    def __enter__(self) -> '_Out':
        path = self.path if hosts.is_first() else pathlib.Path(os.devnull)
        self._file = self._open.enter_context(files.open_(path, 'a'))
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
        expected = [
            (i, sample)
            for i, (_, asked) in enumerate(self._jobs)
            for sample in range(asked.num_return_sequences)
        ]
        found, ours = [], True
        lines = documents.read_lines(self.path, ('prompt', 'index', 'sample'))
        if lines.bad:
            _log.warning('%s: line %d is damaged', self.path, min(lines.bad))
            ours = bool(lines.first)
        for record in lines.first:
            ours = record.get('job') == self._fingerprint
            place = (record.get('index'), record.get('sample')) if ours else None
            if place not in expected[len(found) : len(found) + 1]:
                break
            found.append(record)
        if not ours:
            number = 1
            while (aside := self.path.with_stem(f'{self.path.stem}-{number}')).exists():
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
            files.appended(self._file, documents.line(line), self.path)
            if not self._stream:
                self._print(line)
        self.done += 1
        if self._bar:
            self._bar.advance(1)

    def _record(
        self, ids: list[int], asked: options.Options, prompt: Any, text: decode.Text
    ) -> dict[str, Any]:
        record = {'prompt': prompt, 'reason': text.reason, 'score': text.score}
        if self._tokenizer is not None:
            said = (ids, text.tokens, asked.stop_strings)
            record['text'] = texts.before_stop(self._tokenizer, *said)
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

    def begin(self) -> None:
        """Prints the prompt whose text will be streamed next."""
        prompt = self._wanted[self.done]['prompt']
        print(prompt if isinstance(prompt, str) else '', end='', flush=True)

    def text(self, piece: str, tokens: list[int]) -> None:
        """Prints a piece of text."""
        del tokens
        print(piece, end='', flush=True)

    def end(self) -> None:
        """Ends a streamed text."""
        print('\n---', flush=True)


if __name__ == '__main__':
    program.run(main, __doc__, READS, define, default_config=base.OF_RUN)
