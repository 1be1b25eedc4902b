# SPDX-License-Identifier: Apache-2.0
"""Compiled programs are kept, so that a run that is started again compiles nothing."""

import collections
import contextlib
import inspect
import os
import pathlib
import time
import warnings
from typing import Any

from gptjax.runtime import hosts, signals
from gptjax.storage import buckets, files, scratch

FOLDER = 'xla'
_VARIABLE = 'JAX_COMPILATION_CACHE_DIR'
_OURS = '-cache'  # how JAX names what it keeps, in a folder that may hold other things
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

    _use(os.environ.get(_VARIABLE) or files.cache_dir() / FOLDER)
    if not hosts.is_first():
        _write_own()
    jax.monitoring.register_event_listener(lambda event, **_: _seen.update([event]))
    # Programs are few, and each host would wait for the one that compiles.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)
    signals.at_end(_forget_newest)


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


def _forget_newest() -> None:
    """Removes what was kept this very moment: it may be half written, and would be kept so."""
    import jax

    folder = jax.config.jax_compilation_cache_dir
    if '://' in folder:  # written as a whole
        return
    newest = time.time() - 2.0
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        for entry in found:
            with contextlib.suppress(OSError):  # of a folder, or removed since
                if entry.name.endswith(_OURS) and entry.stat().st_mtime > newest:
                    os.unlink(entry.path)
