# SPDX-License-Identifier: Apache-2.0
"""Whether a text is Unicode."""

from gptjax.configs import errors


def check(text: str) -> str:
    """The text itself. Raises InputError where it holds a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise errors.InputError(
            f'the text holds a lone surrogate, U+{ord(text[e.start]):04X} at character {e.start}, '
            'which is no Unicode text; clean it first, as text.encode("utf-8", "replace").decode()'
        ) from e
    return text
