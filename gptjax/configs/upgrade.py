# SPDX-License-Identifier: Apache-2.0
"""Configs and checkpoints that were written by an earlier gptjax, in today's terms.

A field that did not exist when a config was written takes the value that was in effect then: `was`
in gptjax/configs/sections. What was renamed stands here; what checkpoints of earlier days lack, in
training/step.py. Nothing is ever taken out: workdirs last.
"""

import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gptjax.configs import base, fields

# field that is gone -> (field that took its place, its value from the old one)
RENAMED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    # Microbatches of a batch of any size; how many windows that were depended on the devices.
    'batch.accum_steps': ('batch.device_windows', lambda steps: 0),
    'data.eval_set': ('data.eval_sets', lambda folder: {pathlib.PurePath(folder).name: folder}),
}
HEAD = 'language_model'  # of checkpoints that do not say
# Defaults of decode before `renormalize_logits` was there: nobody had asked for them.
_EARLIER_DECODE = {'max_new_tokens': 64, 'do_sample': False, 'temperature': 1.0}


def config(written: Mapping[str, Any]) -> dict[str, Any]:
    """A whole config as it was written (JSON), with today's fields; lists are tuples again.

    A section that is absent had not been thought of: it is as it is by default. In the others,
    fields without a known earlier value stay absent, unknown ones stay: their owners say so.
    """
    found = _tuples(written)
    for old, (new, value) in RENAMED.items():
        above, _, name = old.partition('.')
        if above in found and name in found[above]:
            found[above][new.partition('.')[2]] = value(found[above].pop(name))
    if 'renormalize_logits' not in found.get('decode', {'renormalize_logits': False}):
        for name, value in _EARLIER_DECODE.items():
            if found['decode'].get(name) == value:
                found['decode'][name] = base.SECTIONS['decode'][name].default
    for name, field in base.TOP.items():
        found.setdefault(name, _then(field))
    for name, fields_ in base.SECTIONS.items():
        if name not in found:
            found[name] = {each: _then(field) for each, field in fields_.items()}
        elif isinstance(found[name], dict):
            found[name] = section(name, found[name])
    return found


def section(name: str, written: Mapping[str, Any]) -> dict[str, Any]:
    """One section, likewise: of the model section the fields of its family."""
    found = _tuples(written)
    family = found.get('family', 'gpt')
    if name == 'model' and family not in base.models.FAMILIES:
        return found
    for field_name, field in base.section_of(name, family).items():
        if field.was is not fields.ALWAYS:
            found.setdefault(field_name, field.was)
    return found


def identity(found: Mapping[str, Any], reads: Iterable[str]) -> dict[str, Any]:
    """What makes a run what it is, by dotted field: of the sections that its program reads.

    Args:
      found: an upgraded config.
      reads: sections and fields of the top level.
    """
    made_by = {}
    for name in reads:
        value = found[name]
        section_ = value if isinstance(value, dict) else {}
        paths = [f'{name}.{leaf}' for leaf in section_] or [name]
        for path in paths:
            field = base.field_of(path, section_.get('family', 'gpt'))
            if field is None or field.makes_run:
                made_by[path] = section_[path.partition('.')[2]] if section_ else value
    return made_by


def _then(field: fields.Field) -> Any:
    """The value in effect before a field's section existed."""
    return field.default if field.was is fields.ALWAYS else field.was


def _tuples(value: Any) -> Any:
    """JSON knows lists only."""
    if isinstance(value, Mapping):
        return {name: _tuples(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_tuples(part) for part in value)
    return value
