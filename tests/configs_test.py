# SPDX-License-Identifier: Apache-2.0
"""Every number of the configs against the papers' tables."""

import dataclasses
import doctest
import importlib
import typing

import jax
import ml_collections
import pytest

from gptjax.configs import base, cli, errors, fields, lookup, sizes, spec, sweep
from gptjax.configs.sections import training
from gptjax.data import documents, loader, tokens
from gptjax.evals import perplexity, suite
from gptjax.models import gpt, heads, kneser_ney
from gptjax.runtime import checkpoint, mesh
from gptjax.sampling import engine, options
from gptjax.text import vocabulary
from gptjax.training import optim, plan, section

OWNERS = {
    'corpus': documents.Config,
    'tokenizer': vocabulary.Config,
    'tokens': tokens.Config,
    'data': loader.Config,
    'model': gpt.Config,
    'batch': plan.Config,
    'ngram': kneser_ney.Config,
    'optim': optim.Config,
    'train': section.Config,
    'evaluate': perplexity.Config,
    'suite': suite.Config,
    'checkpoint': checkpoint.Config,
    'mesh': mesh.Config,
    'decode': options.Options,
    'engine': engine.Config,
}

# GPT-3 paper, Table 2.1 as printed: layers, width, heads, head width, batch (M tokens), rate.
TABLE_2_1 = {
    '125m': (12, 768, 12, 64, 0.5, 6.0e-4),
    '350m': (24, 1024, 16, 64, 0.5, 3.0e-4),
    '760m': (24, 1536, 16, 96, 0.5, 2.5e-4),
    '1.3b': (24, 2048, 24, 128, 1.0, 2.0e-4),
    '2.7b': (32, 2560, 32, 80, 1.0, 1.6e-4),
    '6.7b': (32, 4096, 32, 128, 2.0, 1.2e-4),
    '13b': (40, 5140, 40, 128, 2.0, 1.0e-4),
    '175b': (96, 12288, 96, 128, 3.2, 0.6e-4),
}
# Parameters in millions: Table D.1 as printed, and exactly with heads x head width = width.
TABLE_D_1 = {
    '125m': (125, 125.2),
    '350m': (356, 355.9),
    '760m': (760, 760.3),
    '1.3b': (1320, 1315.7),
    '2.7b': (2650, 2651.6),
    '6.7b': (6660, 6658.4),
    '13b': (12850, 12853.4),
    '175b': (174600, 174604.3),
}
GPT2 = {
    'small': (12, 768, 12, 124_439_808),
    'medium': (24, 1024, 16, 354_823_168),
    'large': (36, 1280, 20, 774_030_080),
    'xl': (48, 1600, 25, 1_557_611_200),
}


def count(section: ml_collections.ConfigDict) -> int:
    """Parameters of a model section, without an array."""
    model = heads.build(section)
    shapes = jax.eval_shape(model.init_params, jax.random.key(0))
    return sum(x.size for x in jax.tree.leaves(shapes))


def experiment(name: str, arg: str = '') -> ml_collections.ConfigDict:
    return importlib.import_module(f'experiments.{name}').get_config(arg)


def test_every_section_has_an_owner_with_the_same_fields():
    config = base.get_config()
    sections = {k for k, v in config.items() if isinstance(v, ml_collections.ConfigDict)}
    assert sections == set(OWNERS)
    for name, owner in OWNERS.items():
        named = [field.name for field in dataclasses.fields(owner)]
        if name == 'optim':  # durations name their unit in the config
            durations = {'warmup', 'decay', 'cooldown'}
            named = [f'{n}_tokens' if n in durations else n for n in named if n != 'unit']
        assert sorted(config[name]) == sorted(named), name
        defaults = [
            f.name for f in dataclasses.fields(owner) if f.default is not dataclasses.MISSING
        ]
        assert not defaults, f'{owner} hides defaults: {defaults}'
    for name, owner in OWNERS.items():
        if name in ('optim', 'data'):
            {'optim': optim, 'data': loader}[name].configure(config[name])
        else:
            fields.build(owner, config[name], name)


def test_a_field_that_its_owner_does_not_have_is_one_line():
    section = fields.values(base.SECTIONS['batch'])
    section.rampp = 3
    with pytest.raises(
        errors.UsageError, match=r"^the batch section has the unknown field 'rampp'$"
    ):
        fields.build(plan.Config, section, 'batch')
    del section.rampp, section.device_windows
    with pytest.raises(errors.UsageError, match=r"^the batch section lacks 'device_windows'$"):
        fields.build(plan.Config, section, 'batch')


def test_tuples_of_another_type_are_one_line():
    tried = 0
    for name, owner in OWNERS.items():
        section = base.section_of(name, 'gpt')
        names = [field.name for field in dataclasses.fields(owner)]
        given = {f: section[f].default if f in section else None for f in names}
        for field, kind in typing.get_type_hints(owner).items():
            of, *more = typing.get_args(kind) or (None,)
            if name != 'decode' and of in (int, float, str) and more == [...]:
                tried += 1
                wrong = (3,) if of is str else ('nan',)
                with pytest.raises(errors.UsageError, match=rf'{name}\.{field} = .* must hold'):
                    fields.build(owner, given | {field: wrong}, name)
    assert tried > 8


@pytest.mark.parametrize('unit', training.UNITS)
def test_durations_are_in_any_unit(unit):
    section = base.optim(unit, **{f'warmup_{unit}': 7})
    config = optim.configure(section)
    assert (config.unit, config.warmup) == (unit, 7)
    assert base.field_of(f'optim.warmup_{unit}').makes_run
    with pytest.raises(errors.UsageError, match='counts in one unit'):
        optim.configure({k: v for k, v in section.items() if not k.startswith('warmup')})


@pytest.mark.parametrize('size', TABLE_2_1)
def test_gpt3_is_table_2_1(size):
    n_layers, d_model, n_heads, d_head, batch, rate = TABLE_2_1[size]
    assert sizes.GPT3_PRINTED[size] == (n_layers, d_model, n_heads, d_head)
    assert sizes.GPT3_RECIPE[size] == (batch, rate)
    config = experiment('gpt3.pretrain', f'size={size}')
    model = config.model
    effective = {'1.3b': (24, 2048, 16, 128), '13b': (40, 5120, 40, 128)}
    expected = effective.get(size, (n_layers, d_model, n_heads, d_head))
    assert (model.n_layers, model.d_model, model.n_heads, model.d_head) == expected
    assert model.n_heads * model.d_head == model.d_model
    assert model.d_ff == 4 * model.d_model
    assert (model.n_ctx, model.n_vocab, model.norm) == (2048, 50257, 'pre')
    assert model.attention == ('dense', 'banded')
    assert model.band_width == 256  # ours
    assert config.optim.peak_lr == rate
    assert (config.optim.b1, config.optim.b2, config.optim.eps) == (0.9, 0.95, 1e-8)
    assert (config.optim.clip_norm, config.optim.weight_decay) == (1.0, 0.1)
    assert (config.optim.warmup_tokens, config.optim.decay_tokens) == (375e6, 260e9)
    assert (config.optim.schedule, config.optim.final_lr_fraction) == ('cosine', 0.1)
    assert config.train.total_tokens == 300e9
    assert config.batch.batch_tokens == pytest.approx(batch * 1e6, rel=0.05)
    assert config.batch.ramp_from_tokens == 32768
    assert 4e9 <= config.batch.ramp_over_tokens <= 12e9


@pytest.mark.parametrize('size', TABLE_D_1)
def test_gpt3_counts_are_table_d_1(size):
    printed, exact = TABLE_D_1[size]
    millions = count(sizes.model(f'gpt3-{size}')) / 1e6
    assert round(millions, 1) == exact
    assert millions == pytest.approx(printed, rel=0.004)


def test_gpt3_as_printed_would_count_otherwise():
    xl = count(sizes.model('gpt3-1.3b', **sizes.GPT3_PRINTED['1.3b']._asdict()))
    assert round(xl / 1e6, 1) == 1517.1
    wide = {'d_model': 5140, 'd_head': 5140 / 40, 'd_ff': 4 * 5140}
    assert wide['d_head'] != 128  # 5,140 does not go into 40 heads of 128


@pytest.mark.parametrize('size', GPT2)
def test_gpt2_is_the_released_model(size):
    n_layers, d_model, n_heads, parameters = GPT2[size]
    config = experiment('gpt2.pretrain', f'size={size}')
    model = config.model
    assert (model.n_layers, model.d_model, model.n_heads) == (n_layers, d_model, n_heads)
    assert (model.n_ctx, model.n_vocab, model.norm_eps, model.norm) == (1024, 50257, 1e-5, 'pre')
    assert (model.init_std, model.position_init_std) == (0.02, 0.01)
    assert model.residual_init_std == pytest.approx(0.02 / (2 * n_layers) ** 0.5)
    assert config.batch.batch_tokens == 512 * 1024
    assert count(model) == parameters


def test_gpt1_is_the_paper():
    config = experiment('gpt1.pretrain')
    model, optim_ = config.model, config.optim
    assert (model.n_layers, model.d_model, model.n_heads, model.d_ff) == (12, 768, 12, 3072)
    assert (model.n_ctx, model.n_vocab, model.norm) == (512, 40478, 'post')
    assert (model.init_std, model.position_init_std, model.residual_init_std) == (0.02,) * 3
    assert (model.embed_dropout, model.attention_dropout, model.residual_dropout) == (0.1,) * 3
    assert count(model) == 116_534_784
    assert config.batch.batch_tokens == 64 * 512
    assert (optim_.peak_lr, optim_.weight_decay, optim_.final_lr_fraction) == (2.5e-4, 0.01, 0.0)
    assert optim_.warmup_tokens == 2000 * 64 * 512
    assert (optim_.b1, optim_.b2, optim_.eps, optim_.clip_norm) == (0.9, 0.999, 1e-8, 1.0)
    assert (config.train.total_epochs, config.train.total_tokens) == (100.0, 0)


@pytest.mark.parametrize(
    ('size', 'parameters'),
    [
        ('gptj-6b', 6_050_882_784),
        ('kogpt-6b', 6_166_502_400),
        ('smollm2-135m', 134_515_008),
        ('smollm2-360m', 361_821_120),
    ],
)
def test_published_sizes_have_the_published_counts(size, parameters):
    assert count(sizes.model(size)) == parameters


def test_gptj_is_the_released_model():
    model = sizes.model('gptj-6b')
    assert (model.n_layers, model.d_model, model.n_heads, model.d_head) == (28, 4096, 16, 256)
    assert (model.d_ff, model.n_ctx, model.n_vocab, model.rotary_dims) == (16384, 2048, 50400, 64)
    assert (model.parallel_residual, model.tied_embedding, model.head_bias) == (True, False, True)
    assert (model.attention_bias, model.mlp_bias, model.norm_eps) == (False, True, 1e-5)
    assert sizes.model('kogpt-6b').n_vocab == 64512


@pytest.mark.parametrize(
    'size', ['gpt1', *(f'gpt2-{s}' for s in GPT2), *(f'gpt3-{s}' for s in TABLE_2_1)]
)
def test_the_gpts_share_what_their_code_shares(size):
    """GELU in its tanh form, LayerNorm with epsilon 1e-5, a learned position table, tied logits."""
    model = sizes.model(size)
    assert (model.activation, model.gated_mlp) == ('gelu_tanh', False)
    assert (model.norm_kind, model.norm_eps, model.parallel_residual) == ('layer', 1e-5, False)
    assert (model.positions, model.tied_embedding, model.head_bias) == ('learned', True, False)
    assert model.attention_bias
    assert model.mlp_bias
    assert model.norm_bias


def test_shakespeare_is_nanogpts_recipe():
    config = experiment('shakespeare_char', 'path=input.txt')
    model = config.model
    assert (model.n_layers, model.n_heads, model.d_model, model.n_ctx) == (4, 4, 128, 64)
    assert config.batch.batch_tokens == 12 * 64
    assert config.train.total_tokens == 2000 * 12 * 64
    assert (config.optim.peak_lr, config.optim.final_lr_fraction) == (1e-3, 0.1)
    assert (config.optim.b2, config.optim.weight_decay, config.optim.clip_norm) == (0.99, 0.1, 1.0)
    assert model.embed_dropout == model.attention_dropout == model.residual_dropout == 0.0


@pytest.mark.parametrize('module', [base, sweep, cli, spec, optim])
def test_doc_examples(module):
    assert doctest.testmod(module).failed == 0


def test_sweep():
    points = list(sweep.product(sweep.values('seed', range(2)), sweep.values('optim.b2', (0.9,))))
    assert points == [{'seed': 0, 'optim.b2': 0.9}, {'seed': 1, 'optim.b2': 0.9}]
    zipped = sweep.zipped(sweep.values('seed', range(2)), sweep.values('optim.b2', (0.9, 0.8)))
    assert list(zipped)[1] == {'seed': 1, 'optim.b2': 0.8}
    with pytest.raises(ValueError, match='shorter'):
        list(sweep.zipped(sweep.values('seed', range(2)), sweep.values('optim.b2', (0.9,))))
    assert len(list(sweep.chain(points, points))) == 4
    changed = sweep.apply(base.get_config(), points[1])
    assert (changed.seed, changed.optim.b2) == (1, 0.9)
    with pytest.raises(errors.UsageError, match='sed'):
        sweep.apply(base.get_config(), {'sed': 1})
    assert sweep.name(points[1]) == sweep.name(dict(reversed(points[1].items())))


def test_lookup_lists_what_there_is():
    assert lookup.module('gptjax.data.sets', 'stdlib').documents_of
    with pytest.raises(errors.UsageError, match='files, stdlib, tfds'):
        lookup.module('gptjax.data.sets', 'stdlb')


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        ({'n_layers': 0}, 'n_layers must be above 0'),
        ({'n_layers': 3, 'attention': ('dense', 'banded'), 'band_width': 2}, 'use a multiple of 2'),
        ({'attention': ('dence',)}, "no form of attention 'dence'; there are: dense, banded"),
        ({'band_width': 4}, 'band_width = 4 does not fit'),
        ({'norm': 'mid'}, 'norm must be one of pre, post'),
        ({'embed_dropout': 1.5}, 'embed_dropout must be from'),
    ],
)
def test_model_config_says_what_is_wrong(change, said):
    with pytest.raises(errors.UsageError, match=said):
        gpt.Config(**sizes.model('tiny', **change))
