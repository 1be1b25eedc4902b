# SPDX-License-Identifier: Apache-2.0
"""The checksum that our JSON documents and lines end with: of their other fields."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

FIELD = 'checksum'
_SAYS = 'crc32:'


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its checksum behind it."""
    return {**content, FIELD: _of(content)}


def opened(found: Any) -> dict[str, Any]:
    """The content without its checksum; what was written before there were any has none.

    Raises:
      ValueError: it is another one, its name is changed, or this is no object.
    """
    if not isinstance(found, dict):
        raise ValueError(f'it is a {type(found).__name__}, not an object')
    content = {name: value for name, value in found.items() if name != FIELD}
    unsealed = FIELD not in found and not any(str(v).startswith(_SAYS) for v in content.values())
    if not unsealed and found.get(FIELD) != _of(content):
        raise ValueError('it does not have the checksum that was written with it')
    return content


def _of(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(',', ':'))
    return f'{_SAYS}{zlib.crc32(canonical.encode()):08x}'
