# SPDX-License-Identifier: Apache-2.0
"""Config files: experiments, what runs have written, and what is wrong with either in one line."""

import json

import pytest

from gptjax import generate
from gptjax.configs import base, cli, errors
from tests import helpers

CONFIG = 'experiments/quickstart.py'


def test_missing_config_file_and_workdir():
    with pytest.raises(errors.UsageError, match=r"config file 'no\.py': it is not there"):
        cli.parse(['p', '--config=no.py', '--workdir=x'])
    with pytest.raises(errors.UsageError, match='give --workdir'):
        cli.parse(['p', f'--config={CONFIG}'])
    with pytest.raises(errors.UsageError, match='give --config'):
        cli.parse(['p', '--workdir=x'])


@pytest.mark.parametrize(
    ('named', 'said'),
    [
        (
            'gpt2/pretrain.py:size=huge',
            "^size must be one of small, medium, large, xl; got 'huge'$",
        ),
        (
            'gpt3/pretrain.py:size=huge',
            '^size must be one of 125m, 350m, 760m, 1.3b, 2.7b, 6.7b, 13',
        ),
        ('shakespeare_char.py:size=huge', "^size must be one of cpu, gpu; got 'huge'$"),
        ('quickstart.py:model=rnn', "^model must be one of gpt, lstm, gru, ngram; got 'rnn'$"),
        ('quickstart.py:size=xl', "argument 'size=xl' is not key=value with a key of: model$"),
        ('gpt1/pretrain.py:size=xl', "argument 'size=xl' is not key=value with a key of: none$"),
        (
            'gpt3/eval.py:tasks=copa,piqa',
            r"'piqa' is not .*; a comma ends tasks: join values by \+,",
        ),
        ('gpt3/eval.py:k=zero', r"k='zero': numbers joined by \+, as k=0\+1"),
        ('gpt3/eval_few_shot.py:k=0', "names 'k' twice"),
    ],
)
def test_an_argument_that_an_experiment_does_not_take_is_told(named, said):
    with pytest.raises(errors.UsageError, match=said) as caught:
        cli.parse(['p', f'--config=experiments/{named}', '--workdir=x'])
    assert '\n' not in str(caught.value)


def test_a_config_file_that_is_not_there_is_guessed(tmp_path):
    for named, meant in (
        ('quickstart', 'experiments/quickstart.py'),
        ('experiments/quikstart.py', 'experiments/quickstart.py'),
        ('experiments/shakespeare', 'experiments/shakespeare_char.py'),
        ('gpt2/pretrain', 'experiments/gpt2/pretrain.py'),
        ('gpt2', 'experiments/gpt2/eval.py or experiments/gpt2/pretrain.py'),
    ):
        with pytest.raises(errors.UsageError, match=f'it is not there; did you mean {meant}\\?'):
            helpers.args(named, tmp_path)
    with pytest.raises(errors.UsageError, match=r'is a folder; did you mean experiments/quickstar'):
        helpers.args('experiments', tmp_path)


@pytest.mark.parametrize(
    ('named', 'said'),
    [
        (['--config=README.md'], r"'README\.md' is no \.py file; give --config=experiments/<name>"),
        (['--config=tests/typechecker.py'], 'has no function get_config; experiments/quickstart'),
        (['--config=DICT'], 'gives a dict, no ConfigDict; start from gptjax.configs.base.get_conf'),
        (
            ['--config=a.py', '--config', CONFIG],
            f"is given twice, as 'a.py' and '{CONFIG}'",
        ),
        (['--config'], r'give --config=experiments/<name>\.py'),
    ],
)
def test_a_config_that_is_none_is_told(named, said, tmp_path):
    made = tmp_path / 'made.py'
    made.write_text("def get_config():\n    return {'seed': 1}\n")
    argv = ['p', *(flag.replace('DICT', str(made)) for flag in named), f'--workdir={tmp_path}']
    with pytest.raises(errors.UsageError, match=said) as caught:
        cli.parse(argv)
    assert '\n' not in str(caught.value)


WRONG_IN_A_FILE = [  # (line of get_config, what is said of it)
    ('c.optim.peaklr = 1', r'optim has no field peaklr; did you mean peak_lr\?'),
    ('c.optim.update(peaklr=1)', r'optim has no field peaklr; did you mean peak_lr\?'),
    ("c.optim['peaklr'] = 1", r'optim has no field peaklr; did you mean peak_lr\?'),
    ('print(c.optim.peaklr)', r'optim has no field peaklr; did you mean peak_lr\?'),
    ('c.optm.peak_lr = 1', r'the config has no field optm; did you mean optim\?'),
    ('c.lr = 1', r'the config has no field lr; did you mean optim\.peak_lr\?'),
    ('c.engine.slot = 1', r'engine has no field slot; did you mean slots\?'),
    ('c.model.n_layer = 1', r'model has no field n_layer; did you mean n_layers\?'),
    ("c.model = sizes.model('tiny', n_layrs=1)", 'model has no field n_layrs; did you mean n_l'),
    ("c.model = sizes.rnn('gru', d_modl=1)", 'model has no field d_modl; did you mean d_model'),
    (
        "c.optim = base.optim('steps', warmup=1)",
        'optim has no field warmup; did you mean warmup_',
    ),
    ("c.optim.peak_lr = 'a'", r"optim\.peak_lr = 'a' must be a float"),
    ('c.optim = 3', r'optim = 3 must be a ConfigDict'),
]


@pytest.mark.parametrize(('line', 'said'), WRONG_IN_A_FILE)
def test_a_typo_in_a_config_file_is_named_with_its_line(line, said, tmp_path):
    path = tmp_path / 'mine.py'
    head = 'from gptjax.configs import base, sizes\ndef get_config():\n    c = base.get_config()\n'
    path.write_text(f'{head}    {line}\n    return c\n')
    with pytest.raises(errors.UsageError, match=f'^{said}') as caught:
        helpers.args(str(path), tmp_path)
    assert str(caught.value).endswith(f' (at {path}:4)')
    assert '\n' not in str(caught.value)
    path.write_text(f'{head}    with c.unlocked():\n        c.optim.peaklr = 1\n    return c\n')
    with pytest.raises(errors.UsageError, match=r'py: optim has no field peaklr; did you mean pea'):
        helpers.args(str(path), tmp_path)


def test_a_config_file_may_set_what_is_there(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(
        'from gptjax.configs import base, sizes\ndef get_config():\n    c = base.get_config()\n'
        "    c.model = sizes.rnn('gru')\n    c.model.d_model = 7\n"
        "    c.optim = base.optim('steps')\n    c.optim.warmup_steps = 3\n"
        "    c.data.eval_sets.wiki = 'wiki/tokens'\n    return c\n"
    )
    config = helpers.args(str(path), tmp_path).config
    assert (config.model.d_model, config.optim.warmup_steps) == (7, 3)
    assert config.data.eval_sets.to_dict() == {'tokens': 'tokens', 'wiki': 'wiki/tokens'}
    assert config.is_locked


def test_what_a_run_wrote_is_a_config(tmp_path):
    """The same config, from JSON: equal, locked, and refused where it is none."""
    config = helpers.args(CONFIG, tmp_path, '--config.model.n_layers=3').config
    written = tmp_path / 'config.json'
    written.write_text(json.dumps(config.to_dict()))
    again = helpers.args(str(written), tmp_path)
    assert again.config.to_dict() == config.to_dict()
    assert helpers.args(str(written), tmp_path, '--config.seed=7').config.seed == 7
    for content in ('', '[]', '3', '{"model": 3'):
        written.write_text(content)
        with pytest.raises(errors.InputError, match='is no config that a run has written'):
            helpers.args(str(written), tmp_path)
    with pytest.raises(errors.UsageError, match='takes no argument'):
        helpers.args(f'{written}:size=small', tmp_path)


def test_the_config_of_a_run_is_the_default_of_who_reads_its_weights(tmp_path):
    """Of --workdir, else of init_from; where the run began, and on which devices, is its own."""
    flags_ = ('--config.model.n_layers=3', '--config.init_from=x', '--config.mesh.fsdp=4')
    written = helpers.args(CONFIG, tmp_path, *flags_).config.to_json()
    run, other, published = (tmp_path / name for name in ('run', 'other', 'published'))
    for folder, content in ((run, written), (published, '{"model_type": "gpt2"}')):
        folder.mkdir()
        (folder / base.OF_RUN).write_text(content)

    def parsed(*given, **options):
        return cli.parse(['p', *given], default_config=base.OF_RUN, **options).config

    def from_(path):
        return parsed(f'--workdir={other}', f'--config.init_from={path}')

    for found in (
        parsed(f'--workdir={run}'),
        parsed('--workdir', str(run)),
        from_(run),
        from_(f'{run}/best'),
        from_(f'{run}/checkpoints/500/average'),
    ):
        assert (found.model.n_layers, found.model.d_model) == (3, 192)
        assert (found.decode.top_k, found.mesh.fsdp) == (50, 1)
    assert parsed(f'--workdir={run}').init_from == ''
    assert from_(run).init_from == str(run)
    changed = parsed(f'--workdir={run}', '--config.decode.top_k=3', reads=generate.READS)
    assert changed.decode.top_k == 3
    with pytest.raises(errors.UsageError, match="'optim' is read by"):
        parsed(f'--workdir={run}', '--config.optim.peak_lr=1.0', reads=generate.READS)
    assert parsed(f'--workdir={run}', f'--config={base.__file__}').model.n_layers == 2
    for base_ in (parsed(f'--workdir={other}'), parsed(f'--workdir={published}'), from_(published)):
        assert base_.decode.top_k == base.get_config().decode.top_k
    (run / base.OF_RUN).write_text('{')
    with pytest.raises(errors.InputError, match='is no config that a run has written'):
        parsed(f'--workdir={run}')
    for step in (3, 7):  # a checkpoint says the same
        said = json.loads(written)
        said['model']['n_layers'] = step
        meta = run / 'checkpoints' / f'{step:08d}' / 'meta.json'
        meta.parent.mkdir(parents=True)
        meta.write_text(json.dumps({'config': said, 'step': step}))
    assert parsed(f'--workdir={run}').model.n_layers == 7
    (run / base.OF_RUN).unlink()
    assert parsed(f'--workdir={run}').model.n_layers == 7
    meta.write_text('{"config": ')
    assert parsed(f'--workdir={run}').model.n_layers == 3
