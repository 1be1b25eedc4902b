# SPDX-License-Identifier: Apache-2.0
"""How every program starts and ends: flags, JAX set-up, signals, exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped (the same command goes on; what a second
signal has lost is said), 141 standard output closed by its reader.
"""

import contextlib
import ctypes
import errno
import functools
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags

from gptjax.configs import base, cli, errors
from gptjax.configs import help as help_lib
from gptjax.runtime import compiled, hosts, joining, peers, progress, signals, streams
from gptjax.storage import files, leases, mirror, scratch, unfinished

_log = logging.getLogger(__name__)

FAILED, WRONG_USAGE, PREEMPTED, CLOSED = 1, 2, signals.STOPPED, 141
_JOIN_SECS = 300.0
_GPU_MEMORY = ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION')  # what JAX reads
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h


class Preempted(BaseException):
    """The program was told to stop and has saved everything it needs to go on."""

    def __init__(self, said: bool = False) -> None:
        """Args: said: whether the user was told already."""
        super().__init__()
        self.said = said


class _Profile:
    requested = False


class _Said:
    why = ''  # the program ended with an error


stop_requested = signals.stop_requested
graceful_stop = signals.graceful


def run(
    main: Callable[[cli.Args], None],
    doc: str,
    reads: Sequence[str],
    define: Callable[[flags.FlagValues], None] = lambda values: None,
    default_config: str = '',
    uses_jax: bool = True,
    needs_workdir: bool = True,
) -> None:
    """Runs a program's main(args) and exits with its code; mistakes are told in one line.

    Args:
      main: the program.
      doc: its docstring, printed for --help.
      reads: sections and top-level fields of the config that it reads; others must not be given.
      define: adds the program's own flags.
      default_config: the config file where the command line names none, as cli.parse() takes it.
      uses_jax: whether to set JAX up.
      needs_workdir: whether --workdir must be given.
    """
    signals.install()
    streams.set_up()
    set_up_logging()
    signal.signal(signal.SIGUSR1, _on_profile)
    asks_help = bool({'--help', '-h', '-help'} & set(sys.argv[1:]))
    told = functools.partial(_define, define=define, uses_jax=uses_jax)
    if asks_help:
        code = _exit_code(lambda: _help(doc, reads, told, default_config))
    else:
        code = _exit_code(lambda: _main(main, reads, told, default_config, uses_jax, needs_workdir))
    streams.settle()
    signals.ended(code)
    agreed = code in (0, PREEMPTED)
    peers.here().end(0 if agreed else code, _Said.why)
    if not agreed and not signals.is_alone():
        signals.leave(code, '')  # at once: JAX waits at the end for hosts that wait for this one
    if not signals.is_alone():
        joining.part()
    sys.exit(code)


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
    needs_workdir: bool,
) -> None:
    signals.at_end(mirror.leave)
    args = cli.parse(sys.argv, define, default_config, reads, scratch.WHERE, needs_workdir)
    if default_config == base.OF_RUN:
        _log.info('config: %s', args.path)
    if uses_jax:
        set_up_jax(args)
    with mirror.mirroring(not uses_jax or hosts.is_first()):
        try:
            main(args)
        finally:
            peers.here().ending()


def _exit_code(work: Callable[[], None]) -> int:
    """What a program's work ends with; alone and stopped, the process ends here."""
    try:
        work()
        sys.stdout.flush()
        # Of several hosts one may have been asked to stop behind the last step that all could.
        return _stopped(said=False) if stop_requested() and signals.is_alone() else 0
    except errors.InputError as e:
        _say(f'error: {e}')
        return WRONG_USAGE if isinstance(e, errors.UsageError) else FAILED
    except OSError as e:
        if isinstance(e, BrokenPipeError) and not streams.is_read():
            _say('standard output was closed; what was written to files stays')
            return CLOSED
        if e.errno == errno.ENOSPC:
            streams.silence()
        _say(f'error: {e}')
        return FAILED
    except Preempted as e:
        return _stopped(e.said)
    except Exception as e:
        if isinstance(e, MemoryError) or 'RESOURCE_EXHAUSTED' in str(e):
            _say(f'error: out of memory: {str(e)[:200]}; lower batches, texts or sizes')
        else:
            _say(f'error: {type(e).__name__}: {e}; {_traced(e)}')
        return FAILED


def _say(why: str) -> None:
    """Says what a program ends with, to other hosts as well."""
    streams.say(why)
    _Said.why = streams.one_line(why.removeprefix('error: '))[:2000]


def _traced(error: Exception) -> str:
    """Keeps the traceback of what no message was written for, and says where."""
    path = files.cache_dir() / 'faults' / f'{time.strftime("%Y%m%d-%H%M%S")}-{os.getpid()}.txt'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, ''.join(traceback.format_exception(error)))
        return f'this is a fault of gptjax, or of a file that it did not expect: see {path}'
    except OSError:
        return 'this is a fault of gptjax, or of a file that it did not expect'


def _stopped(said: bool) -> int:
    line = '' if said else signals.LINE
    if signals.is_alone():
        signals.leave(PREEMPTED, line)
    if line:
        streams.say(line)
    return PREEMPTED


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
        flags.DEFINE_list(
            'local_device_ids',
            [],
            'Numbers of the GPUs that this process takes, where several share a machine; all of '
            'them otherwise, or as the cluster says.',
            flag_values=values,
        )
        flags.DEFINE_float(
            'gpu_memory_fraction',
            0.75,
            'Of the memory of a GPU, what JAX takes at once.',
            lower_bound=0.01,
            upper_bound=1.0,
            flag_values=values,
        )
        flags.DEFINE_float(
            'join_timeout',
            _JOIN_SECS,
            'Seconds that hosts wait for each other; who did not come is named.',
            lower_bound=1.0,
            flag_values=values,
        )


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
    threading.excepthook = _thread_died
    sys.unraisablehook = _unraisable


def _thread_died(died: threading.ExceptHookArgs) -> None:
    """A line in place of a traceback: whoever waits for the thread says what that means."""
    name = died.thread.name if died.thread else 'a thread'
    _log.warning('%s ended early: %s: %s', name, died.exc_type.__name__, died.exc_value)


def _unraisable(what: Any) -> None:
    """Of destructors, which nobody can do anything about."""
    _log.debug('%s: %r', what.err_msg or 'in a destructor', what.exc_value)


def _warn(message: Warning | str, category: type[Warning], filename: str, *where: Any) -> None:
    """Our own warnings as a line; other people's with their place in the code."""
    ours = pathlib.Path(filename).is_relative_to(pathlib.Path(__file__).parents[1])
    said = str(message) if ours else warnings.formatwarning(message, category, filename, where[0])
    _log.warning('%s', ' '.join(said.split('\n')).strip())
    logging.captureWarnings(True)


def set_up_jax(args: cli.Args) -> None:
    """Memory; on several hosts, the connection between them; where compiled programs are kept."""
    keep_memory()
    given = args.flags
    _share_memory(given['gpu_memory_fraction'])
    alone = not (given.distributed or given.coordinator)
    local = _local_devices(given.local_device_ids, alone)
    if not alone:
        place = joining.Place(given.coordinator, given.processes, given.process)
        joining.join(place, given.join_timeout, local)
    compiled.keep()


def _share_memory(fraction: flags.Flag) -> None:
    """The flag, if it was given; else what the environment says; else the flag's default."""
    if fraction.present or not any(os.environ.get(name) for name in _GPU_MEMORY):
        for name in _GPU_MEMORY:  # JAX refuses both at once
            os.environ.pop(name, None)
        os.environ[_GPU_MEMORY[0]] = str(fraction.value)


def _local_devices(numbers: Sequence[str], alone: bool) -> list[int]:
    """Raises UsageError where one is no number, or nothing is there to be shared."""
    errors.require(
        all(number.strip().isdecimal() for number in numbers),
        f'--local_device_ids={",".join(numbers)} must be numbers, as 0 or 0,1',
    )
    errors.require(
        not (numbers and alone),
        '--local_device_ids is for processes that share a machine: give --coordinator, --processes '
        'and --process with it, or --distributed; of a process alone say CUDA_VISIBLE_DEVICES',
    )
    return [int(number) for number in numbers]


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


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Of work that all hosts do behind a step: a function that raises Preempted where they stop."""
    with peers.here().behind_step() as stops:

        def check() -> None:
            if stops(signals.stop_requested()):
                raise Preempted

        yield check


def profile_requested() -> bool:
    """Whether SIGUSR1 has arrived since this was last asked."""
    requested, _Profile.requested = _Profile.requested, False
    return requested


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
def only_one(workdir: pathlib.Path, whole: bool = True) -> Iterator[None]:
    """Keeps a second run out of a workdir, waiting for the first to end, and saying so at once.

    On several hosts the first of them holds the workdir for all; programs without JAX have one.

    Args:
      whole: refuse a folder that is unfinished.

    Raises:
      InputError: another process holds it for longer than a stop with saving takes, or it is
        unfinished.
    """
    if 'jax' in sys.modules and not hosts.is_first():
        if not hosts.first_says(0, f'holding {workdir}'):
            raise errors.InputError(f'the first host does not hold {workdir}; see its log')
        scratch.refresh(workdir)
        yield
        return
    with contextlib.ExitStack() as stack:
        holds = False
        try:
            stack.enter_context(leases.held(scratch.origin(workdir)))
            holds = True
        finally:
            if 'jax' in sys.modules:
                hosts.first_says(holds, f'holding {workdir}')  # the others wait for this
        scratch.refresh(workdir)
        if whole:
            unfinished.refuse(workdir)
        with mirror.synced():
            yield


def _on_profile(number: int, frame: object) -> None:
    del number, frame
    _Profile.requested = True
