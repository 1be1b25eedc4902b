# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: orbax, asynchronous, each whole or not there at all.

CHECKPOINTS/<step>/ holds params/ and rest/ (orbax), meta.json (config, data position, clock,
shapes) and, written last, manifest.json with a sha256 for every file: orbax restores a flipped bit
in silence, so ours are verified before anything is read. One without a manifest is unfinished.
"""

import concurrent.futures
import dataclasses
import errno
import hashlib
import json
import logging
import os
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from gptjax.configs import errors

FOLDER = 'checkpoints'
_MANIFEST, _META = 'manifest.json', 'meta.json'
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Config:
    """The checkpoint section of configs/base.py."""

    every_steps: int
    every_secs: float
    keep: int

    def __post_init__(self) -> None:
        errors.require_between(self, 0, 2**40, 'every_steps', 'every_secs')
        errors.require(self.keep >= 2, f'checkpoint.keep must be at least 2, got {self.keep}')


class SaveError(errors.InputError):
    """A checkpoint could not be written; the ones before it are untouched."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: pathlib.Path, keep: int) -> None:
        self._folder = workdir.absolute() / FOLDER  # orbax takes no relative path
        self._keep = keep
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
        self._pending: concurrent.futures.Future | None = None

    def save(self, step: int, params: Any, rest: Any, meta: dict) -> None:
        """Starts saving; returns as soon as the arrays may be overwritten.

        Raises:
          SaveError: this save could not start, or the one before it failed.
        """
        self.wait()
        target = self._folder / f'{step:08d}'
        meta = meta | {'step': step, 'shapes': _shapes({'params': params, 'rest': rest})}
        try:
            if jax.process_index() == 0:
                shutil.rmtree(target, ignore_errors=True)  # unfinished, from an interrupted run
                target.mkdir(parents=True)
                (target / _META).write_text(json.dumps(meta, indent=1) + '\n', encoding='utf-8')
            self._orbax.save(
                target / 'state',
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params), rest=ocp.args.StandardSave(rest)
                ),
            )
        except Exception as e:
            raise self._failed(target, e) from e
        self._pending = self._thread.submit(self._finish, target)

    def wait(self) -> None:
        """Returns when the last save is whole. Raises SaveError where it failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Waits, then lets go of the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def _finish(self, target: pathlib.Path) -> None:
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                _write_manifest(target)
        except Exception as e:
            raise self._failed(target, e) from e
        if jax.process_index() == 0:
            for old in _finished(self._folder)[: -self._keep]:
                (old / _MANIFEST).unlink()  # first of all: half-deleted is unfinished
                shutil.rmtree(old, ignore_errors=True)

    def _failed(self, target: pathlib.Path, error: Exception) -> SaveError:
        shutil.rmtree(target, ignore_errors=True)
        whole = _finished(self._folder)
        kept = f'the checkpoint of step {int(whole[-1].name)} is whole' if whole else 'none is kept'
        if getattr(error, 'errno', None) == errno.ENOSPC or 'No space left' in str(error):
            reason = 'no space is left on the disk; make room (or lower checkpoint.keep)'
        else:
            reason = ' '.join(str(error).split())[:300] + '; mend that'
        return SaveError(
            f'could not save step {int(target.name)} to {self._folder}, {kept}: {reason} and run the '
            'same command again'
        )


def latest(workdir: str | pathlib.Path) -> tuple[pathlib.Path, dict] | None:
    """The newest checkpoint that verifies, and its meta; None where the run has none.

    A damaged one is named in a warning and put aside (renamed to <step>.damaged).

    Raises:
      InputError: there are checkpoints, and all of them are damaged.
    """
    folder = pathlib.Path(workdir).absolute() / FOLDER
    found = _finished(folder)
    for checkpoint in reversed(found):
        damage = _damage(checkpoint)
        if not damage:
            return checkpoint, json.loads((checkpoint / _META).read_text(encoding='utf-8'))
        aside = checkpoint.with_name(checkpoint.name + '.damaged')
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
        _log.warning(
            'checkpoint %s is damaged (%s); put aside as %s, going on from the one before it',
            checkpoint, damage, aside.name,
        )  # fmt: skip
    if found:
        raise errors.InputError(
            f'every checkpoint in {folder} is damaged; they were put aside as *.damaged. '
            'Restore a copy, or run the same command again to start afresh'
        )
    return None


def restore(checkpoint: pathlib.Path, meta: dict, **items: Any) -> dict[str, Any]:
    """Reads 'params', 'rest' or both as the abstract trees given, wherever they were saved.

    Args:
      checkpoint, meta: from latest().
      items: trees of jax.ShapeDtypeStruct with the shardings wanted here, by item.

    Raises:
      InputError: a shape differs, or a name is missing; the message names it.
    """
    _check_shapes(checkpoint, meta['shapes'], _shapes(items), tuple(items))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        restored = reader.restore(
            checkpoint / 'state',
            args=ocp.args.Composite(
                **{name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
            ),
        )
    return {name: restored[name] for name in items}


def _finished(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p.parent for p in folder.glob(f'[0-9]*/{_MANIFEST}') if p.parent.name.isdigit())


def _files(checkpoint: pathlib.Path) -> list[pathlib.Path]:
    found = (p for p in checkpoint.rglob('*') if p.is_file() and p.name != _MANIFEST)
    return sorted(p for p in found if not p.name.endswith('.partial'))


def _digest(path: pathlib.Path) -> str:
    with path.open('rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def _write_manifest(checkpoint: pathlib.Path) -> None:
    digests = {str(p.relative_to(checkpoint)): _digest(p) for p in _files(checkpoint)}
    partial = checkpoint / (_MANIFEST + '.partial')
    with partial.open('w', encoding='utf-8') as f:
        json.dump(digests, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(checkpoint / _MANIFEST)


def _damage(checkpoint: pathlib.Path) -> str:
    """What is wrong with a finished checkpoint; '' if nothing."""
    try:
        digests = json.loads((checkpoint / _MANIFEST).read_text(encoding='utf-8'))
        for name, digest in digests.items():
            path = checkpoint / name
            if not path.is_file():
                return f'{name} is missing'
            if _digest(path) != digest:
                return f'{name} does not have the bytes that were saved'
    except (ValueError, OSError) as e:
        return f'unreadable: {e}'
    return ''


def _shapes(tree: Any) -> dict[str, list]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p): [list(x.shape), str(x.dtype)] for p, x in leaves}


def _check_shapes(checkpoint: pathlib.Path, saved: dict, wanted: dict, items: tuple) -> None:
    saved = {k: v for k, v in saved.items() if k.startswith(tuple(f"['{i}']" for i in items))}
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise errors.InputError(
                f'checkpoint {checkpoint} does not fit this config: {name} is '
                f'{_said(saved.get(name))} there and {_said(wanted.get(name))} here; use the '
                'config that made it, or another workdir'
            )


def _said(shape: list | None) -> str:
    return 'absent' if shape is None else f'{tuple(shape[0])} {shape[1]}'
