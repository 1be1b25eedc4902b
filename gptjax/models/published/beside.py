# SPDX-License-Identifier: Apache-2.0
"""What a published folder holds beside tensors and vocabulary: it travels with the weights.

generation_config.json, tokenizer_config.json with its kin, chat templates, the model card, the
licence. In a workdir it stands as it was, in published/.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from gptjax.storage import files, sums

CONFIG = 'config.json'
GENERATION = 'generation_config.json'
FOLDER = 'published'  # below a workdir
Files = Mapping[str, bytes]  # path below the folder -> content

_REMEDY = f'put it back; where it was changed by hand, remove {sums.NAME}'
_SUMMED = ('.json', '.jinja')
_TEMPLATES = 'additional_chat_templates'
_LARGEST = 2**20  # bytes; what is larger stays behind
# Endings and names of tensors and vocabularies, which are read for what they are.
_TENSORS = ('.safetensors', '.bin', '.pt', '.pth', '.ckpt', '.h5', '.msgpack', '.onnx', '.gguf')
_TENSORS += ('.npy', '.npz', '.ot', '.index.json')
_VOCABULARY = ('tokenizer.json', 'vocab.json', 'merges.txt', 'vocab.txt', 'encoder.json')
_VOCABULARY += ('vocab.bpe', 'encoder_bpe_40000.json', 'vocab_40000.bpe', 'gpt1.json', 'bytes.json')
# Fields of config.json that say again what ours say, and would contradict them after a change.
_SAID_AGAIN = ('dtype', 'torch_dtype', 'rope_parameters', 'rope_scaling', 'rope_theta', 'n_ctx')
_SAID_AGAIN += ('quantization_config',)


def read(folder: pathlib.Path) -> dict[str, bytes]:
    """The files beside tensors and vocabulary; of no folder none.

    Raises:
      InputError: one is not what SHA256SUMS says.
    """
    sums.check(folder, _REMEDY, lambda name: name.endswith(_SUMMED))
    return {name: path.read_bytes() for name, path in _others(folder).items() if _fits(path)}


def left_behind(folder: pathlib.Path) -> list[str]:
    """The names of those that read() does not take: large ones, and what stands in subfolders."""
    return [name for name, path in _others(folder).items() if not _fits(path)]


def _others(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    found = {}
    for path in sorted([*folder.glob('*'), *folder.glob(f'{_TEMPLATES}/*.jinja')]):
        name = path.relative_to(folder).as_posix()
        tensors = name.lower().endswith((*_TENSORS, '.model')) or name in _VOCABULARY
        tensors |= name == sums.NAME
        if not tensors and not name.startswith('.') and name != _TEMPLATES:
            found[name] = path
    return found


def _fits(path: pathlib.Path) -> bool:
    return path.is_file() and path.stat().st_size <= _LARGEST


def write(folder: pathlib.Path, kept: Files) -> None:
    """Writes files into a folder, made where missing."""
    for name, content in kept.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        files.replace(folder / name, content)


def keep(folder: pathlib.Path, kept: Files) -> None:
    """Writes them into a folder of a workdir, finished by their sums."""
    if kept:
        write(folder, kept)
        sums.write(folder, summed(kept))


def summed(kept: Files) -> list[str]:
    """The names of those that have a sum: cards and licences, which people mend, have none."""
    return [name for name in kept if name.endswith(_SUMMED)]


def fields(kept: Files, name: str) -> dict[str, Any]:
    """A JSON object among them; empty where it is absent.

    Raises:
      InputError: it is none.
    """
    return files.json_object(kept[name], name) if name in kept else {}


def config(kept: Files, ours: Mapping[str, Any], ends: Mapping[str, Any]) -> dict[str, Any]:
    """config.json: our fields, and of the published one those that ours do not say.

    Args:
      ends: ids of tokens, for a model that was published without any.
    """
    theirs = fields(kept, CONFIG)
    same = theirs.get('model_type') == ours['model_type']
    more = {k: v for k, v in theirs.items() if same and k not in _SAID_AGAIN}
    ids = {k: v for k, v in theirs.items() if k.endswith('_token_id')}
    if not ids:
        said = fields(kept, GENERATION)
        ids = {k: said[k] for k in ('bos_token_id', 'eos_token_id', 'pad_token_id') if k in said}
    return {**more, **(ids or ends), **ours}
