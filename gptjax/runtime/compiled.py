# SPDX-License-Identifier: Apache-2.0
"""Compiled programs are kept, so that a run that is started again compiles nothing."""

import collections
import hashlib
import inspect
import os
import pathlib
import time
import warnings
from typing import Any

from gptjax.runtime import hosts
from gptjax.storage import buckets, files, scratch

FOLDER = 'xla'
_VARIABLE = 'JAX_COMPILATION_CACHE_DIR'
_OURS = '.program'  # in a folder where JAX may keep others
_DIGEST_BYTES = 32  # sha256, before the rest
_WANTED, _FOUND = (
    f'/jax/compilation_cache/{n}' for n in ('compile_requests_use_cache', 'cache_hits')
)
_seen: collections.Counter[str] = collections.Counter()
_KNOWN = (
    *('backend', 'computation', 'executable_devices', 'compile_options'),
    *('host_callbacks', 'module_name', 'cache_key'),
)


def keep() -> None:
    """Has JAX keep what it compiles, and look there first. To be called once hosts are joined.

    Where JAX_COMPILATION_CACHE_DIR says; else in the cache folder of this machine.
    """
    import jax

    _keep_sealed()
    _use(os.environ.get(_VARIABLE) or files.cache_dir() / FOLDER)
    if not hosts.is_first():
        _write_own()
    jax.monitoring.register_event_listener(lambda event, **_: _seen.update([event]))
    # Programs are few, and each host would wait for the one that compiles.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)


def keep_with(workdir: pathlib.Path) -> None:
    """Has what a run compiles kept in its workdir, if that is in a bucket or of several hosts.

    The disks of such hosts go with them. Where the environment says another place, it stays so.
    What is kept is run: whoever may write there is trusted.
    """
    place = scratch.origin(workdir)
    shared = isinstance(place, buckets.Path) or not hosts.is_alone()
    if shared and not os.environ.get(_VARIABLE):
        _use(place / FOLDER)


def said() -> str:
    """How many programs this process has compiled, and how many it found compiled."""
    found = _seen[_FOUND]
    return f'{_seen[_WANTED] - found} programs compiled, {found} found compiled'


def _use(folder: str | buckets.Anywhere) -> None:
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update('jax_compilation_cache_dir', str(folder))
    # To a bucket XLA itself writes nothing.
    beside = 'none' if '://' in str(folder) else 'xla_gpu_per_fusion_autotune_cache_dir'
    jax.config.update('jax_persistent_cache_enable_xla_caches', beside)
    compilation_cache.reset_cache()  # of another folder, if any


def _write_own() -> None:
    """Has a host that is not the first keep what it alone will look for, too.

    JAX lets the first host write, for all. But programs of one host's own devices differ by their
    devices, and on CPUs the processes of one run count as different machines.
    """
    import jax
    from jax._src import compilation_cache, compiler

    theirs = compiler._compile_and_write_cache
    if tuple(inspect.signature(theirs).parameters) != _KNOWN:  # another JAX: it compiles again
        return

    def compile_and_write(
        backend: Any, computation: Any, devices: Any, options: Any, calls: Any, name: str, key: str
    ) -> Any:
        here = jax.process_index()
        own = backend.platform == 'cpu' or all(each.process_index == here for each in devices)
        if calls or not own:
            return theirs(backend, computation, devices, options, calls, name, key)
        begun = time.monotonic()
        program = compiler.backend_compile_and_load(backend, computation, devices, options, calls)
        try:
            secs = int(time.monotonic() - begun)
            compilation_cache.put_executable_and_time(key, name, program, backend, secs)
        except Exception as e:  # of storage, of JAX: only the next start is slower
            warnings.warn(f'{name} is not kept compiled: {e}', stacklevel=2)
        return program

    compiler._compile_and_write_cache = compile_and_write


class _Programs:
    """JAX's cache of compiled programs, of files with a checksum that are there whole or not."""

    def __init__(self, folder: buckets.Anywhere) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder

    def get(self, key: str) -> bytes | None:
        """What was put; None = nothing, or what cannot be read any more, and is removed."""
        file = self._path / (key + _OURS)
        try:
            found = file.read_bytes()
        except FileNotFoundError:
            return None
        if found[:_DIGEST_BYTES] == _digest(found[_DIGEST_BYTES:]):
            return found[_DIGEST_BYTES:]
        warnings.warn(f'{file} is damaged: it is removed, and compiled anew', stacklevel=2)
        file.unlink(missing_ok=True)
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keeps it under its key."""
        files.replace(self._path / (key + _OURS), _digest(value) + value)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _keep_sealed() -> None:
    """Has JAX keep its programs in files of ours.

    Its own may be half written for ever, are read without a checksum, and never written again.
    Where a size is set it keeps to its own, which are removed by age; so it does in s3:// and az://.
    """
    import jax
    from jax._src import compilation_cache

    theirs = compilation_cache.get_file_cache
    if tuple(inspect.signature(theirs).parameters) != ('path',):  # another JAX
        return

    def file_cache(path: str) -> Any:
        if jax.config.jax_compilation_cache_max_size != -1:
            return theirs(path)
        if path.startswith(buckets.SCHEME):
            return _Programs(buckets.of(path)), path
        return theirs(path) if '://' in path else (_Programs(pathlib.Path(path)), path)

    compilation_cache.get_file_cache = file_cache
