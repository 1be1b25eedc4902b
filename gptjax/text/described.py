# SPDX-License-Identifier: Apache-2.0
"""What files beside a vocabulary say of it: which tokens begin and end a text, chat templates.

As Hugging Face transformers reads them: tokenizer_config.json, special_tokens_map.json,
added_tokens.json, chat_template.jinja; of what these do not name, the ids in generation_config.json
and config.json.
"""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import processors

from gptjax.configs import errors
from gptjax.text import files

CONFIG = 'tokenizer_config.json'
_MAP, _ADDED = 'special_tokens_map.json', 'added_tokens.json'
_TEMPLATE, _TEMPLATES = 'chat_template.jinja', 'additional_chat_templates'
_IDS = ('generation_config.json', 'config.json')
ROLES = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')
_MORE = ('additional_special_tokens', 'extra_special_tokens')  # of no role that is known
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Described:
    """What is said of a vocabulary.

    Attributes:
      fields: those of tokenizer_config.json, what the older files say among them.
      ids: 'bos_token' and the like -> id, of config.json: for roles that no field names.
    """

    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ids: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def name(self, role: str) -> str:
        """The token of a role, as 'eos_token'; '' where no field names one."""
        return _name(self.fields.get(role))

    @property
    def special(self) -> list[str]:
        """The special tokens that fields name."""
        found = [_name(token) for role, token in self.fields.items() if role.endswith('_token')]
        for field in _MORE:
            more = self.fields.get(field) or ()
            found += map(_name, more.values() if isinstance(more, Mapping) else more)
        return [name for name in dict.fromkeys(found) if name]

    @property
    def added(self) -> dict[int, tokenizers.AddedToken]:
        """The tokens beside the trained vocabulary, by their ids, in order."""
        found = self.fields.get('added_tokens_decoder') or {}
        return {int(i): _token(found[i]) for i in sorted(found, key=int)}

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The template of chats, or several by their names; None where there is none."""
        found = self.fields.get('chat_template')
        if isinstance(found, list):
            return {each['name']: each['template'] for each in found}
        return found

    def resolved(
        self, names: Mapping[str, int], special: frozenset[int]
    ) -> tuple['Described', dict[str, int]]:
        """The same with every role named that is known, and the ids of those in the vocabulary.

        Args:
          names: of the tokens of the vocabulary that may have a role.
          special: ids; one of config.json that is none of them is of another vocabulary.
        """
        found = {i: name for name, i in names.items()}
        by_id = {role: found[i] for role, i in self.ids.items() if i in special and i in found}
        fields = {role: name for role, name in by_id.items() if not self.name(role)}
        whole = Described({**self.fields, **fields}) if self.fields or fields else self
        roles = {role: names.get(whole.name(role)) for role in whole.fields}
        return whole, {role: i for role, i in roles.items() if i is not None}

    def add_to(self, backend: tokenizers.Tokenizer) -> None:
        """Makes tokens added, and special, that are said to be; warns of those that do not fit."""
        size = backend.get_vocab_size(with_added_tokens=False)
        for i, token in self.added.items():
            known = backend.get_added_tokens_decoder()
            if i in known:
                fits = known[i].content == token.content
            else:
                fits = i in (backend.token_to_id(token.content), max(size, *(k + 1 for k in known)))
                backend.add_tokens([token] if fits else [])
            if not fits:
                _log.warning('the added token %r cannot have id %d: left out', token.content, i)
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        for name in self.special:
            if backend.token_to_id(name) is None:
                _log.warning('the special token %r is not in the vocabulary: left out', name)
            elif name not in known:
                backend.add_special_tokens([tokenizers.AddedToken(name, special=True)])


def frame(backend: tokenizers.Tokenizer, said: Described) -> None:
    """Lets a vocabulary put the tokens around a text that add_bos_token and add_eos_token ask for.

    For one without a post-processor of its own: where there is one, it decides, as in transformers.
    """
    roles = [role for role in ('bos_token', 'eos_token') if said.fields.get(f'add_{role}')]
    names = {role: said.name(role) for role in roles}
    ids = {name: backend.token_to_id(name) for name in names.values() if name}
    if not ids or None in ids.values():
        return
    one = [names['bos_token']] if 'bos_token' in names else []
    last = [names['eos_token']] if 'eos_token' in names else []
    backend.post_processor = processors.TemplateProcessing(
        single=[*one, '$A', *last],
        pair=[*one, '$A', *last, *one, '$B', *last],
        special_tokens=list(ids.items()),
    )


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder that read() reads but for the model's own."""
    found = [folder / name for name in (CONFIG, _MAP, _ADDED, _TEMPLATE)]
    return [file for file in found if file.is_file()] + sorted(
        (folder / _TEMPLATES).glob('*.jinja')
    )


def read(folder: pathlib.Path) -> Described:
    """What the files of a folder say. Raises InputError where one is no JSON object."""
    fields = _object(folder / CONFIG)
    if 'added_tokens_decoder' not in fields:
        fields |= _object(folder / _MAP)
        special = Described(fields).special
        added = {
            str(i): {'content': name, 'special': name in special, 'normalized': name not in special}
            for name, i in _object(folder / _ADDED).items()
        }
        fields |= {'added_tokens_decoder': added} if added else {}
    templates = {path.stem: _text(path) for path in sorted((folder / _TEMPLATES).glob('*.jinja'))}
    if (folder / _TEMPLATE).is_file():
        templates['default'] = _text(folder / _TEMPLATE)
    if templates:
        alone = [*templates] == ['default']
        several = [{'name': name, 'template': text} for name, text in templates.items()]
        fields['chat_template'] = templates['default'] if alone else several
    ids: dict[str, int] = {}
    for name in _IDS:
        said = _object(folder / name)
        for role in ROLES:
            found = said.get(f'{role}_id')
            first = found[0] if isinstance(found, list) and found else found
            if type(first) is int:
                ids.setdefault(role, first)
    return Described(fields, ids)


def _object(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; of no file an empty one."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(_text(path))
        if isinstance(found, dict):
            return found
        wrong: Any = f'a {type(found).__name__}'
    except ValueError as e:
        wrong = e
    raise errors.InputError(f'{path} is no JSON object: {wrong}; mend or remove it')


def _text(path: pathlib.Path) -> str:
    return files.decoded(path.read_bytes())


def _name(token: Any) -> str:
    found = token.get('content') if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else ''


def _token(said: Any) -> tokenizers.AddedToken:
    flags = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')
    given = {flag: said[flag] for flag in flags if flag in said} if isinstance(said, dict) else {}
    return tokenizers.AddedToken(_name(said), **given)
