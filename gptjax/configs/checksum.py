# SPDX-License-Identifier: Apache-2.0
"""The checksum that our JSON documents and lines end with: of their other fields."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

FIELD = 'checksum'
_SAYS = 'crc32:'


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content as JSON has it, whose names are texts, with its checksum behind it."""
    plain = json.loads(json.dumps(content))
    return {**plain, FIELD: _of(plain)}


def opened(found: Any) -> dict[str, Any]:
    """The content without its checksum; what was written before there were any has none.

    Raises:
      ValueError: it is another one, its name is changed, or this is no object.
    """
    if not isinstance(found, dict):
        raise ValueError(f'it is a {type(found).__name__}, not an object')
    content = {name: value for name, value in found.items() if name != FIELD}
    texts = [value for value in content.values() if isinstance(value, str)]
    unsealed = FIELD not in found and not any(text.startswith(_SAYS) for text in texts)
    if not unsealed and found.get(FIELD) != _of(content):
        raise ValueError('it does not have the checksum that was written with it')
    return content


def _of(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(',', ':'))
    return f'{_SAYS}{zlib.crc32(canonical.encode()):08x}'
