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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import processors

from gptjax.configs import errors
from gptjax.storage import files

CONFIG = 'tokenizer_config.json'
_MAP, _ADDED = 'special_tokens_map.json', 'added_tokens.json'
_TEMPLATE, _TEMPLATES = 'chat_template.jinja', 'additional_chat_templates'
_IDS = ('generation_config.json', 'config.json')
ROLES = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')
_FLAGS = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')  # of an added token
_KEPT_IDS = 'gptjax_token_ids'  # a field of ours: where the model's config.json is no more beside
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
    def names(self) -> dict[str, str]:
        """Role, or whatever it is called -> token, of all special tokens that fields name."""
        found = {role: self.name(role) for role in self.fields if role.endswith('_token')}
        for field in _MORE:
            more = self.fields.get(field) or ()
            pairs = more if isinstance(more, Mapping) else dict(enumerate(more))
            found |= {str(name): _name(token) for name, token in pairs.items()}
        return {role: name for role, name in found.items() if name}

    @property
    def special(self) -> list[str]:
        """The special tokens that fields name."""
        return [*dict.fromkeys(self.names.values())]

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

    def roles(self, names: Mapping[str, int], special: frozenset[int]) -> dict[str, int]:
        """Role -> the id of its token, of those in the vocabulary.

        Args:
          names: of the tokens of the vocabulary that may have a role.
          special: ids; one of config.json that is none of them is of another vocabulary.
        """
        found = {role: i for role, i in self.ids.items() if i in special}
        named = {role: names.get(self.name(role)) for role in ROLES}
        return found | {role: i for role, i in named.items() if i is not None}

    def add_to(self, backend: tokenizers.Tokenizer) -> None:
        """Makes tokens added, and special, that are said to be; warns of those that do not fit."""
        size = backend.get_vocab_size(with_added_tokens=False)
        known = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
        end = max([size, *(i + 1 for i in known)])
        new: dict[str, tuple[int, tokenizers.AddedToken]] = {}
        for i, token in self.added.items():
            text = token.content
            if i in known:
                fits = known[i] == text
            else:
                fits = i in (new[text][0] if text in new else backend.token_to_id(text), end)
                if fits:
                    new[text], known[i], end = (i, token), text, max(end, i + 1)
            if not fits:
                _log.warning('the added token %r cannot have id %d: left out', text, i)
        backend.add_tokens([token for _, token in new.values()])  # at once: each call takes long
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        special = []
        for name in self.special:
            if backend.token_to_id(name) is None:
                _log.warning('the special token %r is not in the vocabulary: left out', name)
            elif name not in known:
                special.append(tokenizers.AddedToken(name, special=True))
        backend.add_special_tokens(special)


def frame(backend: tokenizers.Tokenizer, said: Described) -> None:
    """Lets a vocabulary put the tokens around a text that add_bos_token and add_eos_token ask for.

    For one without a post-processor of its own: where there is one, it decides, as in transformers.
    """
    roles = ('bos_token', 'eos_token')
    ids = {role: backend.token_to_id(said.name(role)) for role in roles}
    asked = {r: said.name(r) for r in roles if said.fields.get(f'add_{r}') and ids[r] is not None}
    if not asked:
        return
    one, last = ([asked[role]] if role in asked else [] for role in roles)
    backend.post_processor = processors.TemplateProcessing(
        single=[*one, '$A', *last],
        pair=[*one, '$A', *last, *one, '$B', *last],
        special_tokens=list({name: ids[role] for role, name in asked.items()}.items()),
    )


def check_frame(said: Described, before: Sequence[int], after: Sequence[int]) -> None:
    """Tells what add_bos_token and add_eos_token say of a text, and does not happen."""
    for role, found in (('bos_token', before), ('eos_token', after)):
        asked = said.fields.get(f'add_{role}')
        if asked is not None and bool(asked) != bool(found):
            _log.warning(
                '%s says add_%s = %s, but the tokenizer puts %s: that decides, as in transformers',
                CONFIG,
                role,
                json.dumps(bool(asked)),
                'one' if found else 'none',
            )
    if after:
        _log.warning('the tokenizer ends every text with %s: prompts are not, they go on', after)


def templates(found: Mapping[str, str]) -> str | list[dict[str, str]]:
    """Chat templates by their names as tokenizer_config.json has them."""
    if [*found] == ['default']:
        return found['default']
    return [{'name': name, 'template': text} for name, text in found.items()]


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder that read() reads but for the model's own."""
    found = [folder / name for name in (CONFIG, _MAP, _ADDED, _TEMPLATE)]
    return [*filter(pathlib.Path.is_file, found), *_templates_of(folder)]


def read(folder: pathlib.Path) -> Described:
    """What the files of a folder say. Raises InputError where one says it in no known form."""
    fields = _object(folder / CONFIG, _check)
    ids = fields.pop(_KEPT_IDS, {})
    if 'added_tokens_decoder' not in fields:
        fields |= _object(folder / _MAP, _check)
        special = Described(fields).special
        added = {
            str(i): {'content': name, 'special': name in special, 'normalized': name not in special}
            for name, i in _object(folder / _ADDED, _check_added).items()
        }
        fields |= {'added_tokens_decoder': added} if added else {}
    found = {path.stem: _text(path) for path in _templates_of(folder)}
    if (folder / _TEMPLATE).is_file():
        found['default'] = _text(folder / _TEMPLATE)
    fields |= {'chat_template': templates(found)} if found else {}
    for name in _IDS:
        said = _object(folder / name)
        for role in ROLES:
            given = said.get(f'{role}_id')
            first = given[0] if isinstance(given, list) and given else given
            if type(first) is int:
                ids.setdefault(role, first)
    return Described(fields, ids)


def written(said: Described) -> bytes:
    """A tokenizer_config.json of which read() makes the same; empty where nothing is said."""
    whole = {**said.fields, **({_KEPT_IDS: dict(said.ids)} if said.ids else {})}
    return (json.dumps(whole, indent=2) + '\n').encode() if whole else b''


def _templates_of(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in sorted((folder / _TEMPLATES).glob('*.jinja')) if path.is_file()]


def _check(fields: Mapping[str, Any]) -> None:
    """Raises ValueError where a field that is read has a value of no known form."""
    for field, value in fields.items():
        if value is None or isinstance(value, bool):
            continue
        if field in _FORMS or field.endswith('_token'):
            right, form = _FORMS.get(field, (_name, 'a token'))
            if not right(value):
                raise ValueError(f'{field} = {json.dumps(value)[:80]} is not {form}')


def _are_names(value: Any) -> bool:
    each = value.values() if isinstance(value, Mapping) else value
    return isinstance(value, (list, Mapping)) and all(map(_name, each))


def _are_tokens(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and all(map(str.isdecimal, value))
        and all(isinstance(token, Mapping) and _name(token) for token in value.values())
        and all(isinstance(t.get(f, True), bool) for t in value.values() for f in _FLAGS)
    )


def _are_templates(value: Any) -> bool:
    if isinstance(value, list):
        return all(
            isinstance(each, Mapping)
            and isinstance(each.get('name'), str)
            and isinstance(each.get('template'), str)
            for each in value
        )
    each = value.values() if isinstance(value, Mapping) else [value]
    return all(isinstance(text, str) for text in each)


def _are_ids(value: Any) -> bool:
    return isinstance(value, Mapping) and all(type(i) is int for i in value.values())


_FORMS = {
    _KEPT_IDS: (_are_ids, 'a table of ids'),
    'added_tokens_decoder': (_are_tokens, 'a table of tokens by their ids'),
    'chat_template': (_are_templates, 'a template or a list of named ones'),
    **dict.fromkeys(_MORE, (_are_names, 'a list of tokens')),
}


def _check_added(fields: Mapping[str, Any]) -> None:
    for name, i in fields.items():
        if type(i) is not int or i < 0 or not name:
            raise ValueError(f'{json.dumps(name)}: {json.dumps(i)[:80]} is no id of a token')


def _object(
    path: pathlib.Path, check: Callable[[Mapping[str, Any]], None] = lambda fields: None
) -> dict[str, Any]:
    """A JSON object; of no file an empty one."""
    if not path.is_file():
        return {}
    found = files.json_object(files.content(path), str(path))
    try:
        check(found)
    except ValueError as e:
        raise errors.InputError(f'{path}: {e}; mend or remove it') from e
    return found


def _text(path: pathlib.Path) -> str:
    try:
        return files.decoded(files.content(path))
    except UnicodeDecodeError as e:
        raise errors.InputError(f'{path} is no text: {e}; mend or remove it') from e


def _name(token: Any) -> str:
    found = token.get('content') if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else ''


def _token(said: Mapping[str, Any]) -> tokenizers.AddedToken:
    given = {flag: said[flag] for flag in _FLAGS if flag in said}
    return tokenizers.AddedToken(_name(said), **given)


def variant(end: int, usual_end: int, added: Mapping[int, str] | None = None) -> str:
    """What a fingerprint holds beside the vocabulary's files."""
    parts = [f'end_of_text\0{end}'] if end != usual_end else []
    return '\0'.join([*parts, *(f'{i}\0{name}' for i, name in sorted((added or {}).items()))])
