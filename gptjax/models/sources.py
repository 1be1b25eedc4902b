# SPDX-License-Identifier: Apache-2.0
"""open(path): where weights come from, asked once.

A workdir of ours, WORKDIR@<step>, WORKDIR/best, WORKDIR/checkpoints/<step>, each with /average
behind it; a published folder; a GGUF file.
"""

import contextlib
import functools
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any

from gptjax.configs import errors
from gptjax.models import weights, workdirs
from gptjax.models.published import beside, families, gguf, llama, stream, tensors
from gptjax.storage import files, scratch, sums, unfinished
from gptjax.text import tokenizer as tokenizer_lib
from gptjax.text import trial

CONFIG = beside.CONFIG
NOTE = 'gptjax_provenance'  # our field of it
_CHANGED = f'convert it again; where it was changed by hand, remove {sums.NAME}'
_WEIGHTS = ('*.safetensors', '*.bin', CONFIG)


def open(path: str | pathlib.Path) -> weights.Source:
    """The source of the weights at a path.

    Raises:
      InputError: there are none, or a conversion that was to write them is unfinished.
    """
    path = scratch.small(scratch.here(path))
    unfinished.refuse(path)
    if path.suffix == '.gguf':
        scratch.need(path)
    if path.suffix == '.gguf' and path.is_file():
        return Gguf(path)
    if workdir := workdirs.find(path):
        return workdir
    if not path.exists():
        raise errors.InputError(
            f'{path} does not exist; name a workdir, a folder or a .gguf file. Nothing is '
            'downloaded here: of a model on the Hub, fetch the folder first, as '
            f'hf download {path} --local-dir {path.name}'
        )
    if (path / CONFIG).is_file() and 'model_type' in (found := _config(path)):
        return Published(scratch.need(path), found)
    raise errors.InputError(
        f'no checkpoint in {path}, and it is no published folder (config.json with a model_type) '
        'nor a .gguf file; train one with python -m gptjax.train, or name another with '
        '--config.init_from'
    )


class Published(weights.Source):
    """A Hugging Face folder of gpt2, openai-gpt, gptj or llama."""

    def __init__(self, path: pathlib.Path, config: dict[str, Any]) -> None:
        """Args: config: config.json."""
        super().__init__(path)
        self._said = config

    def load(
        self,
        dtype: str | None,
        shardings: weights.Shardings | None,
        progress: weights.Progress,
    ) -> weights.Pretrained:
        sums.check(self.path, _CHANGED)
        kind = self._said['model_type']
        if kind not in list(families.ALL):
            known = ', '.join(families.ALL)
            raise errors.InputError(f'{self.path} holds a {kind!r}; there are: {known}')
        with _reading(self.path / CONFIG):
            config = families.ALL[kind].config(self._said)
        stored, tokenizer = tensors.find(self.path), tokenizer_lib.find(self.path)
        form = (dtype, shardings, progress)
        return stream.read(self.path, families.ALL[kind], config, stored, tokenizer, *form)

    def identity(self) -> str:
        found = {file for pattern in _WEIGHTS for file in self.path.glob(pattern)}
        found = sorted(found.union(tokenizer_lib.files_of(self.path)))
        each = '\n'.join(f'{file.name} {files.remembered_sha256(file)}' for file in found)
        return hashlib.sha256(each.encode()).hexdigest()

    @property
    def provenance(self) -> str:
        return str(self._said.get(NOTE, ''))

    @functools.cached_property
    def beside(self) -> dict[str, bytes]:
        return beside.read(self.path)


class Gguf(weights.Source):
    """A GGUF file of the llama architecture."""

    def load(
        self,
        dtype: str | None,
        shardings: weights.Shardings | None,
        progress: weights.Progress,
    ) -> weights.Pretrained:
        with _reading(self.path):
            file = self._file
            config, stored, tokenizer = file.config(), file.tensors(), file.tokenizer()
        form = (dtype, shardings, progress)
        return stream.read(self.path, llama.LLAMA_GGUF, config, stored, tokenizer, *form)

    def identity(self) -> str:
        return files.remembered_sha256(self.path)

    @property
    def provenance(self) -> str:
        return f'{self.path.name}, quantised as {self._file.quantisation()}'

    @property
    def beside(self) -> dict[str, bytes]:
        with _reading(self.path):
            return self._file.beside()

    @functools.cached_property
    def _file(self) -> gguf.File:
        return gguf.File(self.path)  # takes seconds: it reads the vocabulary


def _config(path: pathlib.Path) -> dict[str, Any]:
    with _reading(path / CONFIG):
        return files.json_object(files.content(path / CONFIG), str(path / CONFIG))


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
    """What a damaged file makes libraries raise, as one clear line."""
    try:
        yield
    except errors.UsageError as e:  # of a Config that it makes
        raise errors.InputError(f'{path} describes no model: {e}; mend it') from e
    except errors.InputError as e:
        if str(path) in str(e):
            raise
        raise errors.InputError(f'{path}: {e}') from e
    except KeyError as e:
        raise errors.InputError(f'{path} has no field {e}; fetch it again') from e
    except BaseException as e:
        if not trial.is_of_library(e):
            raise
        raise errors.InputError(f'cannot read {path}: {e}; fetch it again') from e
