# SPDX-License-Identifier: Apache-2.0
"""What a run is made in: dtypes, kernels, microbatches; what it says of that, and refuses."""

import json
import types

import pytest

from gptjax import prepare_tokens, train
from gptjax.configs import base, errors, sizes
from gptjax.data import token_manifest
from gptjax.models import axes, heads
from gptjax.models.kernels import flash
from gptjax.runtime import metrics, program
from tests import helpers


@pytest.mark.parametrize(
    ('field', 'value', 'said'),
    [
        ('param_dtype', 'bfloat16', 'lose what updates add'),
        ('param_dtype', 'float16', 'lose what updates add'),
        ('compute_dtype', 'float16', 'gradients would underflow'),
    ],
)
def test_training_in_dtypes_that_lose_it_is_refused(field, value, said):
    config = base.get_config()
    config.model = sizes.model('gpt2-small', **{field: value})
    with pytest.raises(errors.UsageError, match=said):
        train.Sections(config)


def kernels(monkeypatch, platform, capability='8.0', size='gpt3-125m', **fields):
    """What would train a model on an accelerator of this kind, which nobody here has."""
    mesh, device = helpers.one_device(), types.SimpleNamespace(compute_capability=capability)
    with monkeypatch.context() as patch, mesh.scope():
        patch.setattr(axes, 'platform', lambda: platform)
        patch.setattr(flash.jax, 'local_devices', lambda: [device])
        return heads.configure(sizes.model(size, **fields)).kernels(4)


@pytest.mark.parametrize(
    ('platform', 'capability', 'fields', 'kernel'),
    [
        ('tpu', '', {}, 'splash'),
        ('tpu', '', {'n_ctx': 200}, 'plain'),
        ('tpu', '', {'attention_dropout': 0.1, 'n_ctx': 1024}, 'plain'),
        ('cuda', '8.0', {'compute_dtype': 'bfloat16'}, 'cudnn'),
        ('cuda', '8.0', {'n_ctx': 1024}, 'plain'),
        ('cuda', '8.0', {'compute_dtype': 'bfloat16', 'd_head': 256, 'n_heads': 3}, 'plain'),
        ('cuda', '9.0', {'compute_dtype': 'bfloat16', 'd_head': 256, 'n_heads': 3}, 'cudnn'),
        ('cuda', '10.0', {'compute_dtype': 'bfloat16', 'd_head': 256, 'n_heads': 3}, 'cudnn'),
        ('cpu', '', {'n_ctx': 1024}, 'tiled'),
        ('cpu', '', {'n_ctx': 4096}, 'online'),
    ],
)
def test_the_kernel_of_a_platform(monkeypatch, platform, capability, fields, kernel):
    found = kernels(monkeypatch, platform, capability, **fields)
    assert set(found.values()) == {kernel}
    assert set(found) == {'dense', 'banded'}


@pytest.mark.parametrize('fields', [{}, {'attention_dropout': 0.1, 'compute_dtype': 'bfloat16'}])
def test_the_plain_form_of_much_is_refused_on_accelerators(monkeypatch, fields):
    said = r'the plain form would hold 1.5 GiB .* Set --config.model.compute_dtype=bfloat16'
    with pytest.raises(errors.UsageError, match=said):
        kernels(monkeypatch, 'cuda', n_ctx=4096, n_heads=24, **fields)
    assert kernels(monkeypatch, 'cpu', n_ctx=4096, n_heads=24, **fields)


@pytest.fixture
def ready(tmp_path, corpus_file):
    return helpers.prepared(tmp_path, corpus_file)


LENGTH = ('--config.train.total_tokens=4096', '--config.train.log_every_steps=1')


def test_a_run_says_what_it_is_made_in_and_may_go_on_in_another_dtype(ready, caplog):
    config, workdir = ready
    flags = (*LENGTH, '--config.checkpoint.every_steps=2', '--config.batch.device_windows=1')
    flags += ('--config.batch.batch_tokens=2048', '--config.batch.ramp_from_tokens=512')
    flags += ('--config.batch.ramp_over_tokens=2048', '--config.batch.ramp_stages=2')
    caplog.set_level('INFO')
    with helpers.stopped_after(2), pytest.raises(program.Preempted):
        train.main(helpers.args(config, workdir, *flags))
    assert 'attention dense: tiled, in float32' in caplog.text
    assert 'held-out text: ' in caplog.text
    assert 'of the work of training' in caplog.text
    assert 'microbatches' in caplog.text
    train.main(helpers.args(config, workdir, *flags, '--config.model.compute_dtype=bfloat16'))
    assert 'goes on with model.compute_dtype = float32 there, bfloat16 here' in caplog.text
    assert all(row['train/loss'] > 0 for row in metrics.read(workdir))


def test_little_is_scored_while_training(ready, caplog):
    config, workdir = ready
    caplog.set_level('INFO')
    flags = (*LENGTH, '--config.tokens.valid_fraction=0.5', '--config.tokens.dir=half')
    flags += ("--config.data.sets=('half',)", '--config.data.eval_sets.tokens=half')
    prepare_tokens.main(helpers.args(config, workdir, *flags))
    train.main(helpers.args(config, workdir, *flags, '--config.train.eval_max_tokens=2000'))
    (line,) = [r.getMessage() for r in caplog.records if 'held-out text' in r.getMessage()]
    assert int(line.split()[2].replace(',', '')) <= 2000


def test_no_more_is_held_out_of_a_corpus_than_asked_for(ready):
    config, workdir = ready

    def held_out(name, *flags):
        flags = (f'--config.tokens.dir={name}', '--config.tokens.valid_fraction=0.3', *flags)
        prepare_tokens.main(helpers.args(config, workdir, *flags))
        manifest = json.loads((workdir / name / token_manifest.NAME).read_text())
        return sum(record['text_bytes'] for record in manifest['splits']['valid'])

    assert held_out('some', '--config.tokens.valid_bytes=2000') <= 4000 < held_out('usual')
