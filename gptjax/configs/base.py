# SPDX-License-Identifier: Apache-2.0
"""The one complete config tree, composed from gptjax/configs/sections.

Folders that are relative (the `dir` fields, data.sets, data.eval_sets) are taken from --workdir, so
that one folder holds a whole run; what is read from elsewhere is relative to where you stand.
An experiment sets what is there, or replaces the `model` section with one from sizes.py.
"""

import json
import re
from typing import Any

import ml_collections

from gptjax.configs import errors, fields, sizes
from gptjax.configs.fields import fixed, free
from gptjax.configs.sections import corpora, decoding, evaluation, models, training

TOP = {
    'seed': fixed(0, 'of initialisation, dropout and data order; a run is f(commit, config, seed)'),
    'init_from': fixed(
        '', "weights to start from, not --workdir's: a workdir, a published folder or a .gguf file"
    ),
    'init_state': fixed(
        'weights',
        "what of them: weights; or whole, where it is a run's workdir or WORKDIR@STEP: moments, "
        'step and position in the data, too, so that it goes on from there',
        was='weights',
    ),
    'data_dir': free('', "local files of evaluation tasks, as docs/evaluate.md lists; '' = none"),
}
SECTIONS = {
    'corpus': corpora.CORPUS,
    'tokenizer': corpora.TOKENIZER,
    'tokens': corpora.TOKENS,
    'data': corpora.DATA,
    'model': models.GPT,
    'ngram': models.COUNTING,
    'batch': training.BATCH,
    'optim': training.optim('tokens'),
    'train': training.TRAIN,
    'evaluate': evaluation.EVALUATE,
    'suite': evaluation.SUITE,
    'checkpoint': training.CHECKPOINT,
    'mesh': training.MESH,
    'decode': decoding.DECODE,
    'engine': decoding.ENGINE,
}
OF_RUN = 'config.json'  # in a workdir: the whole config of the run
LABELS = 'data.eval_sets'  # a field whose value is a dict: a command line may add to it
_UNIT = re.compile(f'_({"|".join(training.UNITS)})$')


def get_config() -> ml_collections.ConfigDict:
    """The default run: the Python documentation corpus and a tiny GPT.

    Locked, but for the labels of held-out sets: what is there may be set, all else is a mistake.
    """
    config = fields.values(TOP)
    for name, section in SECTIONS.items():
        config[name] = fields.values(section)
    config.model = sizes.model('tiny', n_vocab=4096)
    config.lock()[LABELS].unlock()
    return config


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """A config as its JSON has it: what is written, and compared."""
    return json.loads(config.to_json())


def optim(unit: str, **overrides: Any) -> ml_collections.ConfigDict:
    """An optim section that counts in steps, epochs or episodes instead of tokens.

    >>> optim('steps', warmup_steps=2000).warmup_steps
    2000

    Raises:
      UsageError: the unit is not one of those.
    """
    errors.require(
        unit in training.UNITS, f'no unit {unit!r}; there are: {", ".join(training.UNITS)}'
    )
    section = fields.values(training.optim(unit))
    section.lock().update(overrides)
    return section


def section_of(name: str, family: str = 'gpt') -> fields.Section:
    """The fields of a section; of the model section those of a family.

    Raises:
      UsageError: there is no such family.
    """
    known = ', '.join(sorted(models.FAMILIES))
    errors.require(family in models.FAMILIES, f'model.family = {family!r} is not one of: {known}')
    return models.FAMILIES[family] if name == 'model' else SECTIONS[name]


def field_of(path: str, family: str = 'gpt') -> fields.Field | None:
    """The field at a dotted path, as 'optim.peak_lr'; None where there is none."""
    section, _, name = path.partition('.')
    if not name:
        return TOP.get(section)
    if section not in SECTIONS:
        return None
    known, leaf = section_of(section, family), name.partition('.')[0]
    if leaf in known:
        return known[leaf]
    in_tokens = _UNIT.sub('_tokens', leaf)  # a duration in another unit
    return known[in_tokens] if section == 'optim' and in_tokens in known else None
