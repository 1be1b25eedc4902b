# SPDX-License-Identifier: Apache-2.0
"""Weights in workdirs of ours: read from their checkpoints, written as one."""

import contextlib
import dataclasses
import functools
import json
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from gptjax.configs import base, errors, upgrade
from gptjax.models import heads, weights
from gptjax.models.published import beside
from gptjax.runtime import checkpoint
from gptjax.runtime import meta as meta_lib
from gptjax.storage import buckets, documents, scratch, unfinished
from gptjax.text import tokenizer as tokenizer_lib

TOKENIZER = 'tokenizer'  # folder below a workdir
_AT_STEP = re.compile(r'(.+)@(\d{1,15})')
_AVERAGE, _BEST = 'average', 'best'  # names below a workdir that stand for other weights of it
_log = logging.getLogger(__name__)


class Workdir(weights.Source):
    """The newest whole checkpoint of a workdir, another one, or the average of its weights."""

    def __init__(
        self, path: pathlib.Path, workdir: pathlib.Path, item: str, which: int | str
    ) -> None:
        """Use find().

        Args:
          item: of the checkpoint: 'params' or 'average'.
          which: the step of the checkpoint, 'newest' or 'best'.

        Raises:
          InputError: no checkpoint is known as the best one, or the workdir is unfinished.
        """
        super().__init__(path)
        unfinished.refuse(workdir)
        self._workdir, self._asked, self._which = workdir, item, which
        self._choose()

    def _choose(self) -> None:
        """Sets the item and the step, which is None for the newest."""
        self._item, self._step = self._asked, None
        if isinstance(self._which, int):
            self._step = self._which
        elif self._which == _BEST:
            best = checkpoint.best(self._workdir)
            if best is None:
                raise errors.InputError(
                    f'{self._workdir} knows no best checkpoint; train with '
                    '--config.checkpoint.keep_best'
                )
            self._item = _AVERAGE if best.is_average else self._asked
            self._step = best.step

    def load(
        self,
        dtype: str | None,
        shardings: weights.Shardings | None,
        progress: weights.Progress,
    ) -> weights.Pretrained:
        while True:
            folder, meta = self._checkpoint
            try:
                return self._read(folder, meta, dtype, shardings, progress)
            except Exception:
                if isinstance(self._which, int) or checkpoint.is_there(folder):
                    raise
                _log.info('%s was removed by its run; reading the %s again', folder, self._which)
                del self._checkpoint

    def _read(
        self,
        folder: buckets.Anywhere,
        meta: dict[str, Any],
        dtype: str | None,
        shardings: weights.Shardings | None,
        progress: weights.Progress,
    ) -> weights.Pretrained:
        model = self._model(meta)
        target = weights.target(model, shardings)
        if self._item == _AVERAGE:
            params = self._average(folder, meta, target)
            dtype = dtype or model.config.param_dtype
        else:
            params = checkpoint.restore(folder, meta, params=target)['params']
        if model.config.family != 'ngram':  # its tables hold logarithms of 0
            weights.check_finite(params, self.path)
        if dtype and not hasattr(model.config, 'param_dtype'):
            raise errors.InputError(
                f'{self.path} holds a model of family {model.config.family!r}: no dtype'
            )
        if dtype and dtype != model.config.param_dtype:
            model = dataclasses.replace(model, config=weights.with_dtype(model.config, dtype))
        if dtype:
            params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
            if dtype == 'float16':
                weights.check_finite(params, self.path)  # not all numbers are numbers there
        progress(sum(x.size for x in jax.tree.leaves(params)))
        _log.info('read step %d of %s', meta['step'], self.path)
        return weights.Pretrained(model, params, self._tokenizer(meta))

    def identity(self) -> str:
        self._checkpoint  # noqa: B018  verified, and its digest known from then on
        return f'{self._item} of {self._digest}'

    @property
    def run(self) -> str:
        """The workdir, as its owner names it."""
        return str(scratch.origin(self._workdir))

    @property
    def checkpoint(self) -> tuple[buckets.Anywhere, dict[str, Any]]:
        """The checkpoint and its meta, verified, of a run's whole state.

        Raises:
          InputError: there is none, or an average of weights is named, which is no state.
        """
        if self._asked == _AVERAGE:
            raise errors.InputError(
                f'{self.path} is an average of weights, not a state of training; name the run, or '
                f'a step of it: {self._workdir}@STEP'
            )
        return self._checkpoint

    @property
    def provenance(self) -> str:
        return self._meta.get('provenance', '')

    @functools.cached_property
    def beside(self) -> dict[str, bytes]:
        kept = beside.read(self._workdir / beside.FOLDER)
        if not kept and (ids := self._meta.get('token_ids')):  # all that was kept once
            kept[beside.GENERATION] = json.dumps(ids).encode()
        return kept

    @property
    def decoding(self) -> dict[str, Any]:
        usual = base.get_config().decode
        own = upgrade.config(self._meta['config'])['decode'] if self._meta else {}
        return {k: v for k, v in own.items() if k in usual and v != usual[k]}

    @property
    def objective(self) -> str:
        config = upgrade.config(self._meta['config']) if self._meta else {}
        return config['train']['objective'] if 'train' in config else super().objective

    @property
    def train_tokens(self) -> int:
        windows = self._meta.get('data', {}).get('windows', 0)
        return windows * self._meta['config']['model']['n_ctx'] if windows else 0

    @property
    def _meta(self) -> dict[str, Any]:
        """The meta of the checkpoint, its arrays not yet verified: empty where there is none."""
        if '_checkpoint' in self.__dict__:
            return self._checkpoint[1]
        return self._peeked

    @functools.cached_property
    def _peeked(self) -> dict[str, Any]:
        return checkpoint.peek(self._workdir, self._step)

    @functools.cached_property
    def _checkpoint(self) -> tuple[buckets.Anywhere, dict[str, Any]]:
        while True:
            self._choose()
            try:
                if self._step is not None:
                    found = checkpoint.at_step(self._workdir, self._step)
                else:
                    found = checkpoint.latest(self._workdir, put_aside=False)
            except errors.InputError:
                best = checkpoint.best(self._workdir) if self._which == _BEST else None
                if best is None or best.step == self._step:
                    raise
                continue  # there is a better one since
            if found is None:
                raise errors.InputError(
                    f'no whole checkpoint in {self._workdir}; train on, or name another workdir'
                )
            with contextlib.suppress(FileNotFoundError):  # else its run removed it meanwhile
                self._digest = checkpoint.digest(found[0])
                return found

    def _average(self, folder: buckets.Anywhere, meta: dict[str, Any], target: Any) -> Any:
        """The averaged parameters, in float32; those that were frozen are their own average."""
        flat = traverse_util.flatten_dict(target)
        averaged = {path: x for path, x in flat.items() if meta_lib.has(meta, _AVERAGE, *path)}
        if not averaged:
            raise errors.InputError(
                f'{self._workdir} keeps no average; it was trained with ema_decay = 0'
            )
        wanted = {path: x.update(dtype=jnp.float32) for path, x in averaged.items()}
        items = {_AVERAGE: traverse_util.unflatten_dict(wanted)}
        if len(averaged) < len(flat):
            items['params'] = target
        found = checkpoint.restore(folder, meta, **items)
        whole = traverse_util.flatten_dict(found.get('params', {}))
        whole |= traverse_util.flatten_dict(found[_AVERAGE])
        return traverse_util.unflatten_dict(whole)

    def _model(self, meta: Mapping[str, Any]) -> heads.LanguageModel:
        section = upgrade.section('model', meta['config']['model'])
        try:
            return heads.build(section, meta.get('head', upgrade.HEAD))
        except errors.UsageError as e:
            raise errors.InputError(
                f'the weights in {self.path} are of a model that is not known here: {e}; use the '
                'version of gptjax that made them'
            ) from e

    def _tokenizer(self, meta: Mapping[str, Any]) -> tokenizer_lib.Tokenizer | None:
        if not meta['tokenizer']:
            return None
        tokenizer = tokenizer_lib.load(self._workdir / TOKENIZER)
        if tokenizer_lib.fingerprint(tokenizer) != meta['tokenizer']:
            raise errors.InputError(
                f'the tokenizer in {self._workdir}/{TOKENIZER} is not the one that the weights '
                'were trained with; put that one back'
            )
        return tokenizer


def find(path: pathlib.Path) -> Workdir | None:
    """The workdir that a path names; None where it names none.

    WORKDIR, WORKDIR/best (by checkpoint.keep_best), WORKDIR@<step>, which is short for
    WORKDIR/checkpoints/<step>; with /average behind any of them, the average of its weights (of
    optim.ema_decay). The best by a score of the average is that average.

    Raises:
      InputError: it has no such checkpoint, or is unfinished.
    """
    item, below = ('average', path.parent) if path.name == _AVERAGE else ('params', path)
    which: int | str
    if scratch.origin(below / checkpoint.FOLDER).is_dir():
        workdir, which = below, 'newest'
    elif below.parent.name == checkpoint.FOLDER and below.name.isdecimal():
        workdir, which = below.parent.parent, int(below.name)
    elif (named := _AT_STEP.fullmatch(below.name)) and scratch.origin(
        below.with_name(named[1]) / checkpoint.FOLDER
    ).is_dir():
        workdir, which = below.with_name(named[1]), int(named[2])
    elif below.name == _BEST and scratch.origin(below.parent / checkpoint.FOLDER).is_dir():
        workdir, which = below.parent, _BEST
    else:
        return None
    return Workdir(path, scratch.small(workdir), item, which)


def save(
    path: pathlib.Path,
    model: heads.LanguageModel,
    params: Any,
    tokenizer: tokenizer_lib.Tokenizer | None,
    note: str = '',
    kept: beside.Files | None = None,
    objective: str = weights.OBJECTIVE,
    made_of: str = '',
) -> None:
    """Writes a workdir whose only checkpoint, of step 0, holds the weights.

    Until all is written it is marked as unfinished; called again, it is written afresh.

    Args:
      note: what its provenance will say.
      kept: what was published beside them.
      objective: what the weights were trained on, as train.objective says it.
      made_of: by which unfinished.is_made_of() knows the folder again.

    Raises:
      InputError: the folder is not empty, or cannot be written.
    """
    path = pathlib.Path(path)
    config = base.get_config()
    config.model = dataclasses.asdict(model.config)
    config.train.objective = objective
    with unfinished.writing(path, made_of):
        fingerprint = ''
        if tokenizer is not None:
            tokenizer_lib.save(tokenizer, path / TOKENIZER)
            fingerprint = tokenizer_lib.fingerprint(tokenizer)
        beside.keep(path / beside.FOLDER, kept or {})
        meta = meta_lib.of(config, heads.name_of(model), fingerprint, note)
        checkpoints = checkpoint.Checkpoints(path, keep=2)
        try:
            checkpoints.save(0, {'params': params}, meta)
        finally:
            checkpoints.close()
        documents.write(path / base.OF_RUN, base.plain(config))
