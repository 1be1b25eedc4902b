# SPDX-License-Identifier: Apache-2.0
"""Mistakes on the command line: one line each, never a traceback."""

import random
import traceback

import pytest

from gptjax import train
from gptjax.configs import base, cli, errors
from tests import helpers

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
    with pytest.raises(errors.UsageError, match='no size'):
        cli.parse(['p', '--config=experiments/gpt2/pretrain.py:size=huge', '--workdir=x'])


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
