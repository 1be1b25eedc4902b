# SPDX-License-Identifier: Apache-2.0
"""The program: prompts from anywhere, results that survive interruptions, errors that say what."""

import io
import json

import pytest

from gptjax import generate
from gptjax.configs import base, errors
from gptjax.models import pretrained
from gptjax.runtime import program
from gptjax.sampling import engine, texts
from gptjax.sampling import pipeline as pipeline_lib
from gptjax.storage import documents
from gptjax.text import tokenizer as tokenizer_lib
from gptjax.text import vocabulary
from tests import helpers


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A published folder of a tiny model with a tokenizer."""
    section = base.get_config().tokenizer.to_dict() | {'kind': 'bpe', 'n_vocab': 300}
    words = ['the cat sat on the mat, and the dog sat on the log. '] * 20
    tokenizer = vocabulary.train(vocabulary.Config(**section), words)
    model = helpers.tiny_model(n_vocab=tokenizer.n_vocab, n_ctx=64, compute_dtype='float32')
    path = tmp_path_factory.mktemp('published')
    pretrained.save(path, model, helpers.params_of(model), tokenizer)
    return path


def run(folder, workdir, *flags):
    args = helpers.args(
        base.__file__,
        workdir,
        f'--config.init_from={folder}',
        '--config.mesh.data=8',
        '--config.decode.max_new_tokens=6',
        '--config.decode.do_sample=False',
        *flags,
        define=generate.define,
    )
    generate.main(args)
    return documents.read_lines(workdir / generate.SAMPLES).rows


def test_a_file_of_prompts_with_options_of_their_own(folder, tmp_path, capsys):
    prompts = tmp_path / 'prompts.jsonl'
    prompts.write_text(
        '{"prompt": "the cat"}\n\n{"prompt": [5, 6, 7], "max_new_tokens": 2, "logprobs": 2}\n'
        '{"prompt": "a dog", "do_sample": true, "num_return_sequences": 3, "seed": 5}\n'
    )
    found = run(folder, tmp_path, f'--prompts={prompts}', '--out=jsonl')
    assert [(line['index'], line['sample']) for line in found] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (2, 1),
        (2, 2),
    ]
    assert found[1]['prompt'] == [5, 6, 7]
    assert len(found[1]['tokens']) == len(found[1]['top_logprobs']) == 2
    assert len({line['text'] for line in found[2:]}) > 1
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found
    ours = pipeline_lib.pipeline('text-generation', model=folder)
    (one,) = ours('the cat', max_new_tokens=6, do_sample=False)
    assert one['generated_text'] == 'the cat' + found[0]['text']


def test_prompts_from_stdin_and_lines(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(b'the cat\n\nthe dog\n')))
    found = run(folder, tmp_path, '--prompts=-', '--prompt=first')
    assert [line['prompt'] for line in found] == ['first', 'the cat', 'the dog']
    assert capsys.readouterr().out.count('---') == 3
    streamed = run(folder, tmp_path / 'streamed', '--prompt=the cat', '--stream')
    text = capsys.readouterr().out
    assert text == f'the cat{streamed[0]["text"]}\n---\n'


def test_an_interrupted_job_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    flags = [f'--prompt=the cat {i}' for i in range(7)] + ['--config.engine.slots=2']
    whole = run(folder, tmp_path / 'whole', *flags)
    asked = []
    monkeypatch.setattr(program, 'stop_requested', lambda: len(asked) >= 5)
    submit = engine.Engine.submit

    def counted(self, prompt, *rest, **kwargs):
        asked.append(prompt)
        return submit(self, prompt, *rest, **kwargs)

    monkeypatch.setattr(engine.Engine, 'submit', counted)
    workdir = tmp_path / 'stopped'
    with pytest.raises(program.Preempted):
        run(folder, workdir, *flags)
    path = workdir / generate.SAMPLES
    kept = len(path.read_text().splitlines())
    assert 0 < kept < 7
    path.write_text(path.read_text() + '{"prompt": "the cat 4", "te')  # and a line cut off
    monkeypatch.setattr(program, 'stop_requested', lambda: False)
    asked.clear()
    again = run(folder, workdir, *flags)
    assert len(asked) == 7 - kept
    assert [line['text'] for line in again] == [line['text'] for line in whole]
    asked.clear()
    assert run(folder, workdir, *flags) == again
    assert not asked
    other = run(folder, workdir, '--prompt=another')
    assert len(other) == 1
    assert len((workdir / 'samples-1.jsonl').read_text().splitlines()) == 7


def test_texts_with_odd_line_ends_survive_a_resume(folder, tmp_path, monkeypatch):
    odd = 'a\u2028b\x85c'
    monkeypatch.setattr(texts, 'continuation', lambda *_, **__: odd)
    flags = ('--prompt=one', '--prompt=two')
    whole = run(folder, tmp_path, *flags)
    path = tmp_path / generate.SAMPLES
    first = path.read_text().split('\n')[0]
    path.write_text(first + '\n')
    generate_again = run(folder, tmp_path, *flags)
    assert [line['text'] for line in generate_again] == [odd] * 2
    assert generate_again == whole
    prompts = tmp_path / 'odd.jsonl'
    prompts.write_text('{"prompt": "' + odd.replace('\x85', '') + '"}\n')
    assert run(folder, tmp_path / 'b', f'--prompts={prompts}')[0]['prompt'] == 'a\u2028bc'


def test_beams_echo_drafts_and_quantised_weights(folder, tmp_path):
    best, second = run(
        folder,
        tmp_path / 'a',
        '--prompt=the cat',
        '--config.decode.num_beams=3',
        '--config.decode.num_return_sequences=2',
    )
    assert best['score'] >= second['score']
    assert best['text'] != second['text']
    echoed = run(
        folder,
        tmp_path / 'b',
        '--prompt=the cat',
        '--config.decode.echo=True',
        '--config.decode.logprobs=1',
    )[0]
    assert len(echoed['prompt_logprobs']) == len(echoed['prompt_tokens']) - 1
    assert len(echoed['logprobs']) == len(echoed['tokens'])
    plain = run(folder, tmp_path / 'c', '--prompt=the cat')[0]
    for name, flag in (
        ('d', f'--config.engine.draft={folder}'),
        ('e', '--config.decode.prompt_lookup_num_tokens=3'),
    ):
        found = run(folder, tmp_path / name, '--prompt=the cat', flag)[0]
        assert found['text'] == plain['text']
    small = run(
        folder,
        tmp_path / 'f',
        '--prompt=the cat',
        '--config.engine.weights=int8',
        '--config.engine.cache_dtype=int8',
    )[0]
    assert small['text']


def test_what_is_wrong_is_said_in_a_line(folder, tmp_path):
    with pytest.raises(errors.UsageError, match='give --prompt="..."'):
        run(folder, tmp_path)
    bad = tmp_path / 'bad.jsonl'
    bad.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(errors.InputError, match='bad.jsonl:2 is not an object with a "prompt"'):
        run(folder, tmp_path, f'--prompts={bad}')
    bad.write_text('{"prompt": "a", "temprature": 2}\n')
    with pytest.raises(errors.UsageError, match="did you mean 'temperature'"):
        run(folder, tmp_path, f'--prompts={bad}')
    for ids in ('["a"]', '[1.5]', '[true]', 'null'):
        bad.write_text('{"prompt": ' + ids + '}')
        with pytest.raises(errors.InputError, match='bad.jsonl:1 is not an object with a "prompt"'):
            run(folder, tmp_path, f'--prompts={bad}')
    bad.write_text('{"prompt": ')
    with pytest.raises(errors.InputError, match='bad.jsonl:1 is no JSON'):
        run(folder, tmp_path, f'--prompts={bad}')
    with pytest.raises(errors.UsageError, match='a stream is for text, decoded without beams'):
        run(folder, tmp_path, '--prompt=a', '--stream', '--config.decode.num_beams=2')
    with pytest.raises(errors.InputError, match='do not fit n_ctx = 64'):
        run(folder, tmp_path, '--prompt=a', '--config.decode.max_new_tokens=64')
    assert not (tmp_path / generate.SAMPLES).exists()


def test_continuations_keep_their_spaces_and_leave_special_tokens_out(folder):
    tokenizer = tokenizer_lib.load(folder)
    ids = tokenizer.encode('the cat sat')
    tokens = [*ids[2:], tokenizer.end_of_text]
    assert tokenizer.decode(ids[:2]) + texts.continuation(tokenizer, ids[:2], tokens) == (
        'the cat sat'
    )
    stream = texts.Stream(tokenizer_lib.Bytes(), [], ['stop'])
    euro = list('€'.encode())
    pushed = [stream.push(euro[:1], False), stream.push(euro, False)]
    pushed += [stream.push([*euro, *b'st'], False), stream.push([*euro, *b'sto!'], True)]
    assert pushed == ['', '€', '', 'sto!']
    said = list(b'one stop two stop')
    assert texts.before_stop(tokenizer_lib.Bytes(), [], said, ['two', 'stop']) == 'one '
