# SPDX-License-Identifier: Apache-2.0
"""Folders in buckets: paths, what is mirrored, who holds them."""

import json
import os
import pathlib
import random

import pytest

from gptjax.configs import errors
from gptjax.storage import buckets, documents, files, mirror, retry, scratch
from tests import emulator


@pytest.fixture
def folder(storage) -> buckets.Path:
    """An empty one in a bucket of its own."""
    return buckets.of(f'gs://{storage.bucket()}/some/run')


def walked(root):
    """Of a path here as of one in a bucket, from the top."""
    found = root.walk() if isinstance(root, buckets.Path) else os.walk(root)
    return sorted((pathlib.PurePosixPath(folder), *rest) for folder, *rest in found)


def verbs(root) -> list:
    """What each of pathlib's verbs gives."""
    found = []

    def note(do, *kinds):
        try:
            found.append(do())
        except kinds as e:
            found.append(next(kind.__name__ for kind in kinds if isinstance(e, kind)))

    root.mkdir(parents=True, exist_ok=True)
    a, b = root / 'a.txt', root / 'below' / 'b.bin'
    b.parent.mkdir()
    note(lambda: a.write_bytes(b'one'))
    note(lambda: b.write_bytes(b''))
    note(lambda: (root / 'a.txt-beside').write_text('é'))
    note(lambda: [path.exists() for path in (root, a, b, b.parent, root / 'a', root / 'none')])
    note(lambda: [path.is_file() for path in (root, a, b, b.parent, root / 'none')])
    note(lambda: [path.is_dir() for path in (root, a, b, b.parent, root / 'none')])
    note(lambda: sorted(path.name for path in root.iterdir()))
    note(lambda: sorted(path.name for path in root.glob('*.txt*')))
    note(lambda: sorted(p.relative_to(root).as_posix() for p in root.rglob('*') if p.is_file()))
    note(lambda: (a.read_bytes(), (root / 'a.txt-beside').read_text(encoding='utf-8')))
    note(lambda: (root / 'none').read_bytes(), FileNotFoundError)
    note(lambda: (root / 'none').unlink(), FileNotFoundError)
    note(lambda: (root / 'none').unlink(missing_ok=True))
    note(lambda: a.rename(root / 'c.txt').name)
    note(lambda: (a.exists(), (root / 'c.txt').read_bytes()))
    note(lambda: b.parent.rename(root / 'moved').name)
    note(lambda: ((root / 'moved' / 'b.bin').read_bytes(), b.exists()))
    note(lambda: (root / 'touched').touch())
    note(lambda: [(str(p.relative_to(root)), *map(sorted, rest)) for p, *rest in walked(root)])
    note(lambda: (root / 'touched').read_bytes())
    note(lambda: files.remove_tree(root / 'moved'))
    note(lambda: (root / 'moved').exists())
    note(lambda: files.remove_tree(root / 'none'), FileNotFoundError)
    documents.write(root / 'said.json', {'x': 1})
    note(lambda: documents.read(root / 'said.json', dict, ''))
    note(lambda: files.sha256(root / 'said.json'))
    note(lambda: sorted(path.name for path in root.iterdir()))
    return found


def test_a_path_in_a_bucket_does_what_a_local_one_does(folder, tmp_path):
    assert verbs(folder) == verbs(tmp_path / 'run')


@pytest.mark.parametrize(
    ('name', 'said'),
    [
        ('s3://bucket/run', 's3:// cannot'),
        ('az://bucket/run', 'az:// cannot'),
        ('gs://', 'names no bucket'),
        ('gs:///run', 'names no bucket'),
        ('gs://../run', 'names no bucket'),
    ],
)
def test_other_names_are_a_line(name, said):
    with pytest.raises(errors.UsageError, match=said):
        scratch.open_workdir(name)


def test_names_stay_in_their_bucket(storage):
    bucket = storage.bucket()
    assert str(buckets.of(f'gs://{bucket}/a//b/./c/')) == f'gs://{bucket}/a/b/c'
    with pytest.raises(errors.UsageError, match='names no bucket'):
        buckets.of(f'gs://{bucket}/../../x')


def change(path: pathlib.Path, rng: random.Random) -> None:
    """Something that a program does to its files."""
    there = [p for p in sorted(path.rglob('*')) if p.is_file()]
    target = path / rng.choice(['', 'sub', 'sub/deep']) / f'{rng.randrange(6)}.{rng.choice("ab")}'
    match rng.randrange(5):
        case 0 if there:
            rng.choice(there).unlink()
        case 1 if there:
            with rng.choice(there).open('ab') as f:
                f.write(rng.randbytes(30))
        case 2 if there:
            source = rng.choice(there)
            source.replace(source.with_name(f'{rng.randrange(6)}.a'))
        case 3:
            names = [f'{name}.{kind}' for name in range(6) for kind in 'ab']
            listed = [name for name in names if (path / name).is_file()]
            files.replace(path / 'manifest.json', json.dumps(listed))
        case _:
            target.parent.mkdir(parents=True, exist_ok=True)
            files.replace(target, rng.randbytes(rng.choice([0, 10, 5000])))


def contents(path: pathlib.Path) -> dict[str, bytes]:
    found = {p.relative_to(path).as_posix(): p for p in path.rglob('*') if p.is_file()}
    return {name: p.read_bytes() for name, p in found.items()}


@pytest.mark.parametrize('seed', range(8))
def test_what_was_written_is_there_and_comes_back(folder, seed):
    rng, before = random.Random(seed), {}
    for _ in range(3):  # processes
        with emulator.process():
            workdir = pathlib.Path(scratch.open_workdir(str(folder)))
            assert contents(workdir) == before
            mirror.begin()
            for _ in range(12):
                change(workdir, rng)
                if rng.random() < 0.3:
                    mirror.sync()
            before = contents(workdir)
    there = {name: (folder / name).read_bytes() for name in folder.objects()}
    assert there == before


def test_what_commits_comes_behind_what_it_names(folder, storage):
    with emulator.process():
        workdir = pathlib.Path(scratch.open_workdir(str(folder)))
        mirror.begin()
        for name in ('z.bin', 'a.bin', 'manifest.json', 'later.bin'):
            files.replace(workdir / name, name)
        begun = len(storage.requests)
        mirror.sync()
        put = [r.name.rpartition('/')[2] for r in storage.requests[begun:] if r.method == 'POST']
    assert sorted(put[:2]) == ['a.bin', 'z.bin']
    assert put[2:] == ['manifest.json', 'later.bin']


def test_a_file_that_grows_is_not_copied_all_the_time(folder, storage, monkeypatch):
    monkeypatch.setattr(mirror, '_BYTES_PER_SEC', 1)
    with emulator.process():
        workdir = pathlib.Path(scratch.open_workdir(str(folder)))
        mirror.begin()
        (workdir / 'log').write_bytes(bytes(5000))
        mirror.sync()
        (workdir / 'log').write_bytes(bytes(5001))
        mirror._copy(workdir, whole=False)
        assert folder.objects()['log'].size == 5000
        mirror.sync()
        assert folder.objects()['log'].size == 5001


def test_large_folders_come_when_they_are_needed(folder, monkeypatch):
    monkeypatch.setattr(scratch, 'SMALL', 1000)
    (folder / 'tokens' / 'a.bin').write_bytes(bytes(900))
    (folder / 'tokens' / 'b.bin').write_bytes(bytes(900))
    (folder / 'config.json').write_bytes(b'{}')
    (folder / 'checkpoints' / '00000001' / 'state' / 'x').write_bytes(b'x')
    (folder / 'checkpoints' / '00000001' / 'meta.json').write_bytes(b'{}')
    with emulator.process():
        workdir = pathlib.Path(scratch.open_workdir(str(folder)))
        assert sorted(contents(workdir)) == ['checkpoints/00000001/meta.json', 'config.json']
        mirror.begin()
        mirror.sync()  # what is not here is not gone
        scratch.need(workdir / 'tokens')
        assert len(contents(workdir)) == 4
        assert scratch.origin(workdir / 'tokens' / 'a.bin') == folder / 'tokens' / 'a.bin'
        assert str(folder) in scratch.told(f'error: {workdir}/tokens is odd')
    assert len(folder.objects()) == 5


def test_storage_that_fails_for_a_moment_is_asked_again(folder, storage, monkeypatch, caplog):
    monkeypatch.setattr(retry, 'FIRST_SECS', 0.01)
    rng = random.Random(0)
    codes = [429, 503, 500, 502, 504, 408, 401, emulator.RESET] + 8 * [emulator.FORWARD]
    with storage.failing(lambda request: rng.choice(codes)):
        for number in range(20):
            (folder / f'{number}').write_bytes(b'x')
            assert (folder / f'{number}').read_bytes() == b'x'
    assert len(folder.objects()) == 20
    assert caplog.text.count('trying again') <= 1  # a minute


@pytest.mark.parametrize(('code', 'kind'), [(403, PermissionError), (404, FileNotFoundError)])
def test_what_waiting_does_not_mend_is_said_at_once(folder, storage, code, kind):
    begun = len(storage.requests)
    with storage.failing(lambda request: code), pytest.raises(kind, match='gs://'):
        (folder / 'x').write_bytes(b'x')
    assert len(storage.requests) == begun + 1


def test_what_could_not_be_written_is_kept(folder, storage, monkeypatch):
    monkeypatch.setattr(mirror, '_CLOSE_SECS', 0.5)
    emulator.forget()
    workdir = pathlib.Path(scratch.open_workdir(str(folder)))
    mirror.begin()
    (workdir / 'result').write_text('dear')
    said = 'what it lacks is kept in'
    with storage.failing(lambda _: 503), pytest.raises(errors.InputError, match=said) as raised:
        mirror.end()
    emulator.forget()
    kept = pathlib.Path(str(raised.value).partition('kept in ')[2].partition(':')[0])
    assert [p.read_text() for p in kept.rglob('result')] == ['dear']
