# SPDX-License-Identifier: Apache-2.0
"""Other weights under the same path are other weights: nothing made of the old ones is kept."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
import torch

from gptjax import evaluate, generate, train
from gptjax.configs import base
from gptjax.models import pretrained, sources
from gptjax.runtime import program
from gptjax.storage import files
from tests import helpers


@pytest.fixture
def run(tmp_path, corpus_file) -> tuple[str, pathlib.Path]:
    """A tiny run with an average, half done."""
    config, folder = helpers.prepared(tmp_path, corpus_file)
    workdir = helpers.fresh(tmp_path / 'run', folder)
    return config, workdir


def trained(run, tokens: int) -> None:
    """To so many tokens: a longer run of the same steps, as far as weights go."""
    config, workdir = run
    flags = ('--config.optim.ema_decay=0.5', '--config.train.total_tokens=3072')
    args = helpers.args(config, workdir, *flags)
    with helpers.stopped_after(tokens // 512), contextlib.suppress(program.Preempted):
        train.main(args)


@pytest.mark.parametrize('path', ['', pytest.param('average', marks=pytest.mark.slow)])
def test_after_more_training_all_is_made_anew(run, path, tmp_path):
    config, workdir = run
    trained(run, 1024)
    weights = f'--config.init_from={workdir / path}'
    data = tmp_path / 'data' / 'piqa'
    data.mkdir(parents=True)
    records = [{'query': f'q{i}', 'choices': ['a', 'b'], 'gold': i % 2} for i in range(4)]
    (data / 'validation.jsonl').write_text('\n'.join(map(json.dumps, records)))

    def made():
        flags = (weights, '--prompt=the cat', '--config.decode.logprobs=0')
        generate.main(helpers.args(config, tmp_path / 'g', *flags, define=generate.define))
        samples = (tmp_path / 'g' / 'samples.jsonl').read_text()
        return json.loads(samples.splitlines()[0])

    def scored(out):
        flags = (
            weights,
            f'--config.data_dir={tmp_path / "data"}',
            "--config.suite.tasks=('piqa',)",
        )
        evaluate.main(helpers.args(base.__file__, tmp_path / out, *flags))

    first, identity = made(), sources.open(workdir / path).identity()
    scored('s')
    assert made() == first
    assert sources.open(workdir / path).identity() == identity
    trained(run, 1024)
    assert sources.open(workdir / path).identity() != identity
    again = made()
    assert (again['job'], again['logprobs']) != (first['job'], first['logprobs'])
    assert (tmp_path / 'g' / 'samples-1.jsonl').exists()
    with pytest.raises(ValueError, match='items of another state'):
        scored('s')


def test_the_newest_one_damaged_then_mended_and_another_seed(run, tmp_path):
    """What is generated is of the weights read now, not of those read under the same names."""
    config, workdir = run
    flags = ('--config.train.total_tokens=3072', '--config.checkpoint.every_steps=3')

    def text() -> tuple[str, list]:
        given = (f'--config.init_from={workdir}', '--prompt=the cat', '--config.decode.logprobs=3')
        generate.main(helpers.args(config, tmp_path / 'g', *given, define=generate.define))
        row = json.loads((tmp_path / 'g' / 'samples.jsonl').read_text().splitlines()[0])
        return row['job'], row['logprobs']

    train.main(helpers.args(config, workdir, *flags))
    newest = workdir / 'checkpoints' / '00000006'
    victim = max(newest.rglob('*'), key=lambda p: p.stat().st_size if p.is_file() else -1)
    whole, content = text(), victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    older = text()
    assert older != whole
    victim.write_bytes(content)
    assert text() == whole
    shutil.rmtree(workdir / 'checkpoints')
    train.main(helpers.args(config, workdir, *flags, '--config.seed=5'))
    assert text() not in (whole, older)
    assert len([*(tmp_path / 'g').glob('samples-*.jsonl')]) == 3  # each of other weights


@pytest.mark.parametrize('kind', ['pytorch_model.bin', 'model.safetensors'])
def test_a_published_folder_is_known_by_its_bytes(tmp_path, kind):
    model = helpers.tiny_model(n_layers=1)
    params = helpers.params_of(model)
    pretrained.save(tmp_path / 'hf', model, params, None)
    path = tmp_path / 'hf' / kind
    if kind.endswith('.bin'):
        from safetensors.torch import load_file

        state = load_file(tmp_path / 'hf' / 'model.safetensors')
        torch.save(state, path)
        (tmp_path / 'hf' / 'model.safetensors').unlink()
    before = sources.open(tmp_path / 'hf').identity()
    assert sources.open(tmp_path / 'hf').identity() == before
    # A flipped bit, the size and the time of change as they were: a copy that preserves times.
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert sources.open(tmp_path / 'hf').identity() != before
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert sources.open(tmp_path / 'hf').identity() == before


TOKENIZERS = [  # files of a folder, of which the first that is known is read
    ('bytes.json',),
    ('tokenizer.json', 'vocab.json', 'merges.txt'),
    ('vocab.json', 'merges.txt'),
    ('encoder.json', 'vocab.bpe'),
    ('encoder_bpe_40000.json', 'vocab_40000.bpe'),
    ('gpt1.json', 'vocab.json', 'merges.txt'),
    ('spiece.model',),
]


@pytest.mark.parametrize('names', TOKENIZERS)
def test_a_published_folder_is_known_by_its_tokenizer(tmp_path, names):
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}')
    for name in names:
        (tmp_path / name).write_text('{}')
    before = sources.open(tmp_path).identity()
    read = names[:1] if names[0] == 'tokenizer.json' else names
    for name in names:
        (tmp_path / name).write_text('{ }')
        assert (sources.open(tmp_path).identity() != before) == (name in read)
        (tmp_path / name).unlink()
        assert (sources.open(tmp_path).identity() != before) == (name in read)
        (tmp_path / name).write_text('{}')
        assert sources.open(tmp_path).identity() == before


def test_a_digest_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    path = tmp_path / 'file'
    path.write_bytes(b'abc')
    first = files.remembered_sha256(path)
    assert first == files.sha256(path)
    monkeypatch.setattr(files, 'sha256', lambda path: 'read again')
    assert files.remembered_sha256(path) == first
    (note,) = (tmp_path / 'cache' / 'gptjax' / 'digests').iterdir()
    for damaged in ('', '{}', '[]', 'null', '{"state": []}', note.read_text()[:-9]):
        note.write_text(damaged)
        assert files.remembered_sha256(path) == 'read again'


def test_commit_is_the_trees(tmp_path):
    """HEAD, whatever file was touched last, and whether anything differs."""
    folder = tmp_path / 'checkout'
    runtime = folder / 'gptjax' / 'runtime'
    runtime.mkdir(parents=True)
    (runtime / 'program.py').write_text('')

    def git(*command):
        who = ['-c', 'user.name=x', '-c', 'user.email=x@example.org']
        return subprocess.run(
            ['git', *who, *command], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    def commit():
        program.commit.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(program, '__file__', str(runtime / 'program.py'))
            return program.commit()

    assert commit() == ''
    git('init', '-q')
    assert commit() == ''  # another's checkout: the package is not in it
    git('add', '.')
    git('commit', '-qm', 'one')
    (folder / 'notes.md').write_text('x')
    assert commit() == git('rev-parse', '--short', 'HEAD') + ', changed'
    git('add', '.')
    git('commit', '-qm', 'two')
    assert commit() == git('rev-parse', '--short', 'HEAD')
    program.commit.cache_clear()


def test_the_best_checkpoint_can_be_named(run):
    config, workdir = run
    flags = (
        '--config.checkpoint.keep_best=eval/tokens/bits_per_byte',
        '--config.optim.peak_lr=0.3',
        '--config.optim.schedule=constant',
    )
    train.main(helpers.args(config, workdir, *flags))
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    scored = {
        r['step']: r['eval/tokens/bits_per_byte']
        for r in rows
        if len(r) > 12 and 'eval/tokens/bits_per_byte' in r
    }
    best = min(scored, key=scored.get)
    found = pretrained.load(workdir / 'best').params
    named = pretrained.load(workdir / 'checkpoints' / f'{best:08d}').params
    table = found['network']['token_embedding']
    np.testing.assert_array_equal(table, named['network']['token_embedding'])
    evaluate.main(helpers.args(config, workdir, f'--config.init_from={workdir}/best'))
    report = helpers.evaluation_of(workdir)
    assert report['bits_per_byte'] == pytest.approx(scored[best], rel=1e-5)
    assert report['weights'] == f'{workdir}/best'
