# SPDX-License-Identifier: Apache-2.0
"""The connection to Google Cloud Storage; what goes wrong there is an OSError that says where."""

import contextlib
import errno
import functools
import os
import pathlib
import threading
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from gptjax.configs import errors
from gptjax.storage import retry

EMULATOR = 'STORAGE_EMULATOR_HOST'
_PASSING = (401, 408, 429)  # a token has run out, a request was slow, there were too many
_lock = threading.Lock()
T = TypeVar('T')


class Connection(NamedTuple):
    """google-cloud-storage's objects."""

    client: Any
    bucket: Any


def connection(bucket: str) -> Connection:
    """The connection of this process to a bucket. Raises InputError: there are no credentials."""
    with _lock:
        return _connected(bucket, os.getpid())


def tried(doing: str, where: object, do: Callable[[], T]) -> T:
    """What storage answers; asked again where it fails for a moment.

    Args:
      doing: for the log, as 'reading'.
      where: the object that it is about.

    Raises:
      OSError: it failed; it names the object.
    """
    return retry.call(f'{doing} {where}', lambda: _asked(where, do))


def far(bucket: str) -> str:
    """Where a bucket is and where this machine is, if that is elsewhere; '' = near, or unknown."""
    machine = _region()
    if not machine:
        return ''
    try:
        found = connection(bucket).client.get_bucket(bucket, retry=None, timeout=5.0)
    except Exception:  # not every account may ask that
        return ''
    places = [str(place).lower() for place in found.data_locations or [found.location]]
    wide = {'us': 'us-', 'eu': 'europe-', 'asia': 'asia-'}  # multi-regions
    if any(machine == place or machine.startswith(wide.get(place, '\0')) for place in places):
        return ''
    return f'the bucket is in {" and ".join(places)}, this machine in {machine}'


def _region() -> str:
    """Of the virtual machine of Google's that this is; '' = of none."""
    host = os.environ.get('GCE_METADATA_HOST')
    with contextlib.suppress(OSError):
        made_by = pathlib.Path('/sys/class/dmi/id/product_name').read_text(encoding='utf-8')
        host = host or ('metadata.google.internal' if 'Google' in made_by else '')
    if not host:
        return ''
    zone = urllib.request.Request(
        f'http://{host}/computeMetadata/v1/instance/zone', headers={'Metadata-Flavor': 'Google'}
    )
    with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(zone, timeout=2) as found:
        return found.read().decode().rpartition('/')[2].rpartition('-')[0]
    return ''


@functools.cache
def _connected(bucket: str, process: int) -> Connection:
    """Args: process: connections are not shared with a parent."""
    del process
    from google.auth import credentials, exceptions
    from google.cloud import storage

    try:
        if os.environ.get(EMULATOR):
            client = storage.Client('emulated', credentials.AnonymousCredentials())
        else:
            client = storage.Client()
    except (exceptions.GoogleAuthError, OSError) as e:
        raise errors.InputError(
            f'gs://{bucket} cannot be reached: there are no credentials of Google Cloud here '
            f'({_why(e)}); on a laptop run gcloud auth application-default login, on a VM give it '
            'a service account with access to storage'
        ) from e
    return Connection(client, client.bucket(bucket))


def _asked(where: object, do: Callable[[], T]) -> T:
    import requests
    from google.api_core import exceptions
    from google.auth import exceptions as auth
    from google.cloud.storage import exceptions as transfers

    try:
        return do()
    except exceptions.NotFound as e:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(where)) from e
    except exceptions.PreconditionFailed as e:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(where)) from e
    except exceptions.Forbidden as e:
        raise PermissionError(errno.EACCES, _why(e), str(where)) from e
    except exceptions.GoogleAPICallError as e:
        lasts = 400 <= (e.code or 0) < 500 and e.code not in _PASSING
        number = errno.EINVAL if lasts else errno.EIO
        raise OSError(number, f'storage answers {e.code}: {_why(e)}', str(where)) from e
    except (requests.RequestException, auth.GoogleAuthError) as e:
        raise OSError(errno.EIO, f'storage cannot be reached: {_why(e)}', str(where)) from e
    except (transfers.DataCorruption, transfers.InvalidResponse) as e:
        raise OSError(errno.EIO, f'storage answers oddly: {_why(e)}', str(where)) from e


def _why(error: Exception) -> str:
    return ' '.join(str(getattr(error, 'message', '') or error).split())[:160]
