# SPDX-License-Identifier: Apache-2.0
"""How every program starts and ends: flags, JAX set-up, signals, exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 75 preempted with everything saved, 141 standard output
closed by its reader.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from gptjax.configs import base, cli, errors
from gptjax.configs import help as help_lib
from gptjax.runtime import progress, streams
from gptjax.storage import files

_log = logging.getLogger(__name__)

FAILED, WRONG_USAGE, PREEMPTED, CLOSED = 1, 2, 75, 141
LOCK_SECS = 60.0
_HEARTBEAT_SECS = 60  # after which a lost host ends the others, which would wait for ever
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h


class Preempted(BaseException):
    """The program was told to stop and has saved everything it needs to go on."""


class _Stop:
    requested = False
    graceful = False
    profile = False


def run(
    main: Callable[[cli.Args], None],
    doc: str,
    reads: Sequence[str],
    define: Callable[[flags.FlagValues], None] = lambda values: None,
    default_config: str = '',
    uses_jax: bool = True,
) -> None:
    """Runs a program's main(args) and exits with its code; mistakes are told in one line.

    Args:
      main: the program.
      doc: its docstring, printed for --help.
      reads: sections and top-level fields of the config that it reads; others must not be given.
      define: adds the program's own flags.
      default_config: the config file where the command line names none, as cli.parse() takes it.
      uses_jax: whether to set JAX up.
    """
    streams.set_up()
    set_up_logging()
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGINT, _on_signal)
    signal.signal(signal.SIGUSR1, _on_profile)
    asks_help = bool({'--help', '-h', '-help'} & set(sys.argv[1:]))
    told = functools.partial(_define, define=define, uses_jax=uses_jax)
    if asks_help:
        sys.exit(_exit_code(lambda: _help(doc, reads, told, default_config)))
    sys.exit(_exit_code(lambda: _main(main, reads, told, default_config, uses_jax)))


def _help(
    doc: str, reads: Sequence[str], define: Callable[[flags.FlagValues], None], default_config: str
) -> None:
    values = flags.FlagValues()
    flags.DEFINE_string('workdir', None, 'Folder that holds the run.', flag_values=values)
    define(values)
    asked = [arg for arg in sys.argv if arg not in ('--help', '-h', '-help')]
    argv = [asked[0], '--workdir=.', *asked[1:]]
    config = cli.parse(argv, define, default_config or base.__file__).config
    print(help_lib.text(doc, values, config, reads))


def _main(
    main: Callable[[cli.Args], None],
    reads: Sequence[str],
    define: Callable[[flags.FlagValues], None],
    default_config: str,
    uses_jax: bool,
) -> None:
    args = cli.parse(sys.argv, define, default_config, reads)
    if default_config == base.OF_RUN:
        _log.info('config: %s', args.path)
    if uses_jax:
        set_up_jax(args.flags)
    main(args)


def _exit_code(work: Callable[[], None]) -> int:
    try:
        work()
        sys.stdout.flush()
    except errors.InputError as e:
        print(f'error: {streams.one_line(str(e))}', file=sys.stderr)
        return WRONG_USAGE if isinstance(e, errors.UsageError) else FAILED
    except OSError as e:
        if isinstance(e, BrokenPipeError) and not streams.is_read():
            print('standard output was closed; what was written to files stays', file=sys.stderr)
            return CLOSED
        if e.errno == errno.ENOSPC:
            streams.silence()
        print(f'error: {streams.one_line(str(e))}', file=sys.stderr)
        return FAILED
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and 'RESOURCE_EXHAUSTED' not in str(e):
            raise
        said = streams.one_line(str(e)[:200])
        print(f'error: out of memory: {said}; lower batches, texts or sizes', file=sys.stderr)
        return FAILED
    except Preempted:
        print('stopped; run the same command again to go on', file=sys.stderr)
        return PREEMPTED
    return 0


def _define(
    values: flags.FlagValues, define: Callable[[flags.FlagValues], None], uses_jax: bool
) -> None:
    define(values)
    if uses_jax:
        flags.DEFINE_bool(
            'distributed', False, 'Join the other hosts of a TPU slice first.', flag_values=values
        )
        flags.DEFINE_string(
            'coordinator',
            '',
            'host:port of process 0, where hosts do not find each other.',
            flag_values=values,
        )
        flags.DEFINE_integer('processes', 0, 'How many there are, with it.', flag_values=values)
        flags.DEFINE_integer('process', 0, 'Which of them this is.', flag_values=values)


def set_up_logging() -> None:
    """Our own lines from INFO on, other people's warnings; on stderr, around a running bar."""
    handler = progress.Handler()
    handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
    logging.getLogger().handlers = [handler]
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger('gptjax').setLevel(logging.INFO)
    # orbax and grain log through absl, page after page, what they also raise; we say it in a line.
    logging.getLogger('absl').setLevel(logging.CRITICAL)
    warnings.showwarning = _warn


def _warn(message: Warning | str, category: type[Warning], filename: str, *where: Any) -> None:
    """Our own warnings as a line; other people's with their place in the code."""
    ours = pathlib.Path(filename).is_relative_to(pathlib.Path(__file__).parents[1])
    said = str(message) if ours else warnings.formatwarning(message, category, filename, where[0])
    _log.warning('%s', ' '.join(said.split('\n')).strip())
    logging.captureWarnings(True)


def set_up_jax(given: flags.FlagValues) -> None:
    """Memory, persistent compilation cache; on several hosts, the connection between them."""
    import jax

    keep_memory()
    jax.config.update('jax_compilation_cache_dir', str(files.cache_dir() / 'xla'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)
    if given.distributed or given.coordinator:
        where = (given.coordinator, given.processes, given.process) if given.coordinator else ()
        try:
            jax.distributed.initialize(*where, heartbeat_timeout_seconds=_HEARTBEAT_SECS)
        except (ValueError, RuntimeError) as e:
            raise errors.UsageError(
                f'--distributed could not join other hosts: {e} It finds them by itself on TPU '
                'VMs, under Slurm and under Open MPI; elsewhere give --coordinator=<host>:<port>, '
                '--processes and --process'
            ) from e


def keep_memory() -> None:
    """Tells glibc to keep freed memory instead of handing it back to the system.

    XLA allocates the temporaries of a CPU program afresh at every step. Handed back, they are
    mapped and zeroed page by page each time: a fifth of the time of a training step (LOG.md).
    """
    with contextlib.suppress(OSError, AttributeError):  # another libc
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_ARENA_MAX, 1)


def stop_requested() -> bool:
    """Whether SIGTERM or SIGINT has arrived inside graceful_stop()."""
    return _Stop.requested


def profile_requested() -> bool:
    """Whether SIGUSR1 has arrived since this was last asked."""
    requested, _Stop.profile = _Stop.profile, False
    return requested


def is_first() -> bool:
    """Whether this is the first of the hosts of a run: the one that writes files."""
    import jax

    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether this is the only host of a run."""
    import jax

    return jax.process_count() == 1


def first_says(number: int) -> int:
    """The first host's number, on every host."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int64(number)))


def agreed(*decisions: bool) -> tuple[bool, ...]:
    """Each decision, true where it is on any host: what one host does alone, others wait for."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return decisions
    everywhere = multihost_utils.process_allgather(np.array(decisions))
    return tuple(bool(on) for on in everywhere.any(axis=0))


@functools.cache
def commit() -> str:
    """The checkout that this runs from: its HEAD, and whether files differ; '' where it is none."""

    def git(*command: str) -> str:
        return subprocess.run(
            ['git', *command],
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        git('ls-files', '--error-unmatch', pathlib.Path(__file__).name)  # not another's checkout
        changed = ', changed' if git('status', '--porcelain') else ''
        return git('rev-parse', '--short', 'HEAD') + changed
    except (OSError, subprocess.CalledProcessError):
        return ''


@contextlib.contextmanager
def graceful_stop() -> Iterator[None]:
    """While open, a signal only sets stop_requested(); a second one ends the program at once."""
    _Stop.requested, _Stop.graceful = False, True
    try:
        yield
    finally:
        _Stop.graceful = False


@contextlib.contextmanager
def only_one(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps a second run out of a workdir, waiting for the first to end, and saying so at once.

    On several hosts the first of them holds the workdir for all; programs without JAX have one.

    Raises:
      InputError: another process holds it for longer than a stop with saving takes.
    """
    if 'jax' in sys.modules and not is_first():
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / '.lock').open('a+') as f:
        deadline, holder = time.monotonic() + LOCK_SECS, ''
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as e:
                if not holder:
                    f.seek(0)
                    holder = f'{f.read() or "another process"} is at work in {workdir}'
                    _log.warning('%s: waiting up to %.0f s for its end', holder, LOCK_SECS)
                if time.monotonic() > deadline:
                    raise errors.InputError(
                        f'{holder}; stop it or use another --workdir (with '
                        f'--config.init_from={workdir} where its weights are wanted)'
                    ) from e
                time.sleep(0.2)
        f.truncate(0)
        name = pathlib.Path(sys.argv[0]).stem
        f.write(f'process {os.getpid()} on {os.uname().nodename} ({name})')
        f.flush()
        yield


def _on_profile(number: int, frame: object) -> None:
    del number, frame
    _Stop.profile = True


def _on_signal(number: int, frame: object) -> None:
    del frame
    if _Stop.graceful and not _Stop.requested:
        _Stop.requested = True
        name = signal.Signals(number).name
        _log.warning('%s: finishing this step and saving; once more to stop at once', name)
        return
    raise Preempted
