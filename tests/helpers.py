# SPDX-License-Identifier: Apache-2.0
"""Tiny versions of what programs do, for tests."""

import contextlib
import functools
import itertools
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gptjax.configs import base, cli, sizes
from gptjax.data import collecting, documents, shards, tokens
from gptjax.models import heads, kneser_ney, ngram, pretrained
from gptjax.runtime import mesh as mesh_lib
from gptjax.runtime import program
from gptjax.sampling import decode, options
from gptjax.storage import scratch
from gptjax.training import guard, losses, optim
from gptjax.training import plan as plan_lib
from gptjax.training import step as step_lib
from gptjax.training.objectives import next_token

TINY_CONFIG = """
from gptjax.configs import base, cli, sizes

def get_config(arg=None):
    arg = cli.parse_arg(arg, model='gpt')
    config = base.get_config()
    if arg.model == 'ngram':
        config.model = sizes.ngram(3)
    elif arg.model != 'gpt':
        config.model = sizes.rnn(arg.model)
    config = cli.tiny(config)
    with config.unlocked():
        config.corpus.update(set='files', path={path!r})
        config.tokenizer.update(kind='bytes', n_vocab=257)
        config.tokens.update(valid_fraction=0.15)
        config.evaluate.batch_windows = 8
    return config.lock()
"""


def tiny_config(folder: pathlib.Path, corpus: pathlib.Path) -> str:
    """A config file of a run that takes seconds; returns its path."""
    path = folder / 'tiny_config.py'
    path.write_text(TINY_CONFIG.format(path=str(corpus)))
    return str(path)


def args(config: str, workdir: pathlib.Path, *flags: str, define=lambda values: None) -> cli.Args:
    """A parsed command line."""
    return cli.parse(['program', f'--config={config}', f'--workdir={workdir}', *flags], define)


def prepare(config: str, workdir: pathlib.Path, *flags: str) -> None:
    """Corpus, tokenizer and tokens of a run."""
    from gptjax import prepare_corpus, prepare_tokens, train_tokenizer

    for each in (prepare_corpus, train_tokenizer, prepare_tokens):
        each.main(args(config, workdir, *flags))


class InMemory(shards.Shard):
    """A shard that was never written."""

    def __init__(self, array: np.ndarray) -> None:
        self._array, self.n_tokens = array, len(array)

    def request(self, start, stop):
        return lambda: self._array[start:stop]


def token_set(array: np.ndarray) -> tokens.TokenSet:
    """A training set of tokens in memory."""
    shard = InMemory(array)
    named = (pathlib.Path('numbers'), 'train')
    return tokens.TokenSet(*named, 0, 10**6, '', '', [shard], [len(array)])


def prepared(folder: pathlib.Path, corpus: pathlib.Path) -> tuple[str, pathlib.Path]:
    """(config, folder with its tokens and tokenizer), for several runs to share."""
    config = tiny_config(folder, corpus)
    prepare(config, folder)
    return config, folder


def fresh(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A new workdir over the tokens and the tokenizer of a prepared folder."""
    path.mkdir()
    for name in ('tokens', 'tokenizer'):
        (path / name).symlink_to(folder / name)
    return path


def tiny_model(**overrides) -> heads.LanguageModel:
    """A model of two layers."""
    section = sizes.model('tiny', **({'n_vocab': 64, 'n_ctx': 16} | overrides))
    return heads.build(section)


@functools.lru_cache
def params_of(model: heads.LanguageModel, seed: int = 0):
    """Its parameters, all of them random: biases and gains too."""

    @jax.jit
    def make():
        leaves, tree = jax.tree.flatten(nn.meta.unbox(model.init_params(jax.random.key(seed))))
        keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
        noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        return tree.unflatten(noisy)

    return make()


@functools.lru_cache
def applied(model: heads.LanguageModel, method: str = '__call__'):
    """A jitted (params, *arguments) -> what the model's method returns."""
    return jax.jit(lambda params, *rest: model.apply({'params': params}, *rest, method=method))


def one_device() -> mesh_lib.Mesh:
    """A mesh of the first device alone."""
    return mesh_lib.one_device()


def optim_config(**overrides) -> optim.Config:
    """AdamW with a constant rate, or as overridden, in the base config's other values."""
    section = base.get_config().optim
    section.update({'peak_lr': 1e-2, 'schedule': 'constant'} | overrides)
    return optim.configure(section)


def optimizer_of(plan: plan_lib.Plan, model: heads.LanguageModel, **overrides) -> optim.Optimizer:
    """Of a model's parameters, as optim_config() says."""
    return optim.make(optim_config(**overrides), plan, heads.describe(model))


def plan_of(
    batch_tokens: int, n_ctx: int, total_tokens: int = 10_000, **overrides
) -> plan_lib.Plan:
    """A batch plan without a ramp, or as overridden."""
    fields = {'device_windows': 0, 'ramp_from_tokens': 0, 'ramp_over_tokens': 0, 'ramp_stages': 8}
    config = plan_lib.Config(batch_tokens=batch_tokens, **(fields | overrides))
    return plan_lib.of_tokens(config, n_ctx, total_tokens)


def state_of(params, optimizer) -> step_lib.State:
    """A state that begins with given parameters."""
    moments = optimizer.init(params)
    return step_lib.State(jnp.zeros((), jnp.int32), params, {}, moments, None, guard.empty())


def loss_of(model: heads.LanguageModel) -> losses.Loss:
    """The language-model loss of a batch."""
    return losses.with_sown(next_token.make, model.apply, None)


def batch_of(windows: int, n_ctx: int, n_vocab: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens."""
    read = np.random.default_rng(seed).integers(0, n_vocab, (windows, n_ctx + 1)).astype(np.int32)
    weights = np.ones((windows, n_ctx), np.float32)
    return {'tokens': read[:, :-1], 'targets': read[:, 1:], 'weights': weights}


def evaluation_of(workdir: pathlib.Path, label: str = 'tokens') -> dict:
    """What evaluate wrote of one held-out set, and of the weights."""
    found = json.loads((workdir / 'evaluation.json').read_text())
    return found['sets'][label] | {'weights': found['weights']}


def run_program(name: str, *flags: str, **kwargs) -> subprocess.CompletedProcess:
    """A program in a process of its own."""
    command = [sys.executable, '-m', f'gptjax.{name}', *flags]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


@contextlib.contextmanager
def stopped_after(*calls: int):
    """A run inside is asked to stop when it has looked so many times, and stops."""
    seen = itertools.count(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, 'stop_requested', lambda: next(seen) in calls)
        yield


def published(path: pathlib.Path) -> pathlib.Path:
    """A small GPT-2 in Hugging Face's layout."""
    model = tiny_model()
    pretrained.save(path, model, params_of(model), None)
    return path


def check_no_fault(said: str | bytes) -> None:
    """Asserts that what a program said is neither a traceback nor where one is kept."""
    text = said.decode() if isinstance(said, bytes) else said
    assert 'Traceback' not in text, text
    assert 'a fault of gptjax' not in text, text


@contextlib.contextmanager
def signals_heeded():
    """Processes that begin meanwhile ignore no signal, though nohup or & have tests ignore some."""
    ignored = [n for n in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, lambda *args: None)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def asked(**given) -> options.Options:
    """Options of a request: the base config's, no end token, and what is given."""
    plain = {'eos_token_id': (-1,), 'do_sample': False, 'temperature': 1.0, 'max_new_tokens': 64}
    return options.make(base.get_config().decode.to_dict() | plain, given)


def collect(
    folder: pathlib.Path, found: Iterable[Any], config: documents.Config, source: dict
) -> dict[str, int]:
    """Writes a corpus of what a set gives."""
    with scratch.own_folder(folder) as own:
        pieces = collecting.pieces(found, own / 'x')
        return collecting.write(folder, pieces, config, source, lambda amount: None)


def ngram_tables(
    sequences: Sequence[Sequence[np.ndarray]], order: int, n_vocab: int
) -> dict[str, dict[str, jax.Array]]:
    """kneser_ney.estimate() in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        found = kneser_ney.estimate(sequences, order, n_vocab, 10**6, pathlib.Path(folder))
        return {k: {n: jnp.array(x) for n, x in table.items()} for k, table in found.items()}


def baseline_decoder(kind: str) -> tuple[decode.Decoder, dict]:
    """(decoder, parameters) of an LSTM or a counted trigram model of 64 tokens."""
    if kind == 'ngram':
        text = np.random.default_rng(0).integers(0, 64, 4000) ** 2 // 64
        tables = ngram_tables([[text]], 3, 64)
        entries = tuple(len(table['token']) for table in tables.values())
        model = heads.build(sizes.ngram(3, n_ctx=16, n_vocab=64, entries=entries))
        return decode.Decoder(model, 64), ngram.params_of(tables)
    model = heads.build(sizes.rnn(kind, n_ctx=16, n_vocab=64, d_model=32))
    return decode.Decoder(model, 64), params_of(model)
