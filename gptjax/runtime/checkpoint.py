# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: orbax, asynchronous, each whole or not there at all.

CHECKPOINTS/<step>/ holds state/ with params/, rest/, average/ (orbax), meta.json (config, data
position, clock, shapes) and, written last, manifest.json with a sha256 for every file: orbax
restores a flipped bit in silence, so ours are verified before anything is read. What a checkpoint
scored is added to it as scores.json.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import json
import logging
import math
import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import orbax.checkpoint as ocp

from gptjax.configs import errors, upgrade
from gptjax.runtime import arrays, hosts, listing, manifest
from gptjax.runtime import meta as meta_lib
from gptjax.runtime import scores as scores_lib
from gptjax.storage import buckets, files, leases, mirror, retry

FOLDER = listing.FOLDER
_AT_ONCE_SECS = 5.0  # what training may wait for storage that does not answer
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Config:
    """The checkpoint section of configs/base.py."""

    every_steps: int
    every_secs: float
    keep: int
    keep_steps: tuple[int, ...]
    keep_best: str
    best_is: Literal['lowest', 'highest']
    give_up_minutes: float

    def __post_init__(self) -> None:
        errors.require_between(self, 0, 2**40, 'every_steps', 'every_secs', 'give_up_minutes')
        errors.require(self.keep >= 2, f'checkpoint.keep must be at least 2, got {self.keep}')
        errors.require(
            all(isinstance(step, int) and step > 0 for step in self.keep_steps),
            f'checkpoint.keep_steps are numbers above 0, got {self.keep_steps}',
        )
        errors.require_choice(self, 'best_is', ('lowest', 'highest'))

    @property
    def rule(self) -> scores_lib.Rule | None:
        """What makes a checkpoint the best; None where none is kept for that."""
        return (
            scores_lib.Rule(self.keep_best, self.best_is == 'highest') if self.keep_best else None
        )


class Best(NamedTuple):
    """The best checkpoint of a run so far, and the score that says so."""

    step: int
    name: str
    value: float

    @property
    def is_average(self) -> bool:
        """Whether the average of the weights has that score."""
        return self.name.startswith(scores_lib.OF_AVERAGE)


class SaveError(errors.InputError):
    """A checkpoint could not be written; the ones before it are untouched."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        workdir: pathlib.Path,
        keep: int,
        keep_steps: Collection[int] = (),
        rule: scores_lib.Rule | None = None,
    ) -> None:
        """Args: keep: newest ones kept, beside those of keep_steps and the best by `rule`."""
        self._folder = listing.of(workdir)
        self._keep, self._keep_steps, self._rule = keep, keep_steps, rule
        self._orbax = ocp.AsyncCheckpointer(arrays.handler(self._folder))
        self._thread = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
        self._pending: concurrent.futures.Future | None = None
        if jax.process_index() == 0:
            listing.clear(self._folder)

    def save(self, step: int, items: dict[str, Any], meta: dict) -> None:
        """Starts saving; returns as soon as the arrays may be overwritten.

        Args:
          items: trees of arrays: 'params'; of a run also 'rest', what training needs beside them,
            and 'average' where one is kept.

        Raises:
          SaveError: this save could not start, or the one before it failed.
        """
        target = listing.at(self._folder, step)
        meta = meta | {'step': step, 'shapes': meta_lib.shapes(items)}
        error = None
        try:
            self.wait()
            with retry.patience(_AT_ONCE_SECS):
                self._begin(target, items, meta)
        except Exception as e:
            error = e
        (failed,) = hosts.agreed(error is not None, what=f'saving step {step}')
        if failed:  # else the others would wait for this host
            error = error or OSError('another host cannot write there')
            if isinstance(error, SaveError | leases.Lost):
                raise error
            raise self._failed(target, error) from error
        try:
            with retry.patience(_AT_ONCE_SECS):
                trees = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
                self._orbax.save(target / 'state', args=ocp.args.Composite(**trees))
        except Exception as e:
            raise self._failed(target, e) from e
        self._pending = self._thread.submit(self._finish, target)

    def done(self) -> bool:
        """Whether a save was started, has ended, and wait() was not called since."""
        return self._pending is not None and self._pending.done()

    def ended(self, secs: float) -> bool:
        """Whether no save is under way, after waiting for one so long at most."""
        if self._pending is not None:
            concurrent.futures.wait([self._pending], secs)
        return self._pending is None or self._pending.done()

    def drop_after(self, step: int) -> None:
        """Removes checkpoints of later steps, for a run that goes back."""
        self.wait()
        if jax.process_index() == 0:
            for later in (p for p in listing.finished(self._folder) if int(p.name) > step):
                listing.remove(later)

    def is_best(self, scores: Mapping[str, float]) -> bool:
        """Whether a checkpoint with these scores would be better than all that are kept."""
        if not self._rule:
            return False
        better = False
        try:
            with retry.patience(_AT_ONCE_SECS):
                found = scores_lib.best(listing.finished(self._folder), self._rule)
                before = -math.inf if found is None else self._rule.worth(scores_lib.read(found))
            better = self._rule.worth(scores) > before
        except OSError as e:
            _log.warning('whether this is the best checkpoint so far is not known: %s', e)
        return bool(hosts.first_says(better))

    def scored(self, step: int, scores: Mapping[str, float]) -> None:
        """Keeps what a checkpoint scored, which may still be being saved."""
        if jax.process_index() == 0:
            with retry.patience(_AT_ONCE_SECS):
                scores_lib.write(listing.at(self._folder, step), scores)

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

    def _begin(self, target: buckets.Anywhere, items: dict[str, Any], meta: dict) -> None:
        leases.check()
        self._folder.mkdir(parents=True, exist_ok=True)
        arrays.check_space(self._folder, items)
        if jax.process_index() == 0:
            if target in listing.finished(self._folder):
                raise FileExistsError(f'{target} is there already')
            listing.begin(target)
            files.replace(target / meta_lib.NAME, json.dumps(meta, indent=1) + '\n')

    def _finish(self, target: buckets.Anywhere) -> None:
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                mirror.sync()  # what was logged up to here is there before it commits
                leases.check()
                listing.finish(target)
        except leases.Lost:
            raise
        except Exception as e:
            raise self._failed(target, e) from e
        if jax.process_index() == 0:
            try:
                self._prune()
            except OSError as e:
                _log.warning('old checkpoints are not removed now: %s', e)

    def _prune(self) -> None:
        """Removes those that nothing asks to keep."""
        whole = listing.finished(self._folder)
        best_ = scores_lib.best(whole, self._rule) if self._rule else None
        for old in whole[: -self._keep]:
            wanted = int(old.name) in self._keep_steps or old == best_
            if not wanted and (self._rule is None or scores_lib.is_readable(old)):
                listing.remove(old)

    def _failed(self, target: buckets.Anywhere, error: Exception) -> SaveError:
        kept = 'those before it are whole'
        with contextlib.suppress(OSError, leases.Lost), retry.patience(_AT_ONCE_SECS):
            if jax.process_index() == 0:
                leases.check()
                listing.drop(target)  # orbax may write on: __init__ clears that
            whole = listing.finished(self._folder)
            newest = int(whole[-1].name) if whole else None
            kept = 'none is kept' if newest is None else f'the checkpoint of step {newest} is whole'
        if getattr(error, 'errno', None) == errno.ENOSPC or 'No space left' in str(error):
            reason = 'no space is left on the disk; make room (or lower checkpoint.keep)'
        else:
            reason = ' '.join(str(error).split())[:300] + '; mend that'
        return SaveError(
            f'could not save step {int(target.name)} to {self._folder}, {kept}: {reason} and run '
            'the same command again'
        )


def latest(
    workdir: str | pathlib.Path, put_aside: bool = True, until_step: int = 2**62
) -> tuple[buckets.Anywhere, dict] | None:
    """The newest checkpoint that verifies, and its meta; None where the run has none.

    Those of steps beyond `until_step` are passed over. On several hosts the first one says which
    there are, and each hashes its share of the files.

    A damaged one is named in a warning and, unless the run is not ours to change, put aside:
    renamed to <step>.damaged. One that its run removes meanwhile is none.

    Raises:
      InputError: there are checkpoints, and all of them are damaged; none is put aside then.
    """
    (listing.check if put_aside else listing.warn)(workdir)
    folder = listing.of(workdir)
    steps = [int(p.name) for p in listing.candidates(folder) if int(p.name) <= until_step]
    number, damaged = hosts.first_says(len(steps), f'the checkpoints in {folder}'), []
    for place in range(number - 1, -1, -1):
        step = hosts.first_says(steps[place] if place < len(steps) else -1)
        checkpoint = listing.at(folder, step)
        damage, meta = _verified(checkpoint)
        if not hosts.agreed(bool(damage), what=f'verifying {checkpoint}')[0]:
            for one, why in damaged:
                _log.warning('checkpoint %s is damaged (%s)%s', one, why, _aside(one, put_aside))
            return checkpoint, meta
        if hosts.agreed(listing.is_removed(checkpoint))[0]:
            return latest(workdir, put_aside, until_step)
        damaged.append((checkpoint, damage or 'says another host'))
    if number:
        said = ', '.join(f'{one.name}: {why}' for one, why in damaged)
        raise errors.InputError(
            f'every checkpoint in {folder} is damaged ({said}); put a copy back'
            + (', or remove that folder to start afresh' if put_aside else '')
        )
    return None


def _verified(checkpoint: buckets.Anywhere) -> tuple[str, dict]:
    """What is wrong with a checkpoint, and its meta where nothing is."""
    damage = manifest.damage(checkpoint)
    try:
        return damage, {} if damage else manifest.read_meta(checkpoint)
    except (OSError, ValueError) as e:  # removed since
        return str(e), {}


def _aside(damaged: buckets.Anywhere, put_aside: bool) -> str:
    """Puts a damaged checkpoint aside where it is ours to change, and says so."""
    if not put_aside:
        return '; an older one is read'
    name = f'{damaged.name}.damaged'
    if jax.process_index() == 0:
        listing.put_aside(damaged)
    return f'; going on from an older one, this one put aside as {name}'


def at_step(workdir: str | pathlib.Path, step: int) -> tuple[buckets.Anywhere, dict]:
    """The checkpoint of one step, verified, and its meta.

    Raises:
      InputError: there is none, or it is damaged.
    """
    checkpoint = listing.at(listing.of(workdir), step)
    if not is_there(checkpoint):
        kept = ', '.join(str(int(each.name)) for each in listing.finished(listing.of(workdir)))
        raise errors.InputError(f'{workdir} has no checkpoint of step {step}; of: {kept or "none"}')
    damage, meta = _verified(checkpoint)
    if hosts.agreed(bool(damage), what=f'verifying {checkpoint}')[0]:
        raise errors.InputError(f'checkpoint {checkpoint} is damaged ({damage}); use another one')
    return checkpoint, meta


def is_there(checkpoint: buckets.Anywhere) -> bool:
    """Whether a checkpoint is finished, and its run has not removed it."""
    return (checkpoint / manifest.NAME).exists()


def best(workdir: str | pathlib.Path) -> Best | None:
    """The best checkpoint by the run's checkpoint.keep_best; None where none is known."""
    newest = peek(workdir)
    said = upgrade.config(newest['config'])['checkpoint'] if 'config' in newest else {}
    if not said or not said['keep_best']:
        return None
    rule = scores_lib.Rule(said['keep_best'], said['best_is'] == 'highest')
    found = scores_lib.best(listing.finished(listing.of(workdir)), rule)
    if found is None:
        return None
    return Best(int(found.name), rule.score, scores_lib.read(found)[rule.score])


def step_before(workdir: str | pathlib.Path, step: int, keep: int) -> int:
    """The step of the newest checkpoint up to `step`, else of the oldest; 0 where there is none.

    Args:
      keep: so many newest ones are looked at; what is kept beside them may be far back.
    """
    found = listing.finished(listing.of(workdir))[-keep:]
    steps = [int(p.name) for p in found]
    return max((s for s in steps if s <= step), default=min(steps, default=0))


def peek(workdir: str | pathlib.Path, step: int | None = None) -> dict:
    """The meta of a checkpoint that is whole itself; its arrays are not verified.

    Args:
      step: of the checkpoint; None = the newest.

    Returns:
      an empty dict where there is none that can be read: latest() and at_step() say why.
    """
    found = listing.finished(listing.of(workdir))
    for checkpoint in reversed(found):
        if step in (None, int(checkpoint.name)):
            with contextlib.suppress(OSError, ValueError):
                return manifest.read_meta(checkpoint)
    return {}


def digest(checkpoint: buckets.Anywhere) -> str:
    """The hash of a finished checkpoint's manifest, and so of every file: other weights differ."""
    return files.sha256(checkpoint / manifest.NAME)


def restore(
    checkpoint: buckets.Anywhere,
    meta: dict,
    may_lack: Mapping[str, Iterable[str]] | None = None,
    **items: Any,
) -> dict[str, Any]:
    """Reads 'params', 'rest', 'average' as the abstract trees given, wherever they were saved.

    Args:
      checkpoint, meta: from latest().
      may_lack: of items, names at their top that came later: left out where they are absent.
      items: trees of jax.ShapeDtypeStruct with the shardings wanted here, by item.

    Raises:
      InputError: a shape differs, or a name is missing; the message names it.
    """
    for item, names in (may_lack or {}).items():
        absent = {
            n for n in names if not any(k.startswith(meta_lib.key(item, n)) for k in meta['shapes'])
        }
        items[item] = {n: tree for n, tree in items[item].items() if n not in absent}
    meta_lib.check(checkpoint, meta['shapes'], meta_lib.shapes(items), tuple(items))

    def read() -> Any:
        try:
            return arrays.restore(checkpoint / 'state', arrays.parts(items))
        except Exception as e:
            if is_there(checkpoint):
                raise
            raise errors.InputError(f'{checkpoint} was removed while it was read') from e

    reading = functools.partial(retry.call, 'reading the checkpoint', read)
    restored = hosts.together(reading, f'reading {checkpoint}')
    return arrays.whole({name: restored[name] for name in items}, items)
