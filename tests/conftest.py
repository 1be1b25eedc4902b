# SPDX-License-Identifier: Apache-2.0
"""Eight fake devices, strict JAX, and tiny runs that tests share."""

import os
import pathlib

os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
    # Most of the tests' time is that of compiling, tiny programs: LLVM is to do little, from what
    # XLA's older emitter gives it, a third of the new one's.
    + ' --xla_backend_optimization_level=0'
    + ' --xla_cpu_use_fusion_emitters=false'
    + ' --xla_cpu_parallel_codegen_split_count=1'
)
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['TOKENIZERS_PARALLELISM'] = 'false'
# Of the programs that tests start, too.
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(pathlib.Path.home() / '.cache/gptjax/tests')

import jax
import numpy as np
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', 0)

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope='module')
def _compiled_programs():
    """Drops them after each file: every one takes memory maps, of which Linux gives 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch):
    """Experiments are named by their path in the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope='session')
def real_data() -> pathlib.Path:
    """A folder of real data sets beside the checkout; without it tests skip."""
    folder = pathlib.Path(os.environ.get('GPTJAX_TEST_DATA', ROOT.parent / 'shared' / 'data'))
    if not folder.is_dir():
        pytest.skip('no folder of real data; set GPTJAX_TEST_DATA')
    return folder


@pytest.fixture(scope='session')
def texts() -> list[str]:
    """Thirty small documents with a little structure, some of them not English."""
    words = [
        'the',
        'cat',
        'sat',
        'on',
        'a',
        'mat',
        'and',
        'saw',
        'one',
        'dog',
        'run',
        'to',
        'its',
        'red',
        'house',
        '한국어',
        'é',
        '😀',
    ]
    rng = np.random.default_rng(0)
    return [' '.join(rng.choice(words, 200)) + '.' for _ in range(30)]


@pytest.fixture(scope='session')
def corpus_file(texts, tmp_path_factory) -> pathlib.Path:
    """The documents as JSONL."""
    import json

    path = tmp_path_factory.mktemp('corpus') / 'texts.jsonl'
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts), encoding='utf-8')
    return path


@pytest.fixture(scope='session')
def storage():
    """Google's storage, emulated."""
    from tests import emulator

    found = emulator.Storage()
    emulator.connect(found.url)
    yield found
    found.close()


@pytest.fixture(scope='module')
def config_file(tmp_path_factory, corpus_file) -> str:
    """The config file of a tiny run."""
    from tests import helpers

    return helpers.tiny_config(tmp_path_factory.mktemp('config'), corpus_file)


@pytest.fixture(scope='module')
def local(config_file, tmp_path_factory) -> pathlib.Path:
    """A run on a disk, to its end."""
    from tests import pods

    return pods.prepared(tmp_path_factory.mktemp('local') / 'run', config_file, train=True)


@pytest.fixture(scope='module')
def prepared_bucket(config_file, storage):
    """A workdir in a bucket, with tokens."""
    from tests import pods

    return pods.prepared(f'gs://{storage.bucket()}/prepared', config_file)


@pytest.fixture
def bucket(prepared_bucket, storage):
    """A copy of it, of this test."""
    return prepared_bucket.copy(f'gs://{storage.bucket()}/run')
