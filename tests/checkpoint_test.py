# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or not there, verified before they are read, restorable on any mesh."""

import contextlib
import itertools
import json
import logging
import pathlib
import random
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.configs import errors
from gptjax.models import pretrained, sources
from gptjax.runtime import arrays, checkpoint, listing, manifest, scores
from gptjax.runtime import mesh as mesh_lib
from gptjax.storage import documents
from tests import helpers


def tree(seed=0, width=8):
    rng = np.random.default_rng(seed)
    params = {'a': jnp.asarray(rng.normal(size=(width, 16)), jnp.float32)}
    rest = {'step': jnp.asarray(seed, jnp.int32), 'mu': {'a': params['a'] * 2}}
    return params, rest


def items(params, rest):
    return {'params': params, 'rest': rest}


def save(workdir, steps, keep=5):
    checkpoints = checkpoint.Checkpoints(workdir, keep)
    for step in steps:
        checkpoints.save(step, items(*tree(step)), {'config': {'n': step}})
    checkpoints.close()


def abstract(value):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), value)


def read(workdir):
    folder, meta = checkpoint.latest(workdir)
    params, rest = tree(meta['step'])
    return meta, checkpoint.restore(folder, meta, params=abstract(params), rest=abstract(rest))


def test_saved_and_restored_bit_for_bit(tmp_path):
    save(tmp_path, [1, 2])
    meta, items = read(tmp_path)
    assert meta['step'] == 2
    assert meta['config'] == {'n': 2}
    params, rest = tree(2)
    for a, b in zip(
        *map(jax.tree.leaves, ((items['params'], items['rest']), (params, rest))), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_relative_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(pathlib.Path('run'), [1])
    assert read(pathlib.Path('run'))[0]['step'] == 1


def test_only_the_newest_are_kept(tmp_path):
    save(tmp_path, [1, 2, 3, 4], keep=2)
    assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['00000003', '00000004']


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize('damage', ['flip', 'truncate', 'remove', 'manifest'])
def test_a_damaged_newest_is_put_aside_with_a_warning(tmp_path, caplog, damage):
    save(tmp_path, [1, 2])
    newest = tmp_path / 'checkpoints' / '00000002'
    files = [p for p in newest.rglob('*') if p.is_file() and p.name != 'manifest.json']
    victim = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    if damage == 'flip':
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == 'truncate':
        victim.write_bytes(content[:-1])
    elif damage == 'remove':
        victim.unlink()
    else:
        (newest / 'manifest.json').write_text('{')
    with caplog.at_level(logging.WARNING):
        meta, items = read(tmp_path)
    assert meta['step'] == 1
    np.testing.assert_array_equal(items['params']['a'], tree(1)[0]['a'])
    assert 'is damaged' in caplog.text
    assert (tmp_path / 'checkpoints' / '00000002.damaged').is_dir()


def test_a_flipped_bit_anywhere_is_found(tmp_path):
    save(tmp_path, [1])
    folder = tmp_path / 'checkpoints' / '00000001'
    files = [p for p in folder.rglob('*') if p.is_file() and p.name != 'manifest.json']
    rng = random.Random(0)
    for path in files:
        content = bytearray(path.read_bytes())
        if content:
            at, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
            content[at] ^= bit
            path.write_bytes(content)
            assert manifest.damage(folder), path
            content[at] ^= bit
            path.write_bytes(content)
            assert not manifest.damage(folder)


def test_all_damaged_is_an_error(tmp_path):
    save(tmp_path, [1])
    (tmp_path / 'checkpoints' / '00000001' / 'meta.json').write_text('{}')
    with pytest.raises(errors.InputError, match='every checkpoint in .* is damaged'):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize('odd', ['a file', 'dangling', 'circular', '200', 'checkpoints'])
def test_what_stands_in_the_place_of_checkpoints_is_told_at_once(tmp_path, odd):
    save(tmp_path, [1])
    folder = tmp_path / 'checkpoints'
    if odd == 'a file':
        (folder / '00000200').write_text('')
    elif odd == 'dangling':
        (folder / '00000200').symlink_to('nowhere')
    elif odd == 'circular':
        (folder / '00000200').symlink_to('00000200')
    elif odd == '200':
        (folder / '200').mkdir()
    else:
        folder.rename(tmp_path / 'elsewhere')
        folder.write_text('')
    with pytest.raises(errors.InputError, match='move it away'):
        checkpoint.latest(tmp_path)


def test_manifests_that_are_gone_are_asked_about(tmp_path):
    """What might be whole is never removed; a save that was cut short is."""
    save(tmp_path, [1, 2, 3])
    folders = sorted((tmp_path / 'checkpoints').iterdir())
    for folder in folders:
        (folder / 'manifest.json').unlink()
    for _ in range(2):
        with pytest.raises(errors.InputError, match=r'00000003: .*manifest.json'):
            checkpoint.latest(tmp_path)
        checkpoint.Checkpoints(tmp_path, 2).close()
        assert sorted((tmp_path / 'checkpoints').iterdir()) == folders
    (folders[1] / '.incomplete').touch()
    checkpoint.Checkpoints(tmp_path, 2).close()
    assert sorted((tmp_path / 'checkpoints').iterdir()) == [folders[0], folders[2]]


@pytest.mark.parametrize('content', ['{}', '[]', 'null', '[' * 10**5, '{"meta.json": "x"}'])
def test_a_manifest_that_lists_nothing_is_damaged(tmp_path, content):
    save(tmp_path, [1, 2])
    (tmp_path / 'checkpoints' / '00000002' / 'manifest.json').write_text(content)
    assert checkpoint.latest(tmp_path)[1]['step'] == 1


def test_every_file_must_be_listed(tmp_path):
    save(tmp_path, [1])
    folder = tmp_path / 'checkpoints' / '00000001'
    listed = documents.read(folder / 'manifest.json', dict, '')
    for name in listed:
        documents.write(folder / 'manifest.json', {n: h for n, h in listed.items() if n != name})
        assert manifest.damage(folder), name


def read_beside_a_writer(tmp_path, times: int, which: str) -> None:
    """Reads again and again while checkpoints come and go; of 'best' each is better."""
    model, done = helpers.tiny_model(), threading.Event()
    params = jax.device_get(helpers.params_of(model))
    pretrained.save_workdir(tmp_path / 'run', model, params, None)
    meta, failed = checkpoint.latest(tmp_path / 'run')[1], []
    rule = scores.Rule('eval/x', False) if which else None
    meta['config']['checkpoint']['keep_best'] = rule.score if rule else ''
    begun = threading.Event()

    def write():
        checkpoints = checkpoint.Checkpoints(tmp_path / 'run', 2, keep_steps=(1,), rule=rule)
        try:
            for step in itertools.count(1):
                if done.is_set():
                    break
                checkpoints.save(step, {'params': params}, meta)
                checkpoints.scored(step, {'eval/x': 1 / step})
                checkpoints.wait()
                begun.set()
        except Exception as e:
            failed.append(e)
        finally:
            checkpoints.close()

    writer = threading.Thread(target=write)
    writer.start()
    begun.wait()
    try:
        for _ in range(times):
            source = sources.open(tmp_path / 'run' / which)
            found = pretrained.load(source)
            assert found.model.config.n_vocab == model.config.n_vocab
            jax.tree.map(np.testing.assert_array_equal, found.params, params)
            assert source.identity()
    finally:
        done.set()
        writer.join()
    assert not failed


@pytest.mark.parametrize('which', ['', pytest.param('best', marks=pytest.mark.slow)])
def test_a_reader_beside_a_writer(tmp_path, which):
    read_beside_a_writer(tmp_path, 10, which)


@pytest.mark.slow
@pytest.mark.parametrize('which', ['', 'best'])
def test_two_hundred_readers_beside_a_writer(tmp_path, which):
    read_beside_a_writer(tmp_path, 200, which)


@pytest.mark.parametrize('at', range(6))
def test_a_removal_that_is_killed_is_ended_later(tmp_path, monkeypatch, at):
    """Whichever deletion it does not live to see: nothing of it counts as having been whole."""
    save(tmp_path, [1, 2])
    left = [at]

    def counted(real):
        def called(*args, **kwargs):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return real(*args, **kwargs)

        return called

    for name in ('unlink', 'rmdir'):
        monkeypatch.setattr(pathlib.Path, name, counted(getattr(pathlib.Path, name)))
    monkeypatch.setattr(shutil, 'rmtree', counted(shutil.rmtree))
    with contextlib.suppress(KeyboardInterrupt):
        listing.remove(tmp_path / 'checkpoints' / '00000002')
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path, put_aside=False)[1]['step'] in ((1, 2) if not at else (1,))
    checkpoint.Checkpoints(tmp_path, 2).close()
    names = [path.name for path in sorted((tmp_path / 'checkpoints').iterdir())]
    assert names == (['00000001', '00000002'] if not at else ['00000001'])


def test_a_link_among_checkpoints_is_removed_alone(tmp_path):
    save(tmp_path / 'a', [1])
    save(tmp_path / 'b', [2])
    link = tmp_path / 'b' / 'checkpoints' / '00000001'
    link.symlink_to(tmp_path / 'a' / 'checkpoints' / '00000001')
    listing.remove(link)
    assert not link.is_symlink()
    assert checkpoint.latest(tmp_path / 'a')[1]['step'] == 1


def test_a_score_that_cannot_be_read_is_not_pruned(tmp_path):
    save(tmp_path, [1])
    checkpoints = checkpoint.Checkpoints(tmp_path, 2, rule=scores.Rule('x', False))
    checkpoints.scored(1, {'x': 1.0})
    (tmp_path / 'checkpoints' / '00000001' / 'scores.json').write_text('{"step": 1')
    for step in (2, 3, 4):
        params, rest = tree(step)
        checkpoints.save(step, items(params, rest), {'step': step})
        checkpoints.scored(step, {'x': float(step)})
        checkpoints.wait()
    checkpoints.close()
    names = [path.name for path in sorted((tmp_path / 'checkpoints').iterdir())]
    assert names == ['00000001', '00000002', '00000003', '00000004']


def test_unfinished_ones_are_passed_over_and_written_again(tmp_path):
    save(tmp_path, [1, 2])
    (tmp_path / 'checkpoints' / '00000002' / 'manifest.json').unlink()
    assert checkpoint.latest(tmp_path)[1]['step'] == 1
    save(tmp_path, [2])
    assert checkpoint.latest(tmp_path)[1]['step'] == 2


def test_another_shape_names_the_parameter(tmp_path):
    save(tmp_path, [1])
    folder, meta = checkpoint.latest(tmp_path)
    wide = abstract(tree(width=9)[0])
    with pytest.raises(errors.InputError, match=r"\['params'\]\['a'\] is \(8, 16\) float32 there"):
        checkpoint.restore(folder, meta, params=wide)
    with pytest.raises(errors.InputError, match=r"\['params'\]\['b'\] is absent there"):
        checkpoint.restore(folder, meta, params=abstract(tree()[0] | {'b': jnp.zeros(2)}))


def test_params_alone_on_another_mesh(tmp_path):
    save(tmp_path, [1])
    folder, meta = checkpoint.latest(tmp_path)
    mesh = mesh_lib.Mesh(mesh_lib.Config(1, 8, 1, 1, slices=1, across='data')).mesh
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp'))
    target = {'a': jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=sharding)}
    found = checkpoint.restore(folder, meta, params=target)['params']['a']
    assert found.sharding == sharding
    np.testing.assert_array_equal(found, tree(1)[0]['a'])


def test_a_disk_that_is_full_keeps_what_was_there(tmp_path):
    save(tmp_path, [1])
    checkpoints = checkpoint.Checkpoints(tmp_path, 2)
    big = {'a': jax.random.normal(jax.random.key(0), (1024, 1024))}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limit[1]))
    try:
        whole = 'the checkpoint of step 1 is whole'
        with pytest.raises(checkpoint.SaveError, match=whole) as said:  # noqa: PT012
            checkpoints.save(2, items(big, {'step': jnp.zeros(())}), {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert 'run the same command again' in str(said.value)
    assert checkpoint.latest(tmp_path)[1]['step'] == 1
    checkpoints.save(3, items(*tree(3)), {})
    checkpoints.close()
    assert checkpoint.latest(tmp_path)[1]['step'] == 3
    checkpoint.Checkpoints(tmp_path, 2).close()  # what orbax's other threads wrote meanwhile
    assert not (tmp_path / 'checkpoints' / '00000002').exists()


def test_a_disk_that_will_not_hold_it_is_seen_beforehand(tmp_path, monkeypatch):
    save(tmp_path, [1])
    checkpoints = checkpoint.Checkpoints(tmp_path, 2)
    usage = type('Usage', (), {'free': 1000})
    monkeypatch.setattr(arrays.shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(checkpoint.SaveError, match='no space is left .* make room'):
        checkpoints.save(2, items(*tree(2)), {})
    checkpoints.close()
    assert checkpoint.latest(tmp_path)[1]['step'] == 1


def test_a_step_before_is_one_of_the_newest(tmp_path):
    """What is kept beside them, as the best of long ago, is no place to go back to."""
    checkpoints = checkpoint.Checkpoints(tmp_path, 2, keep_steps=(1, 2))
    for step in (1, 2, 10, 20, 30):
        checkpoints.save(step, items(*tree(step)), {})
    checkpoints.close()
    kept = [1, 2, 20, 30]
    assert sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir()) == kept
    for keep in (1, 2, 3, 4, 5):
        for step in range(40):
            looked_at = kept[-keep:]
            expected = max((s for s in looked_at if s <= step), default=looked_at[0])
            assert checkpoint.step_before(tmp_path, step, keep) == expected
    assert checkpoint.step_before(tmp_path / 'none', 5, 2) == 0


def test_peeking_takes_what_can_be_read(tmp_path):
    save(tmp_path, [1, 2])
    assert checkpoint.peek(tmp_path)['config'] == {'n': 2}
    assert checkpoint.peek(tmp_path, 1)['config'] == {'n': 1}
    assert checkpoint.peek(tmp_path, 3) == checkpoint.peek(tmp_path / 'none') == {}


def test_meta_records_every_shape(tmp_path):
    save(tmp_path, [1])
    meta = json.loads((tmp_path / 'checkpoints' / '00000001' / 'meta.json').read_text())
    assert meta['shapes']["['params']['a']"] == [[8, 16], 'float32']
