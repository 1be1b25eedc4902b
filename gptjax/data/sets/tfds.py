# SPDX-License-Identifier: Apache-2.0
"""Any text data set of TensorFlow Datasets, by name, without TensorFlow.

`path` is a TFDS name, as tiny_shakespeare or wikipedia/20230601.en. A missing data set is
downloaded and prepared here, before any training, into TFDS_DATA_DIR.
"""

from collections.abc import Iterator
from typing import Any

from gptjax.configs import errors
from gptjax.data import documents

_VALID = ('validation', 'valid', 'dev')


def documents_of(path: str, text_field: str) -> Iterator[documents.Document]:
    """Every record's text; the set's own validation split (else its test split) is held out.

    Raises:
      InputError: TFDS is not installed, or does not know or cannot prepare the set.
    """
    builder = _builder(path)
    names = sorted(builder.info.splits)
    held = [n for n in names if n in _VALID] or [n for n in names if n == 'test']
    for name in names:
        if name == 'test' and name not in held:
            continue  # never trained on, and not needed
        split = 'valid' if name in held else 'train' if held else ''
        for record in _records(builder, name, path):
            yield documents.Document(_text(record, text_field, path), split)


def _records(builder: Any, split: str, path: str) -> Iterator[dict]:
    try:
        yield from builder.as_data_source(split)
    except Exception as e:
        raise errors.InputError(f'{path} of TFDS is damaged: {e}; prepare it again') from e


def identity(path: str) -> str:
    """The full name with config and version."""
    return _builder(path).info.full_name


def _builder(path: str) -> Any:
    if not path:
        raise errors.UsageError('the set tfds needs --config.corpus.path=<a TFDS name>')
    try:
        import tensorflow_datasets as tfds
    except ImportError as e:
        raise errors.InputError("the set tfds needs: pip install 'gptjax[data]'") from e
    try:
        builder = tfds.builder(path, file_format='array_record')
        builder.download_and_prepare()
    except Exception as e:  # names, networks, disks: TFDS raises many kinds
        reason = ' '.join(str(e).split())[:300]
        raise errors.InputError(f'TFDS cannot prepare {path!r}: {reason}') from e
    return builder


def _text(record: dict, text_field: str, path: str) -> str:
    if text_field not in record:
        raise errors.InputError(
            f'records of {path} have no field {text_field!r} but: {", ".join(record)}; '
            'name the right one with --config.corpus.text_field'
        )
    text = record[text_field]
    try:
        return text.decode('utf-8') if isinstance(text, bytes) else str(text)
    except UnicodeDecodeError as e:
        raise errors.InputError(f'a record of {path} is not valid UTF-8: {e}') from e
