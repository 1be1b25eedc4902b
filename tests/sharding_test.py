# SPDX-License-Identifier: Apache-2.0
"""One device = every factorisation of 8 over the four axes; axes that do not fit raise."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gptjax.configs import errors, sizes
from gptjax.evals import context
from gptjax.models import axes, heads, layers, weights
from gptjax.runtime import mesh as mesh_lib
from gptjax.runtime import replicas
from gptjax.training import step as step_lib
from tests import helpers

FACTORISATIONS = [
    sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == 8
]
SAMPLE = [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2)]
_MODEL = {
    'n_heads': 8,
    'd_head': 8,
    'attention': ('dense', 'banded'),
    'band_width': 4,
    'residual_dropout': 0.1,
}


def train(mesh, steps=2, model=None, **how):
    """Losses and final parameters of a few steps with dropout and accumulation."""
    model = model or helpers.tiny_model(**_MODEL)
    plan = helpers.plan_of(16 * 16, 16)
    optimizer = helpers.optimizer_of(plan, model, eps=1e-3)  # tames what Adam makes of rounding
    found = []
    with mesh.scope():
        target = step_lib.abstract(model.init_params, optimizer, mesh.shardings)
        train_step = step_lib.make_train_step(
            helpers.loss_of(model),
            optimizer,
            0,
            step_lib.Options(device_windows=8 // mesh.rows(), **how),
            target,
        )
        state = step_lib.init(model.init_params, optimizer, 0, target)
        for step in range(steps):
            batch = mesh.put(helpers.batch_of(16, 16, 64, seed=step))
            state, metrics = train_step(state, batch)
            found.append(float(metrics['train/loss']))
        shardings = jax.tree.map(
            lambda x, t: x.sharding.is_equivalent_to(t.sharding, x.ndim), state, target
        )
    assert all(jax.tree.leaves(shardings))
    return found, jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope='module')
def alone():
    return train(helpers.one_device())


def agrees(sizes, alone, **how):
    losses, params = train(mesh_lib.Mesh(mesh_lib.Config(*sizes, slices=1, across='data')), **how)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (params, alone[1])), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.parametrize('sizes', SAMPLE)
def test_some_meshes_agree_with_one_device(sizes, alone):
    agrees(sizes, alone)


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [f for f in FACTORISATIONS if f not in SAMPLE])
def test_every_other_mesh_agrees_with_one_device(sizes, alone):
    agrees(sizes, alone)


@pytest.mark.slow
def test_meshes_agree_with_one_device_by_xlas_generator(alone):
    rbg = train(helpers.one_device(), dropout_bits='rbg')
    assert rbg[0] != alone[0]
    for each in SAMPLE:
        agrees(each, rbg, dropout_bits='rbg')


@pytest.mark.parametrize('impl', ['threefry2x32', 'rbg'])
def test_dropout_draws_the_same_on_any_mesh_and_in_any_microbatch(impl):
    x, key = jnp.ones((16, 8, 8)), jax.random.key(0, impl=impl)

    @jax.jit
    def dropped(x, numbers):
        variables, rngs = {'rows': {'numbers': numbers}}, {'dropout': key}
        return layers.Dropout(0.5).apply(variables, x, rngs=rngs)

    alone = dropped(x, jnp.arange(16))
    assert 0.4 < jnp.mean(alone == 0) < 0.6
    np.testing.assert_array_equal(dropped(x[8:], jnp.arange(8, 16)), alone[8:])
    for each in ((2, 2, 2, 1), (1, 4, 1, 2), (8, 1, 1, 1)):
        mesh = mesh_lib.Mesh(mesh_lib.Config(*each, slices=1, across='data'))
        with mesh.scope():
            placed = mesh.put({'x': np.asarray(x), 'numbers': np.arange(16)})
            found = dropped(placed['x'], placed['numbers'])
        np.testing.assert_array_equal(found, alone)


FAMILIES = {
    'gpt1': {'size': 'gpt1', 'd_model': 64, 'n_heads': 8, 'd_head': 8, 'd_ff': 64},
    'gptj': {
        'size': 'gptj-6b',
        'd_model': 64,
        'n_heads': 8,
        'd_head': 8,
        'rotary_dims': 4,
        'd_ff': 64,
    },
    'llama': {
        'size': 'smollm2-135m',
        'd_model': 64,
        'n_heads': 8,
        'n_kv_heads': 4,
        'd_head': 8,
        'rotary_dims': 8,
        'd_ff': 64,
    },
    'lstm': {'cell': 'lstm', 'd_model': 64, 'bptt_tokens': 8},
    'gru': {'cell': 'gru', 'd_model': 64, 'bptt_tokens': 0},
}

SOME = ('llama', 'lstm')  # in make test, as each takes a minute


def of_family(name):
    fields = FAMILIES[name] | {'n_layers': 2, 'n_vocab': 64, 'n_ctx': 16}
    size, cell = fields.pop('size', None), fields.pop('cell', None)
    section = sizes.model(size, **fields) if size else sizes.rnn(cell, **fields)
    for field in ('embed_dropout', 'attention_dropout', 'residual_dropout'):
        if field in section:
            section[field] = 0.0
    return heads.build(section)


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=[] if n in SOME else pytest.mark.slow) for n in FAMILIES]
)
def test_every_family_agrees_on_some_meshes(name):
    model = of_family(name)
    alone = train(helpers.one_device(), steps=1, model=model)
    for split in ((2, 2, 1, 2), (1, 2, 4, 1)):
        found = train(
            mesh_lib.Mesh(mesh_lib.Config(*split, slices=1, across='data')), steps=1, model=model
        )
        np.testing.assert_allclose(found[0], alone[0], rtol=1e-5)
        for a, b in zip(*map(jax.tree.leaves, (found[1], alone[1])), strict=True):
            np.testing.assert_allclose(a, b, atol=5e-5)


def test_memory_falls_with_the_devices():
    mesh = mesh_lib.Mesh(mesh_lib.Config(1, 4, 2, 1, slices=1, across='data'))
    model = helpers.tiny_model(**_MODEL)
    optimizer = helpers.optimizer_of(helpers.plan_of(256, 16), model)
    target = step_lib.abstract(model.init_params, optimizer, mesh.shardings)
    for leaf in jax.tree.leaves(target):
        if leaf.size > 2000:  # matrices, their moments too
            assert np.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size / 8


def test_collision_names_the_parameter():
    mesh = mesh_lib.Mesh(mesh_lib.Config(1, 8, 1, 1, slices=1, across='data'))
    init = axes.matrix(nn.initializers.zeros, 'heads', 'mlp', inputs=(0,))
    box = {'layer': {'w': init(jax.random.key(0), (8, 8), jnp.float32)}}
    with pytest.raises(errors.UsageError, match=r"\['layer'\]\['w'\].*'heads' and 'mlp'.*'tensor'"):
        mesh.shardings(box)


def test_a_model_that_cannot_be_traced_on_a_mesh_is_one_line():
    mesh = mesh_lib.Mesh(mesh_lib.Config(1, 2, 4, 1, slices=1, across='data'))
    mesh.check_model(vocab=260, embed=64)
    with pytest.raises(
        errors.UsageError, match=r'tensor = 4; .* pad: --config\.model\.n_vocab=260'
    ):
        mesh.check_model(vocab=257, embed=64)
    with pytest.raises(
        errors.UsageError, match='axis embed of size 63 does not divide .* fsdp = 2'
    ):
        mesh.check_model(vocab=260, embed=63)


def test_what_does_not_divide_names_parameter_axis_and_remedy():
    mesh = mesh_lib.Mesh(mesh_lib.Config(1, 1, 8, 1, slices=1, across='data'))
    model = helpers.tiny_model(n_heads=8, d_head=8, n_vocab=50)
    boxed = jax.eval_shape(model.init_params, jax.random.key(0))
    said = r'token_embedding.*vocab of size 50.*tensor = 8.*n_vocab'
    with pytest.raises(errors.UsageError, match=said):
        mesh.shardings(boxed)


def test_constraints_need_rules_where_there_is_a_mesh():
    mesh = mesh_lib.Mesh(mesh_lib.Config(8, 1, 1, 1, slices=1, across='data'))
    with jax.set_mesh(mesh.mesh), pytest.raises(ValueError, match='no axis rules are in force'):
        axes.constrain(jnp.zeros((8, 4)), 'batch', 'length')
    with mesh.scope():
        rules = tuple((n, t) for n, t in nn.get_logical_axis_rules() if n != 'length')
        with nn.logical_axis_rules(rules), pytest.raises(ValueError, match="do not name 'length'"):
            axes.constrain(jnp.zeros((8, 4)), 'batch', 'length')


@pytest.mark.parametrize(
    ('sizes', 'said'),
    [((3, 1, 1, 1), 'does not make up 8 devices'), ((-1, 3, 1, 1), 'does not make up 8 devices')],
)
def test_mesh_sizes(sizes, said):
    with pytest.raises(errors.UsageError, match=said):
        mesh_lib.Mesh(mesh_lib.Config(*sizes, slices=1, across='data'))


def test_mesh_fills_in_and_checks_batches():
    mesh = mesh_lib.Mesh(mesh_lib.Config(-1, 2, 1, 2, slices=1, across='data'))
    assert dict(mesh.mesh.shape) == {'data': 2, 'fsdp': 2, 'tensor': 1, 'context': 2}
    mesh.check_batch(8, 16)
    with pytest.raises(errors.UsageError, match='use a multiple of 4 windows'):
        mesh.check_batch(6, 16)
    with pytest.raises(errors.UsageError, match='evaluate.batch_windows'):
        mesh.check_batch(6, 16, field='evaluate.batch_windows')
    with pytest.raises(errors.UsageError, match='does not divide over context = 2'):
        mesh.check_batch(4, 15)
    with pytest.raises(errors.UsageError, match='one of them may be -1'):
        mesh_lib.Config(-1, -1, 1, 1, slices=1, across='data')
    rows, columns = mesh.region(8, 16)
    assert rows.tolist() == list(range(8))
    assert columns == slice(0, 16)


SLICES = [((2, 2, 2, 1), 2, 'data'), ((1, 4, 1, 2), 2, 'fsdp'), ((4, 1, 1, 2), 4, 'data')]


@pytest.mark.parametrize(('sizes', 'slices', 'across'), SLICES)
def test_slices_agree_with_one_device(sizes, slices, across, alone):
    mesh = mesh_lib.Mesh(mesh_lib.Config(*sizes, slices=slices, across=across))
    axis = ('data', 'fsdp', 'tensor', 'context').index(across)
    groups = np.split(mesh.mesh.devices, slices, axis)
    size = 8 // slices
    assert [{d.id // size for d in group.ravel()} for group in groups] == [
        {number} for number in range(slices)
    ]
    losses, params = train(mesh)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (params, alone[1])), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.parametrize(
    ('sizes', 'slices', 'across', 'said'),
    [
        ((1, 8, 1, 1), 2, 'data', 'mesh.data = 1 does not divide over 2 slices.*across=fsdp'),
        ((8, 1, 1, 1), 2, 'fsdp', 'mesh.fsdp = 1 does not divide over 2 slices.*across=data'),
        ((8, 1, 1, 1), 3, 'data', 'mesh.slices = 3, and the devices are in 1 slices'),
        ((8, 1, 1, 1), 0, 'data', 'mesh.slices must be above 0, or -1'),
        ((8, 1, 1, 1), 2, 'tensor', 'across'),
    ],
)
def test_slices_that_do_not_fit(sizes, slices, across, said):
    with pytest.raises(errors.UsageError, match=said):
        mesh_lib.Mesh(mesh_lib.Config(*sizes, slices=slices, across=across))


def test_devices_say_their_slice():
    def device(number, platform, **more):
        return types.SimpleNamespace(platform=platform, process_index=number // 2, **more)

    tpus = [device(i, 'tpu', slice_index=i % 2) for i in range(8)]
    found = mesh_lib._slices(tpus, -1)
    assert [[d.slice_index for d in group] for group in found] == [[0] * 4, [1] * 4]
    assert len(mesh_lib._slices([device(i, 'tpu') for i in range(8)], -1)) == 1
    gpus = [device(i, 'gpu') for i in range(8)]
    assert [len(mesh_lib._slices(gpus, slices)) for slices in (1, 4, -1)] == [1, 4, 4]
    apart = [device(i, 'gpu', slice_index=i // 4) for i in range(8)]  # a process each
    assert [len(mesh_lib._slices(apart, slices)) for slices in (1, 2, -1)] == [1, 2, 2]
    with pytest.raises(errors.UsageError, match='are in 2 slices; set --config.mesh.slices=2'):
        mesh_lib._slices(tpus, 1)
    with pytest.raises(errors.UsageError, match='unlike sizes'):
        mesh_lib._slices(tpus[:7], -1)


class _Elsewhere:
    """A device of another process."""

    def __init__(self, process_index):
        self.process_index = process_index


def test_hosts_may_own_rows_that_are_not_neighbours(monkeypatch):
    """On a torus the devices of a host need not be neighbours in the mesh."""
    mesh = mesh_lib.Mesh(mesh_lib.Config(1, 8, 1, 1, slices=1, across='data'))
    devices = np.array([_Elsewhere(0 if i in (0, 1, 5) else 1) for i in range(8)])
    shape = types.SimpleNamespace(devices=devices.reshape(1, 8, 1, 1), shape=mesh.mesh.shape)
    monkeypatch.setattr(mesh, 'mesh', shape)
    rows, columns = mesh.region(16, 4)
    assert rows.tolist() == [0, 1, 2, 3, 10, 11]
    assert columns == slice(0, 4)


@pytest.mark.parametrize('split', [(2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 1, 8), (8, 1, 1, 1)])
def test_what_is_put_is_what_comes_out(split):
    """Arrays of every rank: labels, text, choices, images."""
    mesh = mesh_lib.Mesh(mesh_lib.Config(*split, slices=1, across='data'))
    shapes = {'label': (16,), 'text': (16, 8), 'choices': (16, 3, 8), 'images': (16, 5, 5, 3)}
    whole = {name: np.random.default_rng(0).normal(size=shape) for name, shape in shapes.items()}
    whole = {name: x.astype(np.float32) for name, x in whole.items()}
    found = mesh.put(whole)
    for name, x in whole.items():
        np.testing.assert_array_equal(found[name], x)
        held = found[name].sharding.shard_shape(x.shape)
        length = {2: (8 // split[3],), 3: (3, 8 // split[3])}.get(x.ndim, x.shape[1:])
        assert held == (16 // (split[0] * split[1]), *length)
    if split[0] == 8:
        with pytest.raises(errors.UsageError, match='label: axis 0.*use a multiple of 8'):
            mesh.put({'label': np.zeros(12)})


ASKED = (
    np.random.default_rng(0).integers(0, 64, (7, 16)).astype(np.int32),
    np.random.default_rng(1).integers(0, 64, 7).astype(np.int32),
)


@pytest.fixture(scope='module')
def row_by_row():
    """Loss and gradient by distance, of one row at a time on one device."""
    model = helpers.tiny_model(**_MODEL | {'residual_dropout': 0.0})
    asked = (model, helpers.params_of(model), *ASKED, 1)
    return [*context.loss_by_length(*asked).values()], context.gradient_by_distance(*asked)


@pytest.mark.parametrize('sizes', [(1, 2, 2, 1), (2, 1, 1, 2)])
def test_what_context_is_worth_is_the_same_on_any_mesh(sizes, row_by_row):
    """Also where the last batch does not divide over it; by rows, it was NaN on one."""
    model = helpers.tiny_model(**_MODEL | {'residual_dropout': 0.0})
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = mesh_lib.Mesh(mesh_lib.Config(*sizes, slices=1, across='data'), devices)
    with mesh.scope():
        target = weights.target(model, mesh.shardings)
        params = helpers.params_of(model)
        placed = jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), params, target)
        asked = (model, placed, *ASKED, 4, lambda n: None, mesh.rows())
        losses = [*context.loss_by_length(*asked).values()]
        norms = context.gradient_by_distance(*asked)
    np.testing.assert_allclose(losses, row_by_row[0], rtol=1e-5)
    np.testing.assert_allclose(norms, row_by_row[1], rtol=1e-4)


@pytest.mark.parametrize(
    ('rows', 'device_windows', 'each'), [(8, 0, 8), (8, 3, 2), (8, 8, 8), (3, 2, 1), (2, 4, 2)]
)
def test_a_microbatch_is_as_large_as_divides(rows, device_windows, each):
    """Of GPT-3's ramp on 512 devices the last stage has three windows a device."""
    mesh = mesh_lib.Mesh(mesh_lib.Config(2, 4, 1, 1, slices=1, across='data'))
    assert replicas.most(rows, device_windows) == each
    with mesh.scope():
        assert replicas.at_once(rows * 4, device_windows) == each * 4
