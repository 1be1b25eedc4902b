# SPDX-License-Identifier: Apache-2.0
"""What is written lasts: a workdir of an earlier gptjax, as it lay on disk, goes on today.

tests/data/run_of_5a5fca3.tar.xz was made at that commit, before fields had meanings and values of
yesterday: ten steps of a tiny Llama shape with a ramp, dropout and an average, cut off after the
checkpoint of step 4, with what training, evaluate and generate made of it then.
"""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import jax
import numpy as np
import pytest

from gptjax.configs import base, errors, fields, upgrade
from gptjax.models import pretrained, sources
from gptjax.runtime import checkpoint, metrics
from gptjax.training import guard
from gptjax.training import step as step_lib
from tests import conftest, helpers

ARCHIVE = conftest.ROOT / 'tests' / 'data' / 'run_of_5a5fca3.tar.xz'


@pytest.fixture
def old(tmp_path) -> pathlib.Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter='data')
    return tmp_path / 'step4'


@pytest.fixture(scope='module')
def unpacked(tmp_path_factory) -> pathlib.Path:
    """To be read, not changed."""
    folder = tmp_path_factory.mktemp('old')
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter='data')
    return folder / 'step4'


def program(name: str, *flags: str, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    """On one device, as it was made."""
    environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
    environment |= {'PYTHONPATH': str(conftest.ROOT)}
    done = subprocess.run(
        [sys.executable, '-m', f'gptjax.{name}', *flags],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def expected_of(folder: pathlib.Path) -> dict:
    return json.loads((folder / 'expected.json').read_text())


@pytest.mark.parametrize(('item', 'path'), [('params', '.'), ('average', 'average')])
def test_evaluate_and_generate_say_what_they_said(unpacked, tmp_path, item, path):
    expected, weights = expected_of(unpacked)[item], f'--config.init_from={unpacked / path}'
    common = ('--config=config.py', f'--workdir={tmp_path}', weights)
    held_out = f'--config.data.eval_sets.tokens={unpacked}/tokens'
    program('evaluate', *common, held_out, cwd=unpacked)
    found = helpers.evaluation_of(tmp_path)
    for name, value in expected['evaluation'].items():
        assert found[name] == (
            pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
        )
    asked = ('--config.decode.logprobs=2', '--config.decode.do_sample=no')  # that day's default
    program('generate', *common, '--prompt=the cat', *asked, cwd=unpacked)
    (line,) = (tmp_path / 'samples.jsonl').read_text().splitlines()
    (wanted,) = expected['samples']
    found = json.loads(line)
    assert (found['text'], found['tokens']) == (wanted['text'], wanted['tokens'])
    np.testing.assert_allclose(found['logprobs'], wanted['logprobs'], atol=1e-5)


def test_training_goes_on(old):
    """What its dropout of a tenth of four numbers leaves out is drawn otherwise since then."""
    expected = expected_of(old)
    program('train', '--config=config.py', f'--workdir={old}', cwd=old)
    rows = {str(row['step']): row for row in metrics.read(old)}
    losses = {step: row['train/loss'] for step, row in rows.items()}
    results = json.loads((old / 'results.json').read_text())
    assert losses == pytest.approx(expected['losses'], rel=1e-4)
    for name, value in expected['results'].items():
        assert results[name] == pytest.approx(value, rel=1e-4)


def test_convert_goes_both_ways(unpacked, tmp_path):
    common = ('--config', base.__file__)
    weights = f'--config.init_from={unpacked}'
    program('convert', weights, f'--workdir={tmp_path}/hf', '--to=huggingface', cwd=tmp_path)
    program(
        'convert',
        f'--config.init_from={tmp_path}/hf',
        f'--workdir={tmp_path}/back',
        *common,
        cwd=tmp_path,
    )
    first, back = pretrained.load(unpacked), pretrained.load(tmp_path / 'back')
    jax.tree.map(np.testing.assert_array_equal, first.params, back.params)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / 'hf').iterdir()}
    assert len(modes) == 1  # weights are no more private than the rest


def test_every_field_says_what_was_before_it(unpacked):
    """Whoever adds a field says its earlier value; nobody takes one out."""
    then = json.loads((unpacked / 'config.json').read_text())
    for name in base.SECTIONS:
        family = then['model']['family'] if name == 'model' else 'gpt'
        for leaf, field in base.section_of(name, family).items():
            path = f'{name}.{leaf}'
            renamed = path in {new for new, _ in upgrade.RENAMED.values()}
            if leaf not in then[name] and not renamed:
                assert field.was is not fields.ALWAYS, f'{path}: say was=<its value until now>'
        for leaf in then[name]:
            path = f'{name}.{leaf}'
            known = base.field_of(path, family) is not None
            assert known or path in upgrade.RENAMED, f'{path} is gone: name what took its place'
    now = upgrade.config(then)
    assert now['data']['eval_sets'] == {'tokens': 'tokens'}
    assert (now['model']['mlp'], now['optim']['optimizer']) == ('dense', 'adamw')
    assert now['model']['attention'] == ('dense',)
    assert upgrade.config(json.loads(json.dumps(now))) == now


def test_a_section_that_came_later_is_as_it_was_before_it(unpacked, monkeypatch):
    then = json.loads((unpacked / 'config.json').read_text())
    later = {'width': fields.fixed(3, 'of it'), 'depth': fields.free(5, 'of it', was=4)}
    monkeypatch.setitem(base.SECTIONS, 'wormhole', later)
    assert upgrade.config(then)['wormhole'] == {'width': 3, 'depth': 4}


def test_a_model_of_tomorrow_is_told_with_its_path(unpacked, tmp_path):
    folder = tmp_path / 'run'

    shutil.copytree(unpacked, folder)
    path = folder / 'checkpoints' / '00000004' / 'meta.json'
    meta = json.loads(path.read_text())
    meta['config']['model']['wormholes'] = 3
    path.write_text(json.dumps(meta))
    manifest = path.with_name('manifest.json')
    digests = json.loads(manifest.read_text())
    digests['meta.json'] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(digests))
    said = f'weights in {folder} .*unknown field .wormholes.; use the version of gptjax that made'
    with pytest.raises(errors.InputError, match=said):
        pretrained.load(folder)
    meta['config']['model'].pop('wormholes')
    meta['head'] = 'oracle'
    path.write_text(json.dumps(meta))
    digests['meta.json'] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(digests))
    with pytest.raises(errors.InputError, match="no head 'oracle'; there are: language_model"):
        pretrained.load(folder)


def test_what_came_later_to_a_state_begins_afresh(tmp_path):
    """As the guard, which the first checkpoints did not have."""
    params = {'w': np.ones(3, np.float32)}
    rest = {'step': np.int32(4), 'opt_state': {'m': np.zeros(3, np.float32)}}
    checkpoints = checkpoint.Checkpoints(tmp_path, 2)
    checkpoints.save(4, {'params': params, 'rest': rest}, {})
    checkpoints.close()
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    whole = step_lib.State(rest['step'], params, {}, rest['opt_state'], None, guard.empty())
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=one), whole
    )
    found, wanted = checkpoint.latest(tmp_path), step_lib.items(target)
    with pytest.raises(errors.InputError, match=r"\['rest'\]\['guard'\].* is absent there"):
        checkpoint.restore(*found, **wanted)
    items = checkpoint.restore(*found, may_lack={'rest': step_lib.LATER}, **wanted)
    state = step_lib.from_items(items, step_lib.Options(), target)
    assert int(state.step) == 4
    jax.tree.map(np.testing.assert_array_equal, state.guard, guard.empty())


def test_sources_of_the_same_workdir(unpacked):
    assert sources.open(unpacked).identity() != sources.open(unpacked / 'average').identity()
    newest = sources.open(unpacked / 'checkpoints' / '00000004')
    assert newest.identity() == sources.open(unpacked).identity()
    with pytest.raises(errors.InputError, match='no checkpoint of step 5'):
        pretrained.load(unpacked / 'checkpoints' / '00000005')
    with pytest.raises(errors.InputError, match='knows no best checkpoint'):
        sources.open(unpacked / 'best')
