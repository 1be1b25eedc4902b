# SPDX-License-Identifier: Apache-2.0
"""Every kernel beside the plain form: values and gradients, on every platform that can be had."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.configs import errors
from gptjax.models import attention, axes, masks
from gptjax.models.kernels import dots, flash, online, ring, tiled, xent
from gptjax.runtime import mesh as mesh_lib
from tests import helpers


@dataclasses.dataclass(frozen=True)
class Sinks(masks.Mask):
    """The first few positions and the last few: a form that the kernels were not written for."""

    first: int
    width: int

    def seen(self, query, key):
        return (query >= key) & ((key < self.first) | (query - key < self.width))


@dataclasses.dataclass(frozen=True)
class Prefix(masks.Mask):
    """The first positions see one another, the later ones all before them."""

    length: int

    def seen(self, query, key):
        return (query >= key) | (key < self.length)


def mask_of(width):
    return masks.Banded(width) if width else masks.Dense()


def plain(query, key, value, mask):
    positions = jnp.arange(query.shape[1])[None]
    seen = attention.visible(positions, positions, mask)
    turned = key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)
    return attention.attend(query, *turned, seen, lambda x: x)


def arrays(shape, n_kv_heads, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (shape, *[(*shape[:2], n_kv_heads, shape[3])] * 2)
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def with_gradients(attend, *found):
    """The output, and gradients of a sum that weighs every output differently."""

    def weighed(*args):
        out = attend(*args).astype(jnp.float32)
        return jnp.sum(jnp.sin(jnp.arange(out.size)).reshape(out.shape) * out), out

    (_, out), grads = jax.jit(jax.value_and_grad(weighed, (0, 1, 2), has_aux=True))(*found)
    return [out, *grads]


def agree(a, b, tolerance=2e-5):
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(
            x.astype(jnp.float32), y.astype(jnp.float32), atol=tolerance, rtol=tolerance
        )


def scaled(kernel, mask, **kwargs):
    def attend(query, key, value):
        return kernel(query * query.shape[3] ** -0.5, key, value, mask, **kwargs)

    return attend


MASKS = [*map(mask_of, (0, 1, 40, 100, 10_000)), Sinks(3, 20)]


@pytest.mark.parametrize('mask', [*MASKS, Prefix(70)])
@pytest.mark.parametrize('n_kv_heads', [4, 2, 1])
@pytest.mark.parametrize('length', [256, 96])
def test_tiles_equal_the_plain_form(mask, n_kv_heads, length):
    found = arrays((2, length, 4, 16), n_kv_heads)
    tiles = functools.partial(scaled(tiled.attend, mask, halve=True))
    expected = with_gradients(functools.partial(plain, mask=mask), *found)
    agree(with_gradients(tiles, *found), expected)


@pytest.mark.parametrize('mask', MASKS)
def test_a_mask_says_the_same_in_every_way(mask):
    grid = np.arange(96)
    seen = mask.seen(grid[:, None], grid[None])
    assert mask.mean_seen(96) == pytest.approx(seen.sum() / 96)
    np.testing.assert_array_equal(mask.splash(96)[:, :], seen)
    for start, end in ((0, 24), (24, 48), (72, 96)):
        found = np.flatnonzero(seen[start:end].any(axis=0))
        first, last = mask.span(start, end, 96)
        assert (first, last) == (found[0], found[-1] + 1)
    if mask.window:
        assert not (seen & (grid[:, None] - grid[None] >= mask.window)).any()


def test_tiles_in_bfloat16():
    found = arrays((3, 256, 4, 16), 2, jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in found]
    expected = with_gradients(functools.partial(plain, mask=mask_of(40)), *exact)
    agree(with_gradients(scaled(tiled.attend, mask_of(40), halve=True), *found), expected, 0.05)


@pytest.mark.parametrize('mask', [*MASKS, Prefix(70)])
@pytest.mark.parametrize(
    ('rows', 'n_kv_heads', 'length'), [(2, 4, 75), (1, 2, 96), (3, 1, 75), (1, 4, 20)]
)
def test_an_online_softmax_equals_the_plain_form(mask, rows, n_kv_heads, length, monkeypatch):
    monkeypatch.setattr(online, '_BLOCK', 32)
    found = arrays((rows, length, 4, 16), n_kv_heads)
    expected = with_gradients(functools.partial(plain, mask=mask), *found)
    agree(with_gradients(scaled(online.attend, mask, halve=True), *found), expected)


def test_an_online_softmax_in_bfloat16(monkeypatch):
    monkeypatch.setattr(online, '_BLOCK', 64)
    found = arrays((3, 256, 4, 16), 2, jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in found]
    expected = with_gradients(functools.partial(plain, mask=mask_of(40)), *exact)
    agree(with_gradients(scaled(online.attend, mask_of(40), halve=True), *found), expected, 0.05)


@pytest.mark.parametrize('axes_', [(8, 1, 1, 1), (2, 2, 2, 1)])
@pytest.mark.parametrize('mask', [masks.Dense(), masks.Banded(40)])
def test_an_online_softmax_on_meshes(mask, axes_, monkeypatch):
    """Blocks are of every device's own rows and heads: nothing travels in the loops."""
    monkeypatch.setattr(online, '_BLOCK', 32)
    monkeypatch.setattr(online, 'FROM', 64)
    found = arrays((8, 96, 4, 16), 2)
    expected = with_gradients(functools.partial(plain, mask=mask), *found)
    mesh = mesh_lib.Mesh(mesh_lib.Config(*axes_, slices=1, across='data'))
    attend = functools.partial(flash.attend, mask=mask)
    with mesh.scope():
        split = axes.spec('batch', 'length', 'act_heads', 'act_head_dim')
        sharding = jax.sharding.NamedSharding(mesh.mesh, split)
        spread = [jax.device_put(x, sharding) for x in found]
        compiled = jax.jit(functools.partial(with_gradients, attend)).lower(*spread).compile()
        agree(compiled(*spread), expected)
    text = compiled.as_text()
    assert 'all-to-all' not in text
    assert 'all-gather' not in text


def long_gradients(length: int, n_heads: int):
    """A compiled loss of attention over a long window, with its gradients."""
    query, key, value = arrays((1, length, n_heads, 8), 1)

    def loss(*found):
        return jnp.sum(flash.attend(*found, masks.Dense()) ** 2)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(query, key, value).compile()


def test_memory_of_long_windows_on_cpus_grows_with_their_length():
    """Weights of 16,384 tokens in two heads would take 2 GiB."""
    with helpers.one_device().scope():
        sizes = [
            long_gradients(n, 2).memory_analysis().temp_size_in_bytes for n in (4096, 8192, 16_384)
        ]
    assert sizes[2] - sizes[1] < 2.2 * (sizes[1] - sizes[0])
    assert sizes[2] < 2**26


def test_16k_tokens_on_cpus_equal_the_formula():
    """Takes its time in numpy: 268 million weights."""
    length = 16_384
    query, key, value = arrays((1, length, 1, 8), 1)
    with helpers.one_device().scope():
        total, found = long_gradients(length, 1)(query, key, value)
    q, k, v = (np.asarray(x[0, :, 0]) for x in (query, key, value))
    gradients, expected = [np.zeros_like(x) for x in (q, k, v)], 0.0
    for start in range(0, length, 1024):  # rows of the formula, with all of their weights
        rows = slice(start, start + 1024)
        att = q[rows] @ k.T * 8**-0.5
        att[np.arange(start, start + 1024)[:, None] < np.arange(length)] = -np.inf
        weights = np.exp(att - att.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        out = weights @ v
        expected += (out**2).sum()
        datt = weights * (2 * out @ v.T - (2 * out * out).sum(axis=1, keepdims=True)) * 8**-0.5
        gradients[0][rows] = datt @ k
        gradients[1] += datt.T @ q[rows]
        gradients[2] += weights.T @ (2 * out)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for ours, formula in zip(found, gradients, strict=True):
        np.testing.assert_allclose(ours[0, :, 0], formula, atol=2e-5)


@pytest.mark.parametrize('mask', [*map(mask_of, (0, 96, 200)), Sinks(3, 20), Prefix(70)])
@pytest.mark.parametrize('n_kv_heads', [2, 1])
def test_splash_interpreted_equals_the_plain_form(mask, n_kv_heads):
    found = arrays((1, 256, 2, 64), n_kv_heads)
    expected = with_gradients(functools.partial(plain, mask=mask), *found)
    splash = scaled(flash.splash, mask, interpret=True)
    agree(with_gradients(splash, *found), expected, 2e-4)


def test_splash_leaves_blocks_that_the_mask_empties_uncomputed():
    """A band of 128 over 1,024 places touches 15 of 64 blocks; a causal mask 36."""
    block = flash._block(1024, 128)
    assert block == 128
    band = masks.Banded(128).splash(1024)[:, :]
    blocks = band.reshape(8, block, 8, block).any(axis=(1, 3))
    assert blocks.sum() == 15
    assert flash._block(2048, 0) == 1024
    assert flash._block(384, 0) == 384


@pytest.mark.parametrize('context', [2, 4, 8])
@pytest.mark.parametrize('mask', [*map(mask_of, (0, 1, 20, 33, 10_000)), Sinks(3, 20)])
def test_ring_equals_the_plain_form(context, mask):
    mesh = mesh_lib.Mesh(mesh_lib.Config(8 // context, 1, 1, context, slices=1, across='data'))
    found = arrays((8, 128, 2, 8), 1)
    expected = with_gradients(functools.partial(plain, mask=mask), *found)
    with mesh.scope():
        around = with_gradients(functools.partial(flash.attend, mask=mask), *found)
    agree(around, expected)


def test_kernels_that_cannot_do_a_mask_step_aside():
    mesh = mesh_lib.Mesh(mesh_lib.Config(4, 1, 1, 2, slices=1, across='data'))
    with mesh.scope():
        assert flash.attend(*arrays((8, 128, 2, 8), 1), mask=Prefix(70)) is None


def test_a_form_that_sees_ahead_scores_windows_and_is_refused_a_cache(monkeypatch):
    monkeypatch.setitem(masks.FORMS, 'prefix', Prefix)
    for mask in [*MASKS, Prefix(1)]:
        assert not masks.sees_ahead(mask, 16)
    assert masks.sees_ahead(Prefix(2), 16)
    model = helpers.tiny_model(attention=('dense', 'prefix:length=5'))
    params, tokens = helpers.params_of(model), helpers.batch_of(2, 16, 64)['tokens']
    logits = helpers.applied(model)(params, tokens)
    changed = tokens.copy()
    changed[:, 4] = (changed[:, 4] + 1) % 64
    differs = np.abs(helpers.applied(model)(params, changed) - logits).max(axis=(0, 2)) > 1e-4
    assert differs[:5].all()
    with pytest.raises(errors.UsageError, match='sees ahead: such a model scores whole windows'):
        model.config.empty_cache(1, 16)


def ring_memory(context: int, length: int, mask: masks.Mask) -> int:
    """Bytes of temporaries on one device: forward and backward of one attention layer."""
    devices = jax.devices()[:context]
    mesh = mesh_lib.Mesh(mesh_lib.Config(1, 1, 1, context, slices=1, across='data'), devices)
    with mesh.scope():
        spec = jax.sharding.PartitionSpec(None, 'context')
        sharding = jax.sharding.NamedSharding(mesh.mesh, spec)
        x = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32, sharding=sharding)

        def loss(query, key, value):
            kernel = functools.partial(ring.attend, mask=mask, axis='context', size=context)
            out = jax.shard_map(kernel, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(
                query, key, value
            )
            return jnp.sum(out**2)

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_ring_memory_falls_with_the_devices():
    """32,768 tokens: what a device holds beside its tile of scores falls as 1 / devices."""
    tile = 4 * ring._TILE**2 * 4  # a few tiles of float32 scores, whatever the length
    two, four, eight = (ring_memory(n, 32_768, masks.Dense()) for n in (2, 4, 8))
    assert four - tile < 0.55 * two
    assert eight - tile < 0.55 * four


def test_ring_over_32k_tokens_equals_tiles():
    """Of a banded layer, for a dense one of this length takes minutes on two cores."""
    mesh = mesh_lib.Mesh(mesh_lib.Config(1, 1, 1, 8, slices=1, across='data'))
    found = arrays((1, 32_768, 1, 8), 1)
    with mesh.scope():
        around = jax.jit(functools.partial(flash.attend, mask=masks.Banded(300)))(*found)
    query, key, value = (np.asarray(x) for x in found)
    for at in (0, 299, 4095, 4096, 20_000, 32_767):
        first = max(0, at - 299)
        scores = query[0, at, 0] @ key[0, first : at + 1, 0].T * 8**-0.5
        weights = np.exp(scores - scores.max())
        expected = weights @ value[0, first : at + 1, 0] / weights.sum()
        np.testing.assert_allclose(around[0, at, 0], expected, atol=1e-5)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('sizes', [(32, 16), (16, 32)])
@pytest.mark.parametrize('use_bias', [True, False])
def test_linear_equals_an_einsum(dtype, sizes, use_bias):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (4, 8, sizes[0])).astype(dtype)
    weight = jax.random.normal(keys[1], (sizes[0], 2, sizes[1] // 2))
    bias = jax.random.normal(keys[2], (2, sizes[1] // 2))

    def ours(x, weight, bias):
        return dots.linear('BLD,DHK->BLHK', x, weight, bias if use_bias else None)

    def einsum(x, weight, bias):
        y = jnp.einsum('BLD,DHK->BLHK', x, weight.astype(dtype).astype(jnp.float32))
        return y + bias[None, None] * use_bias

    exact = (x.astype(jnp.float32), weight, bias)
    expected = with_gradients(einsum, *exact)
    agree(with_gradients(ours, x, weight, bias), expected, 1e-5 if dtype == jnp.float32 else 0.1)


@pytest.mark.parametrize(('use_bias', 'z_loss'), [(True, 0.0), (False, 0.0), (True, 0.1)])
@pytest.mark.parametrize('sizes', [(1, 1, 1, 1), (2, 2, 2, 1), (1, 1, 4, 2), (1, 8, 1, 1)])
def test_chunked_loss_equals_the_whole(monkeypatch, sizes, use_bias, z_loss):
    """Its gradients, too, of weights as well, which may be any numbers."""
    monkeypatch.setattr(xent, 'CHUNK_BYTES', 4 * 2 * 3 * 32)  # three places or so of two rows
    n_devices = int(np.prod(sizes))
    mesh = mesh_lib.Mesh(
        mesh_lib.Config(*sizes, slices=1, across='data'), jax.devices()[:n_devices]
    )
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (8, 12, 16))
    table = jax.random.normal(keys[1], (32, 16))
    bias = jax.random.normal(keys[2], (32,)) if use_bias else None
    targets = jax.random.randint(keys[3], (8, 12), 0, 32)
    drawn = np.random.default_rng(0)
    weights = jnp.asarray(drawn.normal(size=(8, 12)) * (drawn.random((8, 12)) < 0.7), jnp.float32)

    def whole(weights, hidden, table, bias=None):
        logits = hidden @ table.T + (0 if bias is None else bias)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        added = z_loss * jax.nn.logsumexp(logits, -1) ** 2
        return jnp.sum((added - chosen) * weights), jnp.sum(added * weights)

    def chunked(weights, hidden, table, bias=None):
        return xent.nats(hidden, table, bias, targets, weights, z_loss)

    arrays = (weights, hidden, table, bias)[: 3 + use_bias]
    which = tuple(range(len(arrays)))
    with jax.numpy_rank_promotion('allow'):
        expected = jax.value_and_grad(whole, which, has_aux=True)(*arrays)
    with mesh.scope():
        found = jax.jit(jax.value_and_grad(chunked, which, has_aux=True))(*arrays)
        alone = jax.jit(chunked)(*arrays)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(alone, expected[0], rtol=1e-5)
    agree(found[1], expected[1])


@pytest.mark.parametrize(
    ('kind', 'rows', 'vocab', 'places'),
    [
        ('cpu', 4, 50_257, 64),  # 64 MiB of logits
        ('TPU v5 lite', 4, 50_257, 512),  # a table's way through memory takes an eighth: 3,850
        ('TPU v5 lite', 1, 50_257, 1024),
        ('TPU v5 lite', 4, 1_000_000, 32),  # 0.5 GiB of logits
        ('NVIDIA H100 80GB HBM3', 4, 50_257, 1024),
    ],
)
def test_chunks_suit_the_device(monkeypatch, kind, rows, vocab, places):
    monkeypatch.setattr(axes, 'device_kind', lambda: kind)
    assert xent._chunk(rows, 1024, vocab) == places


def test_no_logits_of_a_whole_batch_are_held():
    model = helpers.tiny_model(n_vocab=50_000, n_ctx=512)
    params = jax.eval_shape(model.init_params, jax.random.key(0))
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        __import__('flax').linen.meta.unbox(params),
    )
    loss = helpers.loss_of(model)
    batch = helpers.batch_of(8, 512, 50_000)
    step = jax.jit(jax.grad(lambda p, b: loss(p, b, jax.random.key(0))[0]))
    with helpers.one_device().scope():
        found = step.lower(params, batch).compile().memory_analysis()
    assert found.temp_size_in_bytes < 8 * 512 * 50_000 * 4 / 2
