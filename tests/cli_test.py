# SPDX-License-Identifier: Apache-2.0
"""Mistakes on the command line: one line each, never a traceback."""

import importlib
import json
import random
import re
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
        (['--config.model=3'], 'not a dict'),
    ],
)
def test_one_line_with_a_suggestion(flags, said, tmp_path):
    with pytest.raises(errors.UsageError) as caught:
        helpers.args(CONFIG, tmp_path, *flags)
    assert said in str(caught.value)
    assert '\n' not in str(caught.value)


def test_missing_config_file_and_workdir():
    with pytest.raises(errors.UsageError, match=r"config file 'no\.py': it is not there"):
        cli.parse(['p', '--config=no.py', '--workdir=x'])
    with pytest.raises(errors.UsageError, match='give --workdir'):
        cli.parse(['p', f'--config={CONFIG}'])
    with pytest.raises(errors.UsageError, match='give --config'):
        cli.parse(['p', '--workdir=x'])


def test_config_arguments_are_typed_and_known():
    found = cli.parse_arg('steps=3,rate=1,name=a', steps=1, rate=0.5, name='', flag=False)
    assert (found.steps, found.rate, found.name, found.flag) == (3, 1.0, 'a', False)
    for wrong in ('step=3', 'steps', 'steps=x', 'flag=1'):
        with pytest.raises(errors.UsageError):
            cli.parse_arg(wrong, steps=1, flag=False)


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


def test_programs_exit_with_their_codes(tmp_path):
    usage = helpers.run_program('train', f'--config={CONFIG}', f'--workdir={tmp_path}', '--bogus=1')
    assert usage.returncode == 2
    assert usage.stderr.count('\n') == 1
    missing = helpers.run_program('train', f'--config={CONFIG}', f'--workdir={tmp_path}')
    assert missing.returncode == 1
    assert 'run python -m gptjax.prepare_tokens first' in missing.stderr
    assert 'Traceback' not in usage.stderr + missing.stderr
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
        (generate, '--config.optim.peak_lr=1.0', "'optim' is read by quickstart, train"),
        (generate, '--noconfig.suite.download', "'suite' is read by evaluate, quickstart, train"),
        (evaluate, '--config.seed=1', "'seed' is read by quickstart, train"),
        (
            convert,
            '--config.model.n_layers=1',
            "'model' is read by count_ngrams, quickstart, train",
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
    assert _try_mutations(range(30), tmp_path, corpus_file) > 5


@pytest.mark.slow
def test_many_mutated_command_lines_give_no_traceback(tmp_path, corpus_file):
    assert _try_mutations(range(30, 230), tmp_path, corpus_file) > 50
