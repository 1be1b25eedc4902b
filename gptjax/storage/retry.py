# SPDX-License-Identifier: Apache-2.0
"""Storage that fails for a moment is tried again, after longer and longer waits."""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

WAITS_SECS = (1.0, 2.0, 4.0, 8.0)
# What waiting does not mend.
_LASTING = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EROFS}
_log = logging.getLogger(__name__)
T = TypeVar('T')


def call(what: str, function: Callable[[], T], failure: type[Exception] = OSError) -> T:
    """function(), tried again after every wait where it raises `failure`.

    Args:
      what: for the log, as 'reading the checkpoint'.

    Raises:
      failure: the last one, or at once where waiting would not mend it.
    """
    for wait in WAITS_SECS:
        try:
            return function()
        except failure as e:
            if getattr(e, 'errno', None) in _LASTING:
                raise
            _log.warning('%s failed (%s); again in %.0f s', what, e, wait)
            time.sleep(wait)
    return function()
