# SPDX-License-Identifier: Apache-2.0
"""Every experiment and every sweep point: built, checked, its train step shape-evaluated."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import train
from gptjax.configs import cli, sweep
from gptjax.models import heads
from gptjax.runtime import mesh as mesh_lib
from gptjax.sweeps import points
from gptjax.training import optim
from gptjax.training import plan as plan_lib
from gptjax.training import step as step_lib
from tests import conftest, helpers

EXPERIMENTS = conftest.ROOT / 'experiments'
MODULES = sorted(
    '.'.join(p.relative_to(conftest.ROOT).with_suffix('').parts)
    for p in EXPERIMENTS.rglob('*.py')
    if p.name != '__init__.py'
)
CASES = [(name, variant) for name in MODULES for variant in importlib.import_module(name).VARIANTS]
TRAINED = [case for case in CASES if 'model=ngram' not in case[1]]  # the rest is counted


@pytest.mark.parametrize('name', MODULES)
def test_is_a_lab_record(name):
    doc = importlib.import_module(name).__doc__
    for part in ('Command', 'Expected time:', 'Expected number:'):
        assert part in doc, f'{name} has no {part}'
    lines = (conftest.ROOT / (name.replace('.', '/') + '.py')).read_text().splitlines()
    assert 20 <= len(lines) <= 80


@pytest.mark.parametrize(('name', 'variant'), TRAINED)
def test_builds_and_its_step_has_the_right_shapes(name, variant):
    module = importlib.import_module(name)
    config = module.get_config(variant)
    assert config.is_locked
    with pytest.raises(AttributeError):
        config.optim.peak_rl = 1.0
    sections = train.Sections(config)
    model = heads.LanguageModel(sections.model)
    total = config.train.total_tokens or 10**12
    plan = plan_lib.of_tokens(sections.batch, sections.model.n_ctx, total)
    optimizer = optim.make(sections.optim, plan, heads.describe(model))
    train_step = step_lib.make_train_step(
        helpers.loss_of(model),
        optimizer,
        config.seed,
        step_lib.Options(device_windows=sections.batch.device_windows),
    )
    mesh = helpers.one_device()
    shape = (max(2, sections.batch.device_windows * 2), sections.model.n_ctx)
    batch = {
        'tokens': jax.ShapeDtypeStruct(shape, jnp.int32),
        'targets': jax.ShapeDtypeStruct(shape, jnp.int32),
        'weights': jax.ShapeDtypeStruct(shape, jnp.float32),
    }
    with mesh.scope():
        state = step_lib.abstract(model.init_params, optimizer, mesh.shardings)
        after, metrics = jax.eval_shape(train_step, state, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert metrics['train/loss'].shape == ()


@pytest.mark.parametrize(('name', 'variant'), TRAINED)
def test_sharding_divides(name, variant):
    """Over fsdp and, with a padded vocabulary, over tensor, on this machine's 8 devices."""
    config = importlib.import_module(name).get_config(variant)
    with config.unlocked():
        config.model.n_vocab = -(-config.model.n_vocab // 128) * 128
    sections = train.Sections(config)
    model = heads.LanguageModel(sections.model)
    boxed = jax.eval_shape(model.init_params, jax.random.key(0))
    odd = config.model.family == 'gpt' and config.model.n_heads % 2
    sizes = [(8, 1)] if odd else [(8, 1), (4, 2)]
    for fsdp, tensor in sizes:
        mesh = mesh_lib.Mesh(mesh_lib.Config(1, fsdp, tensor, 1, slices=1, across='data'))
        shardings = mesh.shardings(boxed)
        per_device = sum(
            np.prod(s.shard_shape(x.shape))
            for x, s in zip(_plain(boxed), jax.tree.leaves(shardings), strict=True)
        )
        total = sum(x.size for x in _plain(boxed))
        assert per_device < 0.2 * total


@pytest.mark.parametrize(('name', 'variant'), CASES)
def test_tiny_keeps_the_structure(name, variant):
    config = importlib.import_module(name).get_config(variant)
    small = cli.tiny(config)
    structure = ('family', 'attention', 'norm', 'positions', 'activation', 'cell', 'order')
    for field in (f for f in structure if f in config.model):
        assert small.model[field] == config.model[field]
    heads.configure(small.model)


@pytest.mark.parametrize('name', MODULES)
def test_sweep_points_build(name):
    module = importlib.import_module(name)
    for variant in module.VARIANTS if hasattr(module, 'sweep') else ():
        found = sweep.points(module, name, variant)
        swept = points.of_sweep(module.get_config(variant), found, 'root')
        assert swept.keys() == found.keys()
        for point in swept.values():
            if not point.is_counted:
                train.Sections(point.config)


def _plain(boxed):
    return jax.tree.leaves(boxed)
