# SPDX-License-Identifier: Apache-2.0
"""Files that a reader sees whole or not at all."""

import hashlib
import os
import pathlib


def replace(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file so that, whatever happens, its old or its new content is there."""
    partial = path.with_name(path.name + '.partial')
    with partial.open('wb') as f:
        f.write(content.encode() if isinstance(content, str) else content)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)


def sha256(path: pathlib.Path) -> str:
    """Hex digest of a file."""
    with path.open('rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()
