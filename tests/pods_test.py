# SPDX-License-Identifier: Apache-2.0
"""Runs whose workdir is in a bucket: the same numbers as on a disk."""

import http.server
import json
import random
import subprocess
import threading

import numpy as np
import pytest

from gptjax import convert, count_ngrams, evaluate, forgetting, generate
from gptjax.configs import base, errors
from gptjax.data import loader, staging, tokens
from gptjax.runtime import checkpoint, program
from gptjax.storage import buckets, documents, retry, scratch
from tests import emulator, helpers, pods


def test_a_run_in_a_bucket_is_the_run_on_a_disk(bucket, config_file, local):
    with helpers.stopped_after(4), pytest.raises(program.Preempted):
        pods.trained(bucket, config_file)
    pods.trained(bucket, config_file)
    assert pods.outcome(bucket) == pods.outcome(local)
    written = {name.partition('/')[0] for name in bucket.objects()}
    assert {'config.json', 'metrics.jsonl', 'results.json', 'parameters.txt'} <= written
    assert {'tensorboard', 'checkpoints', 'tokenizer', 'tokens', 'corpus'} <= written
    assert not [name for name in written if name.startswith('.')]


@pytest.mark.slow
def test_every_program_works_there(bucket, config_file, local, tmp_path):
    pods.trained(bucket, config_file)
    here, there = str(local), str(bucket)
    prompts = bucket.parent / 'prompts.txt'
    prompts.write_bytes(b'the cat\none dog\n')
    (tmp_path / 'prompts.txt').write_bytes(b'the cat\none dog\n')

    def both(main, *flags, define=lambda values: None, default=base.OF_RUN):
        for workdir, beside in ((here, tmp_path), (there, bucket.parent)):
            said = [flag.replace('HERE', workdir).replace('BESIDE', str(beside)) for flag in flags]
            emulator.run(main, *said, define=define, default=default)

    both(evaluate.main, '--workdir=HERE')
    read = '--config.decode.max_new_tokens=8'
    prompted = ('--prompts=BESIDE/prompts.txt', read)
    both(generate.main, '--workdir=HERE', *prompted, define=generate.define)
    init = '--config.init_from=HERE'
    both(generate.main, '--workdir=BESIDE/out', init, *prompted, define=generate.define)
    flags = ('--run=GPT=HERE', '--windows=4', '--config.evaluate.max_tokens=0')
    both(forgetting.main, '--workdir=HERE', *flags, define=forgetting.define)
    both(convert.main, '--workdir=BESIDE/hf', init, '--to=huggingface', define=convert.define)
    published = '--config.init_from=BESIDE/hf'
    both(convert.main, '--workdir=BESIDE/ours', published, define=convert.define)
    ours = '--config.init_from=BESIDE/ours'
    both(generate.main, '--workdir=BESIDE/fourth', ours, *prompted, define=generate.define)
    both(generate.main, '--workdir=BESIDE/again', published, *prompted, define=generate.define)
    counted = (f'--config={config_file}:model=ngram', '--config.tokenizer.dir=../tokenizer')
    counted += ("--config.data.sets=('../tokens',)", '--config.data.eval_sets.tokens=../tokens')
    both(count_ngrams.main, '--workdir=HERE/ngram', *counted, '--arpa', define=count_ngrams.define)

    def lines(path):
        return [json.loads(line)['text'] for line in path.read_bytes().splitlines()]

    for name in (
        'samples.jsonl',
        '../out/samples.jsonl',
        '../again/samples.jsonl',
        '../fourth/samples.jsonl',
    ):
        places = local / name, buckets.of(f'{bucket}/{name}')
        if name.startswith('..'):
            places = tmp_path / name[3:], bucket.parent / name[3:]
        assert lines(places[0]) == lines(places[1])
    for name, field in (('evaluation.json', 'sets'), ('forgetting.json', 'runs')):
        found = [documents.read(place / name, dict, '')[field] for place in (local, bucket)]
        if field == 'runs':
            assert [said['GPT'].pop('weights') for said in found] == [here, there]
        assert found[0] == found[1]
    assert (local / 'ngram' / 'model.arpa').read_bytes() == (
        bucket / 'ngram' / 'model.arpa'
    ).read_bytes()
    assert 'forgetting.png' in bucket.objects()
    assert not any('.work' in name for name in bucket.objects())


@pytest.mark.slow
def test_a_checkpoint_may_be_copied_between_disks_and_buckets(bucket, config_file, local, tmp_path):
    pods.trained(bucket, config_file)
    expected = pods.outcome(local)
    down = tmp_path / 'down'
    for name in bucket.objects():
        (down / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).fetch(down / name)
    assert pods.outcome(down) == expected
    up = bucket.parent / 'up'
    for path in local.rglob('*'):
        if path.is_file():
            (up / path.relative_to(local).as_posix()).put(path)
    assert pods.outcome(up) == expected


def test_tokens_are_streamed_as_they_are_staged(bucket, config_file, local):
    batches = {}
    for read in ('stage', 'stream'):
        with emulator.process():
            place = staging.locate(f'{bucket}/tokens', local, '', lambda n: None, 'train', read)
            assert isinstance(place, buckets.Path) == (read == 'stream')
            opened = tokens.open_set(place, 'train')
            section = dict(base.get_config().data) | {'sets': (str(bucket),), 'weights': (1.0,)}
            found = loader.batches(
                [opened],
                loader.configure(section),
                32,
                7,
                lambda step: (step * 8, 8),
                lambda count: (np.arange(count), slice(None)),
                0,
                20,
            )
            batches[read] = [batch['tokens'].tolist() for batch in found]
            batches[read].append(opened.read(0, len(opened)).tolist())
    assert batches['stage'] == batches['stream']
    pods.trained(bucket, config_file, '--config.data.read=stream')
    assert pods.outcome(bucket) == pods.outcome(local)


def test_streamed_tokens_that_are_not_those_written_are_named(bucket, local, monkeypatch):
    monkeypatch.setattr(retry, 'PATIENCE_SECS', 0.5)
    place = bucket / 'tokens'
    name = next(
        name for name in place.objects() if name.startswith('train') and name.endswith('.bin')
    )
    content = (place / name).read_bytes()
    opened = tokens.open_set(place, 'train')
    for damaged in (content[:-2], content[:9] + b'\1' + content[10:], b''):
        (place / name).put(damaged)
        with pytest.raises(errors.InputError, match=name):
            tokens.open_set(place, 'train')
        with pytest.raises(errors.InputError, match=f'{name} was changed|cannot be read'):
            opened.read(0, len(opened))
    (place / name).unlink()
    with pytest.raises(errors.InputError, match=name):
        tokens.open_set(place, 'train')


def test_tokens_without_a_checksum_are_hashed(bucket, monkeypatch):
    said = json.loads((bucket / 'tokens' / 'manifest.json').read_bytes())
    for record in (*said['splits']['train'], *said['splits']['valid']):
        record.pop('crc32c', None), record.pop('table_crc32c', None)
    said.pop('checksum')
    with_sums = tokens.open_set(bucket / 'tokens', 'train')
    (bucket / 'tokens' / 'manifest.json').write_bytes(json.dumps(said).encode())
    without = tokens.open_set(bucket / 'tokens', 'train')
    assert without.digest == with_sums.digest
    name = without._shards[0].path
    name.put(b'\1' + name.read_bytes()[1:])
    with pytest.raises(errors.InputError, match='does not have the bytes'):
        tokens.open_set(bucket / 'tokens', 'train')


@pytest.mark.slow
def test_damaged_checkpoints_in_a_bucket_are_passed_over(bucket, config_file, local):
    pods.trained(bucket, config_file)
    expected = pods.outcome(local)
    rng = random.Random(0)
    newest = sorted(name for name in bucket.objects() if name.startswith('checkpoints/00000008/'))
    kept = {name: (bucket / name).read_bytes() for name in newest}
    damages = [(name, how) for name in newest for how in ('cut', 'flip', 'gone')]
    damages = [d for d in damages if not d[0].endswith('scores.json')]
    wanted = [d for d in damages if d[0].endswith(('manifest.json', 'meta.json'))]
    for name, how in wanted + rng.sample(damages, 12):
        damaged = {
            'cut': kept[name][: len(kept[name]) // 2],
            'flip': kept[name][:-1] + b'\xff',
            'gone': None,
        }[how]
        (bucket / name).unlink() if damaged is None else (bucket / name).put(damaged)
        with emulator.process():
            workdir = scratch.small(scratch.here(str(bucket)))
            found = checkpoint.latest(workdir, put_aside=False)
        whole = kept[name] == damaged
        assert found[1]['step'] == (8 if whole else 6), (name, how)
        (bucket / name).put(kept[name])
    victim = rng.choice([name for name in newest if '/state/' in name])
    (bucket / victim).put(b'damaged')
    (bucket / 'results.json').unlink()
    pods.trained(bucket, config_file)
    assert pods.outcome(bucket) == expected


START = [
    ('no bucket', 'there is no bucket gs://none-such'),
    ('forbidden', 'cannot be written.*roles/storage.objectUser'),
    ('down', 'cannot be written: storage answers 503'),
]


@pytest.mark.parametrize(('what', 'said'), START)
def test_what_is_wrong_is_said_before_anything_is_done(bucket, config_file, storage, what, said):
    where = 'gs://none-such/run' if what == 'no bucket' else str(bucket)
    code = {'forbidden': 403, 'down': 503}.get(what, emulator.FORWARD)
    with storage.failing(lambda request: code), pytest.raises(errors.InputError, match=said):
        pods.trained(where, config_file)


def test_credentials_and_packages_are_asked_for(tmp_path, config_file):
    """Of processes of their own: neither is there."""
    plain = pods.environment(tmp_path, HOME=str(tmp_path), GCE_METADATA_HOST='127.0.0.1:9')
    for name in ('STORAGE_EMULATOR_HOST', 'GOOGLE_APPLICATION_CREDENTIALS'):
        plain.pop(name, None)
    found = subprocess.run(
        pods.command('gs://bucket/run', config_file), env=plain, capture_output=True, text=True
    )
    assert found.returncode == program.FAILED
    assert found.stderr.startswith('error: gs://bucket cannot be reached: there are no credentials')
    assert found.stderr.count('\n') == 1
    (tmp_path / 'google' / 'cloud').mkdir(parents=True)
    (tmp_path / 'google' / 'cloud' / 'storage.py').write_text('raise ImportError("not installed")')
    hidden = plain | {'PYTHONPATH': str(tmp_path)}
    found = subprocess.run(
        pods.command('gs://bucket/run', config_file), env=hidden, capture_output=True, text=True
    )
    assert (found.returncode, found.stderr) == (
        program.WRONG_USAGE,
        "error: gs:// needs: pip install 'gptjax[gcs]'\n",
    )


@pytest.mark.parametrize(
    ('zone', 'far'), [('europe-west4-a', True), ('us-central1-a', False), ('us-east5-b', True)]
)
def test_a_bucket_far_away_is_told_of(bucket, monkeypatch, caplog, zone, far):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f'projects/1/zones/{zone}'.encode())

        def log_message(self, *said):
            pass

    with http.server.HTTPServer(('127.0.0.1', 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv('GCE_METADATA_HOST', f'127.0.0.1:{server.server_address[1]}')
        with emulator.process():
            scratch.open_workdir(str(bucket))
        server.shutdown()
    assert ('this machine in' in caplog.text) == far
