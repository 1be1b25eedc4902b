# SPDX-License-Identifier: Apache-2.0
"""Runs whose workdir is in a bucket: the same numbers as on a disk, whatever happens to it."""

import http.server
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from gptjax import (
    convert,
    count_ngrams,
    evaluate,
    forgetting,
    generate,
    prepare_corpus,
    prepare_tokens,
    train,
    train_tokenizer,
)
from gptjax.configs import base, errors
from gptjax.data import loader, staging, tokens
from gptjax.models import pretrained
from gptjax.runtime import checkpoint, metrics, program, results, saver
from gptjax.storage import buckets, documents, mirror, retry, scratch
from tests import emulator, helpers

PREPARING = (prepare_corpus, train_tokenizer, prepare_tokens)
LENGTH = ('--config.train.total_tokens=4096', '--config.checkpoint.every_steps=3')
LENGTH += ('--config.train.log_every_steps=1', '--config.checkpoint.keep=3')


@pytest.fixture(scope='module')
def config(tmp_path_factory, corpus_file) -> str:
    return helpers.tiny_config(tmp_path_factory.mktemp('config'), corpus_file)


@pytest.fixture(scope='module')
def local(config, tmp_path_factory) -> pathlib.Path:
    """A run on a disk, to its end."""
    workdir = tmp_path_factory.mktemp('local') / 'run'
    for program_ in PREPARING:
        program_.main(helpers.args(config, workdir))
    train.main(helpers.args(config, workdir, *LENGTH))
    return workdir


@pytest.fixture(scope='module')
def prepared(config, storage) -> buckets.Path:
    """A workdir with tokens."""
    folder = buckets.of(f'gs://{storage.bucket()}/prepared')
    for program_ in PREPARING:
        emulator.run(program_.main, f'--config={config}', f'--workdir={folder}')
    return folder


@pytest.fixture
def folder(prepared, storage) -> buckets.Path:
    """A copy of it, of this test."""
    return prepared.copy(buckets.of(f'gs://{storage.bucket()}/run'))


def trained(folder: buckets.Path, config: str, *flags: str) -> None:
    emulator.run(train.main, f'--config={config}', f'--workdir={folder}', *LENGTH, *flags)


def outcome(place: pathlib.Path | buckets.Path) -> tuple:
    """The weights, the scores and the rows of a run."""
    with emulator.process():
        workdir = scratch.small(scratch.here(str(place)))
        found = results.read(workdir)
        scores = {name: value for name, value in found.items() if name.startswith('eval/')}
        rows = {row['step']: row['train/loss'] for row in metrics.read(workdir)}
        loaded = pretrained.load(str(place))
        arrays = [np.asarray(x).tobytes() for x in jax.tree.leaves(loaded.params)]
        return arrays, scores, rows, checkpoint.latest(workdir, put_aside=False)[1]['step']


def test_a_run_in_a_bucket_is_the_run_on_a_disk(folder, config, local):
    with helpers.stopped_after(4), pytest.raises(program.Preempted):
        trained(folder, config)
    trained(folder, config)
    assert outcome(folder) == outcome(local)
    written = {name.partition('/')[0] for name in folder.objects()}
    assert {'config.json', 'metrics.jsonl', 'results.json', 'parameters.txt'} <= written
    assert {'tensorboard', 'checkpoints', 'tokenizer', 'tokens', 'corpus'} <= written
    assert not [name for name in written if name.startswith('.')]


def test_every_program_works_there(folder, config, local, tmp_path):
    trained(folder, config)
    here, there = str(local), str(folder)
    prompts = folder.parent / 'prompts.txt'
    prompts.write_bytes(b'the cat\none dog\n')
    (tmp_path / 'prompts.txt').write_bytes(b'the cat\none dog\n')

    def both(main, *flags, define=lambda values: None, default=base.OF_RUN):
        for workdir, beside in ((here, tmp_path), (there, folder.parent)):
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
    counted = (f'--config={config}:model=ngram', '--config.tokenizer.dir=../tokenizer')
    counted += ("--config.data.sets=('../tokens',)", '--config.data.eval_sets.tokens=../tokens')
    both(count_ngrams.main, '--workdir=HERE/ngram', *counted)

    def lines(path):
        return [json.loads(line)['text'] for line in path.read_bytes().splitlines()]

    for name in (
        'samples.jsonl',
        '../out/samples.jsonl',
        '../again/samples.jsonl',
        '../fourth/samples.jsonl',
    ):
        places = local / name, buckets.of(f'{folder}/{name}')
        if name.startswith('..'):
            places = tmp_path / name[3:], folder.parent / name[3:]
        assert lines(places[0]) == lines(places[1])
    for name, field in (('evaluation.json', 'sets'), ('forgetting.json', 'runs')):
        found = [documents.read(place / name, dict, '')[field] for place in (local, folder)]
        if field == 'runs':
            assert [said['GPT'].pop('weights') for said in found] == [here, there]
        assert found[0] == found[1]
    assert (local / 'ngram' / 'model.arpa').read_bytes() == (
        folder / 'ngram' / 'model.arpa'
    ).read_bytes()
    assert 'forgetting.png' in folder.objects()


def test_a_checkpoint_may_be_copied_between_disks_and_buckets(folder, config, local, tmp_path):
    trained(folder, config)
    expected = outcome(local)
    down = tmp_path / 'down'
    for name in folder.objects():
        (down / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).fetch(down / name)
    assert outcome(down) == expected
    up = folder.parent / 'up'
    for path in local.rglob('*'):
        if path.is_file():
            (up / path.relative_to(local).as_posix()).put(path)
    assert outcome(up) == expected


def test_tokens_are_streamed_as_they_are_staged(folder, config, local):
    batches = {}
    for read in ('stage', 'stream'):
        with emulator.process():
            place = staging.locate(f'{folder}/tokens', local, '', lambda n: None, 'train', read)
            assert isinstance(place, buckets.Path) == (read == 'stream')
            opened = tokens.open_set(place, 'train')
            section = dict(base.get_config().data) | {'sets': (str(folder),), 'weights': (1.0,)}
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
    trained(folder, config, '--config.data.read=stream')
    assert outcome(folder) == outcome(local)


def test_streamed_tokens_that_are_not_those_written_are_named(folder, local, monkeypatch):
    place = folder / 'tokens'
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


def test_tokens_without_a_checksum_are_hashed(folder, monkeypatch):
    said = json.loads((folder / 'tokens' / 'manifest.json').read_bytes())
    for record in (*said['splits']['train'], *said['splits']['valid']):
        record.pop('crc32c', None), record.pop('table_crc32c', None)
    said.pop('checksum')
    with_sums = tokens.open_set(folder / 'tokens', 'train')
    (folder / 'tokens' / 'manifest.json').write_bytes(json.dumps(said).encode())
    without = tokens.open_set(folder / 'tokens', 'train')
    assert without.digest == with_sums.digest
    name = without._shards[0].path
    name.put(b'\1' + name.read_bytes()[1:])
    with pytest.raises(errors.InputError, match='does not have the bytes'):
        tokens.open_set(folder / 'tokens', 'train')


def test_damaged_checkpoints_in_a_bucket_are_passed_over(folder, config, local):
    trained(folder, config)
    expected = outcome(local)
    rng = random.Random(0)
    newest = sorted(name for name in folder.objects() if name.startswith('checkpoints/00000008/'))
    kept = {name: (folder / name).read_bytes() for name in newest}
    damages = [(name, how) for name in newest for how in ('cut', 'flip', 'gone')]
    damages = [d for d in damages if not d[0].endswith('scores.json')]
    wanted = [d for d in damages if d[0].endswith(('manifest.json', 'meta.json'))]
    for name, how in wanted + rng.sample(damages, 12):
        damaged = {
            'cut': kept[name][: len(kept[name]) // 2],
            'flip': kept[name][:-1] + b'\xff',
            'gone': None,
        }[how]
        (folder / name).unlink() if damaged is None else (folder / name).put(damaged)
        with emulator.process():
            workdir = scratch.small(scratch.here(str(folder)))
            found = checkpoint.latest(workdir, put_aside=False)
        whole = kept[name] == damaged
        assert found[1]['step'] == (8 if whole else 6), (name, how)
        (folder / name).put(kept[name])
    victim = rng.choice([name for name in newest if '/state/' in name])
    (folder / victim).put(b'damaged')
    (folder / 'results.json').unlink()
    trained(folder, config)
    assert outcome(folder) == expected


START = [
    ('no bucket', 'there is no bucket gs://none-such'),
    ('forbidden', 'cannot be written.*roles/storage.objectUser'),
    ('down', 'cannot be written: storage answers 503'),
]


@pytest.mark.parametrize(('what', 'said'), START)
def test_what_is_wrong_is_said_before_anything_is_done(folder, config, storage, what, said):
    where = 'gs://none-such/run' if what == 'no bucket' else str(folder)
    code = {'forbidden': 403, 'down': 503}.get(what, emulator.FORWARD)
    with storage.failing(lambda request: code), pytest.raises(errors.InputError, match=said):
        trained(where, config)


def command(folder: object, config: str, *flags: str) -> list[str]:
    said = ['-m', 'gptjax.train', f'--config={config}', f'--workdir={folder}', *LENGTH, *flags]
    return [sys.executable, *said]


def environment(home: pathlib.Path, **more: str) -> dict[str, str]:
    """Of a process with a home of its own."""
    (home / 'gptjax').mkdir(parents=True, exist_ok=True)
    compiled = pathlib.Path.home() / '.cache' / 'gptjax'
    if not (home / 'gptjax' / 'xla').exists():
        (compiled / 'xla').mkdir(parents=True, exist_ok=True)
        (home / 'gptjax' / 'xla').symlink_to(compiled / 'xla')
    return os.environ | {'XDG_CACHE_HOME': str(home)} | more


def test_credentials_and_packages_are_asked_for(tmp_path, config):
    """Of processes of their own: neither is there."""
    plain = environment(tmp_path, HOME=str(tmp_path), GCE_METADATA_HOST='127.0.0.1:9')
    for name in ('STORAGE_EMULATOR_HOST', 'GOOGLE_APPLICATION_CREDENTIALS'):
        plain.pop(name, None)
    found = subprocess.run(
        command('gs://bucket/run', config), env=plain, capture_output=True, text=True
    )
    assert found.returncode == program.FAILED
    assert found.stderr.startswith('error: gs://bucket cannot be reached: there are no credentials')
    assert found.stderr.count('\n') == 1
    (tmp_path / 'google' / 'cloud').mkdir(parents=True)
    (tmp_path / 'google' / 'cloud' / 'storage.py').write_text('raise ImportError("not installed")')
    hidden = plain | {'PYTHONPATH': str(tmp_path)}
    found = subprocess.run(
        command('gs://bucket/run', config), env=hidden, capture_output=True, text=True
    )
    assert (found.returncode, found.stderr) == (
        program.WRONG_USAGE,
        "error: gs:// needs: pip install 'gptjax[gcs]'\n",
    )


@pytest.mark.parametrize(
    ('zone', 'far'), [('europe-west4-a', True), ('us-central1-a', False), ('us-east5-b', True)]
)
def test_a_bucket_far_away_is_told_of(folder, monkeypatch, caplog, zone, far):
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
            scratch.open_workdir(str(folder))
        server.shutdown()
    assert ('this machine in' in caplog.text) == far


def killed(storage, folder, config, tmp_path, number: int, when: str) -> int:
    """Kills a run at its n-th request to storage, before or after storage has it."""
    begun = len(storage.requests)
    found: list[subprocess.Popen] = []

    def fault(request):
        if len(storage.requests) - begun == number:
            if when == 'after':
                threading.Timer(0.05, found[0].kill).start()
                return emulator.FORWARD
            found[0].kill()
            return emulator.RESET
        return emulator.FORWARD

    with storage.failing(fault):
        env = environment(tmp_path / 'home')
        with subprocess.Popen(
            command(folder, config), env=env, stderr=subprocess.PIPE, text=True
        ) as process:
            found.append(process)
            said = process.stderr.read()
    assert process.returncode in (0, -signal.SIGKILL), said
    assert 'Traceback' not in said
    return process.returncode


def survives(storage, folder, config, local, tmp_path, numbers) -> None:
    """Killed at those requests, one after the other, it ends as the undisturbed run."""
    for number, when in numbers:
        killed(storage, folder, config, tmp_path, number, when)
        lease = folder / '.lease'
        lease.unlink(missing_ok=True)  # whose minute is not waited for here
    env = environment(tmp_path / 'home')
    done = subprocess.run(command(folder, config), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert outcome(folder) == outcome(local)


def test_a_run_that_is_killed_goes_on(storage, folder, config, local, tmp_path):
    survives(storage, folder, config, local, tmp_path, [(60, 'before'), (130, 'after')])


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(10))
def test_twenty_kills_at_any_request(storage, folder, config, local, tmp_path, seed):
    rng = random.Random(seed)
    numbers = [(rng.randrange(5, 260), rng.choice(['before', 'after'])) for _ in range(2)]
    survives(storage, folder, config, local, tmp_path, numbers)


def test_storage_that_fails_now_and_then_changes_nothing(
    storage, folder, config, local, monkeypatch
):
    monkeypatch.setattr(retry, 'FIRST_SECS', 0.02)
    rng, codes = random.Random(0), (429, 503, 500, 401, emulator.RESET)

    def fault(request):
        return rng.choice(codes) if rng.random() < 0.1 else emulator.FORWARD

    with storage.failing(fault):
        trained(folder, config, '--config.data.read=stream')
    assert outcome(folder) == outcome(local)


def test_training_goes_on_while_storage_is_down(
    storage, folder, config, local, monkeypatch, caplog
):
    for name in ('FIRST_SECS', 'LONGEST_SECS'):
        monkeypatch.setattr(retry, name, 0.05)
    monkeypatch.setattr(retry, 'PATIENCE_SECS', 0.5)
    monkeypatch.setattr(checkpoint, '_AT_ONCE_SECS', 0.2)
    monkeypatch.setattr(saver, 'FIRST_SECS', 0.05)
    monkeypatch.setattr(saver, '_SLOW_SECS', 0.1)
    down = [False]

    def fault(request):
        wrote = request.method == 'POST' and '/checkpoints/' in request.name
        down[0] = down[0] or wrote
        return 503 if down[0] and len(seen) < 7 else emulator.FORWARD

    seen = []
    after = train.run_lib.Run.after

    def counted(self, step, state, found):
        seen.append(step)
        after(self, step, state, found)

    monkeypatch.setattr(train.run_lib.Run, 'after', counted)
    with storage.failing(fault):
        trained(folder, config)
    assert 'training goes on' in caplog.text
    monkeypatch.undo()
    assert outcome(folder) == outcome(local)


def test_a_run_gives_up_with_a_line(storage, folder, config, monkeypatch):
    for name in ('FIRST_SECS', 'LONGEST_SECS'):
        monkeypatch.setattr(retry, name, 0.05)
    monkeypatch.setattr(retry, 'PATIENCE_SECS', 0.3)
    monkeypatch.setattr(checkpoint, '_AT_ONCE_SECS', 0.2)
    monkeypatch.setattr(saver, 'FIRST_SECS', 0.01)
    monkeypatch.setattr(saver, 'INSIST_SECS', 0.5)
    monkeypatch.setattr(mirror, '_CLOSE_SECS', 0.3)
    with helpers.stopped_after(4), pytest.raises(program.Preempted):
        trained(folder, config)
    last = checkpoint_steps(folder)

    def fault(request):
        wrote = request.method == 'POST' and '/checkpoints/' in request.name
        return 503 if wrote else emulator.FORWARD

    said = 'could not save step|what was trained since the last save is lost'
    with storage.failing(fault), pytest.raises(errors.InputError, match=said):
        trained(folder, config, '--config.checkpoint.give_up_minutes=0.001')
    assert checkpoint_steps(folder) == last


def checkpoint_steps(folder: buckets.Path) -> list[str]:
    return sorted(name for name in folder.objects() if name.endswith('manifest.json'))


def hosts(count: int, folder: object, config: str, homes: pathlib.Path, *flags: str):
    """Processes that share nothing but storage: each has a home and a folder of its own."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    joined = (f'--coordinator=localhost:{port}', f'--processes={count}')
    mesh = ('--config.mesh.data=2', '--config.mesh.fsdp=2')
    found = []
    for index in range(count):
        home = homes / f'{count}-{index}'
        (home / 'here').mkdir(parents=True, exist_ok=True)
        env = environment(
            home,
            XLA_FLAGS=f'--xla_force_host_platform_device_count={4 // count}',
            PYTHONPATH=str(pathlib.Path(__file__).resolve().parents[1]),
        )
        told = command(folder, config, *mesh, *joined, f'--process={index}', *flags)
        found.append(
            subprocess.Popen(told, env=env, cwd=home / 'here', stderr=subprocess.PIPE, text=True)
        )
    return found


def ended(processes) -> None:
    said = [process.communicate()[1] for process in processes]
    assert not any('Traceback' in each for each in said), said
    assert all(process.returncode == 0 for process in processes), said


def losses(place) -> list[float]:
    _, scores, rows, _ = outcome(place)
    assert list(rows) == list(range(1, 9))
    return [*rows.values(), *scores.values()]


def test_two_hosts_share_nothing_but_the_bucket(folder, config, local, tmp_path):
    ended(hosts(2, folder, config, tmp_path))
    assert losses(folder) == pytest.approx(losses(local), rel=1e-4)


@pytest.mark.slow
def test_one_host_of_two_is_killed_and_others_go_on(storage, folder, config, local, tmp_path):
    """On two again, then on one, then on four."""
    for count in (2, 1, 4):
        begun, number = len(storage.requests), {2: 150, 1: 60, 4: 10**9}[count]
        running = hosts(count, folder, config, tmp_path)

        def fault(request, begun=begun, number=number, running=running):
            if len(storage.requests) - begun == number:
                running[-1].kill()
            return emulator.FORWARD

        with storage.failing(fault):
            codes = [(p.communicate()[1], p.returncode) for p in running]
        if count < 4:
            assert any(code == -signal.SIGKILL for _, code in codes), codes
            assert all(code != 0 for _, code in codes), codes
        else:
            assert all(code == 0 for _, code in codes), codes
        (folder / '.lease').unlink(missing_ok=True)
    assert losses(folder) == pytest.approx(losses(local), rel=1e-4)
