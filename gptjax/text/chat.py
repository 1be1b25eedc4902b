# SPDX-License-Identifier: Apache-2.0
"""Messages as the text that a model was trained to read: its chat template, equal to transformers'.

A template is code from whoever published the weights: jinja2's immutable sandbox runs it.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import ext, nodes, parser, sandbox

from gptjax.configs import errors
from gptjax.text import described, trial

Message = Mapping[str, Any]  # role: system, user, assistant; content
_MARK = '\ue000end of the last message\ue000 '  # its space shows whether the template trims


def render(
    said: described.Described,
    messages: Sequence[Message],
    name: str = '',
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **more: Any,
) -> str:
    """The text of messages.

    Args:
      said: what was published beside the vocabulary, the template and names of tokens among it.
      name: of the template, where there are several; '' = 'default', or 'tool_use' for tools. A
        template itself will do.
      add_generation_prompt: end with the beginning of an answer.
      continue_final_message: end in the last message, which is the beginning of the answer.
      more: what else the template reads, as tools.

    Raises:
      InputError: there is no template, or it refuses these messages.
    """
    template = select(said, name, bool(more.get('tools')))
    given = [{k: v for k, v in one.items() if v is not None} for one in messages]
    errors.require(bool(given), 'a chat has a message or more')
    last = given[-1].get('content')
    if continue_final_message:
        errors.require(isinstance(last, str), 'the message to go on with has no text')
        given[-1]['content'] = last + _MARK
        add_generation_prompt = False
    tools = {'tools': None, 'documents': None}
    if template != name:  # not the caller's own
        trial.try_template(template)
    try:
        more = {**said.names, **tools, **more}
        text = rendered(template, given, add_generation_prompt, **more)
    except Exception as e:  # a template is code: it may raise anything
        raise errors.InputError(f'the chat template refuses these messages: {e}') from e
    if not continue_final_message:
        return text
    if _MARK.strip() not in text or last.strip() not in text:
        raise errors.InputError('the chat template changes the message that it should end with')
    before, mark, _ = text.rpartition(_MARK)
    before = before if mark else text.rpartition(_MARK.strip())[0].rstrip()
    errors.require(_MARK.strip() not in before, 'the chat template says the last message twice')
    return before


def rendered(
    template: str, messages: Sequence[Message], add_generation_prompt: bool = True, /, **more: Any
) -> str:
    """What a template makes of messages, whatever more is called. Raises what the template does."""
    return _compiled(template).render(
        **more, messages=messages, add_generation_prompt=add_generation_prompt
    )


def select(said: described.Described, name: str = '', tools: bool = False) -> str:
    """The chat template, or the one of a name. Raises InputError where there is none."""
    found = said.chat_template
    if '{' in name:
        return name
    if not found:
        raise errors.InputError(
            'these weights were published without a chat template (in chat_template.jinja, or '
            'tokenizer_config.json); ask in plain text'
        )
    found = {'default': found} if isinstance(found, str) else found
    name = name or ('tool_use' if tools and 'tool_use' in found else 'default')
    if name not in found:
        raise errors.InputError(f'no chat template {name!r}; there are: {", ".join(sorted(found))}')
    return found[name]


@functools.lru_cache(16)
def _compiled(template: str) -> jinja2.Template:
    extensions = [_Generation, ext.loopcontrols]
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    environment.filters['tojson'] = _to_json
    environment.globals |= {'raise_exception': _refuse, 'strftime_now': _now}
    return environment.from_string(template)


class _Generation(ext.Extension):
    """{% generation %} ... {% endgeneration %}: what the assistant says, and no more than that."""

    tags = {'generation'}

    def parse(self, parser: parser.Parser) -> nodes.Node:
        """The statements between the tags; what they set is theirs."""
        next(parser.stream)
        return nodes.Scope(parser.parse_statements(('name:endgeneration',), drop_needle=True))


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja2's own filter is for HTML."""
    form = {'indent': indent, 'separators': separators, 'sort_keys': sort_keys}
    return json.dumps(x, ensure_ascii=ensure_ascii, **form)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
