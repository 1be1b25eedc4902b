# SPDX-License-Identifier: Apache-2.0
"""Mistakes on the command line: one line each, never a traceback."""

import importlib
import random
import re
import subprocess
import sys
import traceback

import pytest
from absl import flags

from gptjax import convert, evaluate, generate, train
from gptjax.configs import base, cli, errors
from gptjax.configs import help as help_lib
from gptjax.data import loader
from gptjax.sampling import engine
from tests import conftest, helpers

CONFIG = 'experiments/quickstart.py'


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        (['--config.model.n_layrs=3'], 'did you mean --config.model.n_layers?'),
        (['--config.model.n_layers=x'], 'invalid literal'),
        (['--config.optm.peak_lr=1'], 'did you mean --config.optim.peak_lr?'),
        (['--confg.seed=3'], 'unknown flag --confg.seed'),
        (['--workdirr=3'], 'did you mean --workdir?'),
        (['stray'], "unexpected argument 'stray'"),
        (['--config.seed'], 'Missing value'),
        (['--config.model=3'], 'model is a section: set its fields, as --config.model.family=...'),
        (
            ['--config.optim={}'],
            'optim is a section: set its fields, as --config.optim.optimizer=...',
        ),
        (['--config.optim'], '--config.optim is a section: set its fields'),
        (['--config.data.eval_sets=3'], 'not a dict'),
    ],
)
def test_one_line_with_a_suggestion(flags, said, tmp_path):
    with pytest.raises(errors.UsageError) as caught:
        helpers.args(CONFIG, tmp_path, *flags)
    assert said in str(caught.value)
    assert '\n' not in str(caught.value)


def test_config_arguments_are_typed_and_known():
    found = cli.parse_arg('steps=3,rate=1,name=a', steps=1, rate=0.5, name='', flag=False)
    assert (found.steps, found.rate, found.name, found.flag) == (3, 1.0, 'a', False)
    for wrong in ('step=3', 'steps', 'steps=x', 'flag=1'):
        with pytest.raises(errors.UsageError):
            cli.parse_arg(wrong, steps=1, flag=False)


def test_programs_exit_with_their_codes(tmp_path):
    usage = helpers.run_program('train', f'--config={CONFIG}', f'--workdir={tmp_path}', '--bogus=1')
    assert usage.returncode == 2
    assert usage.stderr.count('\n') == 1
    missing = helpers.run_program('train', f'--config={CONFIG}', f'--workdir={tmp_path}')
    assert missing.returncode == 1
    assert 'run python -m gptjax.prepare_tokens first' in missing.stderr
    helpers.check_no_fault(usage.stderr + missing.stderr)
    shown = helpers.run_program('train', '--help')
    assert shown.returncode == 0
    assert 'TPU VM' in shown.stdout


@pytest.mark.parametrize(
    ('program', 'flag', 'said'),
    [
        (
            train,
            '--config.engine.slots=16',
            r"'engine' is read by generate, quickstart; leave it out",
        ),
        (train, '--config.ngram.memory_tokens=3', "'ngram' is read by count_ngrams, quickstart"),
        (generate, '--config.optim.peak_lr=1.0', "'optim' is read by quickstart, scale, train"),
        (
            generate,
            '--noconfig.suite.download',
            "'suite' is read by evaluate, quickstart, scale, train",
        ),
        (evaluate, '--config.seed=1', "'seed' is read by count_ngrams, quickstart, scale, train"),
        (
            convert,
            '--config.model.n_layers=1',
            "'model' is read by count_ngrams, quickstart, scale, train",
        ),
    ],
)
def test_what_a_program_does_not_read_is_told(program, flag, said, tmp_path):
    argv = ['x', f'--config={CONFIG}', f'--workdir={tmp_path}', flag]
    define = getattr(program, 'define', lambda values: None)
    with pytest.raises(errors.UsageError, match=said) as caught:
        cli.parse(argv, define, reads=program.READS)
    assert '\n' not in str(caught.value)
    cli.parse(argv, define)  # of all sections it is a good flag


@pytest.mark.parametrize('program', ['train', 'quickstart'])
def test_a_python_without_the_packages_is_one_line(program):
    command = [sys.executable, '-S', '-m', f'gptjax.{program}']  # without site-packages
    bare = subprocess.run(command, capture_output=True, text=True, cwd=conftest.ROOT)
    assert bare.returncode == 1
    assert 'run source .venv/bin/activate first' in bare.stderr
    assert bare.stderr.count('\n') == 1


def test_every_program_says_what_it_reads():
    """And every field is read by some program; the quickstart reads what its programs do."""
    readings = cli.readings()
    programs = {path.stem for path in (conftest.ROOT / 'gptjax').glob('*.py')} - {'__init__'}
    assert set(readings) == programs
    known = {*base.TOP, *base.SECTIONS}
    assert set().union(*readings.values()) == known
    assert set(readings['quickstart']) == known
    for name, reads in readings.items():
        source = (conftest.ROOT / 'gptjax' / f'{name}.py').read_text()
        assert reads == importlib.import_module(f'gptjax.{name}').READS
        named = set(re.findall(r"(?<!--)config\.(\w+)|section\('(\w+)'", source))
        used = {a or b for a, b in named} & known
        assert name == 'quickstart' or used <= set(reads), f'{name} reads {used - set(reads)}'


@pytest.mark.parametrize('program', sorted(cli.readings()))
def test_help_lists_exactly_the_fields_of_a_program(program):
    module = importlib.import_module(f'gptjax.{program}')
    values = flags.FlagValues()
    getattr(module, 'define', lambda values: None)(values)
    text = help_lib.text(module.__doc__, values, base.get_config(), module.READS)
    listed = re.findall(r'--config\.([\w.]+)=', text.split('Config, with')[1])
    wanted = []
    for name in module.READS:
        section = base.get_config()[name]
        wanted += [f'{name}.{leaf}' for leaf in section] if name in base.SECTIONS else [name]
    assert listed == wanted
    assert 'unknown here' not in text
    assert module.__doc__.strip() in text
    for name in values:
        assert f'--{name}' in text


def test_every_field_has_a_meaning_in_one_line():
    sections = [*base.SECTIONS.values(), base.TOP, *base.models.FAMILIES.values()]
    for section in sections:
        for name, field in section.items():
            assert field.meaning, name
            assert '\n' not in field.meaning, name


def test_help_of_a_process_shows_the_config_it_is_given():
    shown = helpers.run_program('train', '--help', '--config=experiments/gpt1/pretrain.py')
    assert shown.returncode == 0
    assert '* --config.optim.peak_lr=0.00025' in shown.stdout
    assert '  --config.mesh.data=-1' in shown.stdout
    assert '--distributed' in shown.stdout
    assert 'engine' not in shown.stdout.split('Config, with')[1]
    wrong = helpers.run_program('train', '--help', '--config=experiments/gpt9.py')
    assert (wrong.returncode, wrong.stderr.count('\n')) == (2, 1)


def test_a_label_of_a_held_out_set_may_be_new(tmp_path):
    added = helpers.args(CONFIG, tmp_path, '--config.data.eval_sets.wiki=wiki/tokens')
    assert added.config.data.eval_sets.to_dict() == {'tokens': 'tokens', 'wiki': 'wiki/tokens'}
    gone = helpers.args(CONFIG, tmp_path, '--config.data.eval_sets.tokens=')
    assert loader.configure(gone.config.data).eval_sets == ()
    with pytest.raises(errors.UsageError, match='is now --config.data.eval_sets.<label>'):
        helpers.args(CONFIG, tmp_path, '--config.data.eval_set=x')


def test_a_program_is_given_the_module_of_its_config(tmp_path):
    found = helpers.args('experiments/shakespeare_char.py:size=gpu', tmp_path)
    assert found.path == 'experiments/shakespeare_char.py'
    assert len(list(found.module.sweep())) == 6
    assert found.module.get_config('size=gpu').model.n_layers == found.config.model.n_layers


SAID = [  # (flag, what is said of it)
    ('--lr=1', r'did you mean --config\.optim\.peak_lr\?'),
    ('--norm_kind=rms', r'did you mean --config\.model\.norm_kind\?'),
    ('--nolayer_norms', r'did you mean --config\.train\.layer_norms\?'),
    ('--zzz=1', r'unknown flag --zzz; there are: --workdir'),
    ('--optim.peak_lr=1', r'did you mean --config\.optim\.peak_lr\?'),
    ('--peak_lr=1', r'did you mean --config\.optim\.peak_lr\?'),
    ('--temperature=1', r'did you mean --config\.decode\.temperature\?'),
    ('--temprature=1', r'did you mean --config\.decode\.temperature\?'),
    ('--n_layers=1', r'did you mean --config\.model\.n_layers\?'),
    ('--wrkdir=1', r'did you mean --workdir\?'),
    ('--config.engine.weights=int7', r"engine\.weights must be one of '', int8, int4; got 'int7'"),
    ('--config.optim.peak_lr=-1', r'optim\.peak_lr must be'),
    ('--config.train.total_tokens=1.5', 'total_tokens=1.5'),
    ('--config.train.total_tokens=1e-3', 'total_tokens=1e-3'),
    ('--config.decode.do_sample=perhaps', 'do_sample=perhaps'),
]


@pytest.mark.parametrize(('flag', 'said'), SAID)
def test_a_mistake_names_what_was_meant(flag, said, tmp_path):
    def all_sections():
        args = helpers.args(CONFIG, tmp_path, flag)
        train.Sections(args.config)
        args.section('engine', engine.Config)

    with pytest.raises(errors.UsageError, match=said) as caught:
        all_sections()
    assert '\n' not in str(caught.value)


def test_values_as_people_write_them(tmp_path):
    for written, value in (('1e6', 10**6), ('1_000_000', 10**6), ('2.5E+3', 2500)):
        flag = f'--config.train.total_tokens={written}'
        assert helpers.args(CONFIG, tmp_path, flag).config.train.total_tokens == value
    for written, value in (
        ('yes', True),
        ('no', False),
        ('true', True),
        ('1', True),
        ('off', False),
    ):
        flag = f'--config.decode.do_sample={written}'
        assert helpers.args(CONFIG, tmp_path, flag).config.decode.do_sample is value
    spaced = ('--config.corpus.path', '1e6', '--config.seed', '1e2')  # of text it stays text
    config = helpers.args(CONFIG, tmp_path, *spaced).config
    assert (config.corpus.path, config.seed) == ('1e6', 100)
    with pytest.raises(errors.UsageError, match="unexpected argument 'extra'"):
        helpers.args(CONFIG, tmp_path, '--config.decode.do_sample', 'extra')


def test_flags_of_a_pipeline_go_to_who_reads_them():
    flags_ = ['--config=a.py', '--config.optim.peak_lr', '1', '--workdir=w', '--config.seed=2']
    assert cli.for_program(flags_, 'generate') == ['--config=a.py', '--workdir=w']
    assert '--config.optim.peak_lr=1' in cli.for_program(flags_, 'train')
    odd = ['--stream', '--noconfig', '-config.seed=1', '--', '--config.decode.seed', '3']
    assert cli.for_program(odd, 'train') == ['--stream', '--noconfig', '-config.seed=1', '--']


@pytest.mark.parametrize(
    ('flag', 'said'),
    [
        ('--config.train.objective=next_tokn', "no 'next_tokn' in gptjax.training.objectives"),
        ('--config.train.objective=next_token:a=1', 'not key=value with a key of: none'),
        ('--config.optim.optimizer=adam', 'there are: adamw'),
        ('--config.model.mlp=mixture', 'there are: dense'),
        ("--config.evaluate.measures=('entropi',)", 'there are: entropy'),
        ('--config.optim.schedule=cosin', 'schedule must be one of cosine'),
        ("--config.model.attention=('dens',)", "no form of attention 'dens'; there are: dense"),
        ("--config.model.attention=('banded:wide=3',)", 'not key=value with a key of: width'),
        ('--config.model.norm_kind=batch', 'norm_kind must be one of layer, rms'),
        ('--config.checkpoint.best_is=best', 'best_is must be one of lowest, highest'),
        ('--config.checkpoint.keep_steps=(0,)', 'are numbers above 0'),
    ],
)
def test_names_that_do_not_exist_are_told(flag, said, tmp_path):
    with pytest.raises(errors.UsageError, match=said) as caught:
        train.Sections(helpers.args(CONFIG, tmp_path, flag).config)
    assert '\n' not in str(caught.value)


def _mutate(rng: random.Random, fields: dict) -> list[str]:
    """One to three random wrongs or oddities."""
    odd = [
        '-1',
        '0',
        '1',
        '3',
        '7',
        '1e30',
        'nan',
        'x',
        '',
        "('a',)",
        '()',
        'True',
        '1.5',
        "''",
        '1e400',
        "(['a'],)",
        '9' * 20,
        '-7',
        '(1e400,)',
    ]
    flags = []
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(list(fields))
        kind = rng.random()
        if kind < 0.2:  # a typo
            at = rng.randrange(len(name))
            name = name[:at] + rng.choice('abcxyz._-') + name[at + 1 :]
        flag = f'--config.{name}={rng.choice(odd)}'
        if kind > 0.9:
            flag = flag.replace('=', rng.choice([' ', '==', ':', '']))
        flags.append(flag)
    return flags


def _try_mutations(seeds, tmp_path, corpus_file):
    config = helpers.tiny_config(tmp_path, corpus_file)
    ready = tmp_path / 'ready'
    helpers.prepare(config, ready)
    flat = _flat(base.get_config())
    refused, lines = 0, set()
    for seed in seeds:
        flags = _mutate(random.Random(seed), flat)
        workdir = tmp_path / f'run{seed}'
        workdir.mkdir()
        for name in ('corpus', 'tokenizer', 'tokens'):
            (workdir / name).symlink_to(ready / name)
        try:
            short = ('--config.train.total_tokens=512', '--config.optim.warmup_tokens=0', *flags)
            train.main(helpers.args(config, workdir, *short))
        except errors.InputError as e:
            refused += 1
            lines |= {str(e).count('\n')}
        except BaseException:
            pytest.fail(f'{flags}:\n{traceback.format_exc()[-1500:]}')
    assert lines <= {0}  # one line each
    return refused


def _flat(config, prefix=''):
    found = {}
    for name, value in config.items():
        found |= _flat(value, f'{prefix}{name}.') if hasattr(value, 'items') else {prefix + name: 0}
    return found


def test_mutated_command_lines_give_no_traceback(tmp_path, corpus_file):
    assert _try_mutations(range(15), tmp_path, corpus_file) > 2


@pytest.mark.slow
def test_many_mutated_command_lines_give_no_traceback(tmp_path, corpus_file):
    assert _try_mutations(range(15, 230), tmp_path, corpus_file) > 50
