# SPDX-License-Identifier: Apache-2.0
"""Absurd values of every field, and files that are no configs: one line, or it works."""

import json
import os

import pytest

from gptjax.configs import base, cli, errors
from gptjax.data import loader
from gptjax.models import heads
from gptjax.runtime import program, streams
from gptjax.sampling import decode, engine, loaded, router
from gptjax.training import optim
from tests import configs_test, helpers

WHOLE = (-(10**30), -(2**63), -(2**31), -1, 0, 1, 2**31 - 1, 2**31, 2**63, 10**30)
REAL = ('-inf', 'inf', 'nan', '-1.0', '0.0', '1e-320', '1e30', '1e308', '1e400')


def cases() -> list[tuple[str, str]]:
    """(field, value as written on a command line) of every number there is in the base config."""
    found = []
    for name, section in {'': base.TOP, **base.SECTIONS}.items():
        for field, about in section.items():
            kind = type(about.default)
            values = {int: map(str, WHOLE), float: REAL, tuple: WHOLE}.get(kind, ())
            path = f'{name}.{field}'.lstrip('.')
            found += [(path, f'({x},)' if kind is tuple else x) for x in values]
    return found


# Of these so many that the machine could not hold what they ask for, or a text of such a length.
ASKED = {
    'min_new_tokens': 2**31 - 1,
    'min_length': 2**31 - 1,
    'top_k': 2**31 - 1,
    'no_repeat_ngram_size': 2**31 - 1,
    'encoder_no_repeat_ngram_size': 2**31 - 1,
    'eos_token_id': (2**31 - 1,),
    'length_penalty': 1e3,
    'repetition_penalty': 1e-9,
    'exponential_decay_length_penalty': (1e300, 1e29),
}


def built(section: str, args: cli.Args) -> object:
    """What a section's owner makes of it."""
    if section == 'decode':
        return loaded.resolve('weights', {}, args.given('decode'))
    if section in ('optim', 'data'):
        return {'optim': optim, 'data': loader}[section].configure(args.config[section])
    if section == 'model':
        return heads.configure(args.config.model)
    return args.section(section, configs_test.OWNERS[section])


@pytest.mark.parametrize(
    'part', [0, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3, 4, 6, 7))]
)
def test_a_number_of_any_size_is_taken_or_told(part, tmp_path):
    for field, value in cases()[part::8]:
        try:
            args = helpers.args(base.__file__, tmp_path, f'--config.{field}={value}')
            section, _, leaf = field.rpartition('.')
            if section:
                built(section, args)
        except errors.InputError as e:
            said = str(e)
            assert '\n' not in said, (field, value, said)
            assert len(said) < 600, (field, value, said)


@pytest.mark.parametrize('beams', [1, 2])
@pytest.mark.parametrize('name', ASKED)
def test_options_beyond_any_text_are_obeyed(name, beams):
    if beams > 1 and name == 'no_repeat_ngram_size':
        pytest.skip('as without beams')
    model = helpers.tiny_model()
    asked = helpers.asked(max_new_tokens=2, num_beams=beams, **{name: ASKED[name]})
    weights = loaded.Loaded(decode.Decoder(model, 64), helpers.params_of(model), None, {})
    ((text,),) = router.Router(weights).texts([([1, 2, 3], asked)])
    assert len(text.tokens) == 2


@pytest.mark.parametrize(('name', 'most'), [('num_beams', 2**10), ('num_return_sequences', 2**14)])
def test_texts_of_a_prompt_are_not_any_number(name, most):
    for value in (most + 1, 2**31 - 1):
        with pytest.raises(errors.UsageError, match=f'{name} must be from 1 to {most}'):
            helpers.asked(do_sample=True, **{name: value})


def test_a_program_out_of_memory_ends_in_a_line(capsys):
    def jax_does() -> None:
        raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating\n9 bytes.')

    def numpy_does() -> None:
        raise MemoryError('Unable to allocate 64.0 PiB')

    for work in (jax_does, numpy_does):
        assert program._exit_code(work) == program.FAILED
        said = capsys.readouterr().err
        assert said.startswith('error: out of memory: ')
        assert said.count('\n') == 1


def test_a_cache_beyond_the_memory_is_told():
    model = helpers.tiny_model(positions='rotary', rotary_dims=32, n_ctx=2**31 - 1)
    config = base.get_config().engine.to_dict() | {'slots': 2**16}
    with pytest.raises(errors.UsageError, match=r'would take [\d.]+ GiB of memory; there are'):
        engine.Engine(decode.Decoder(model, 64), {}, engine.Config(**config))


@pytest.mark.parametrize(
    'shape',
    [
        {'n_layers': 10**9},
        {'d_model': 10**9, 'd_ff': 10**9},
        {'n_vocab': 2**31 - 1, 'd_model': 2**31 - 1},
        {'n_heads': 10**6, 'd_head': 10**6, 'd_model': 10**6},
    ],
)
def test_models_of_no_size_are_told(shape):
    with pytest.raises(errors.UsageError, match='no model is of such a size'):
        helpers.tiny_model(**shape)


HEAD = 'from gptjax.configs import base\ndef get_config():\n    c = base.get_config()\n'
FILES = [  # (name, content, what is said)
    (
        'a.py',
        f"{HEAD}    raise RuntimeError('one\\ntwo')",
        r'^RuntimeError: one two \(at .*a\.py:4\)$',
    ),
    (
        'a.py',
        f"{HEAD}    import json\n    json.loads('{{')",
        r'^JSONDecodeError: .* \(at .*a\.py:5\)$',
    ),
    ('a.py', f'{HEAD}    return get_config()', r'^RecursionError: .* \(at .*a\.py'),
    ('a.py', f'{HEAD}    return [0] * 10**15', r'^MemoryError \(at .*a\.py:4\)$'),
    ('a.py', f'{HEAD}    assert c.seed, c', r'^AssertionError: .*\.\.\. \(at .*a\.py:4\)$'),
    ('a.py', f"{HEAD}    raise ValueError('\\x1b[2J\\u202e')", r'^ValueError: \x1b\[2J'),
    ('a.py', '1 / 0', r'^ZeroDivisionError: division by zero \(at .*a\.py:1\)$'),
    ('a.py', 'def get_config(:', r'a\.py: SyntaxError: invalid syntax \(a\.py, line 1\)$'),
    ('a.py', 'a\0b', r'a\.py: SyntaxError: .*null bytes$'),
    ('a.py', 'get_config = 3', r"a\.py: TypeError: 'int' object is not callable$"),
    ('a.py', 'def get_config():\n    return None', 'gives a NoneType, no ConfigDict'),
    ('a.py', 'def get_config():\n    return {}', 'gives a dict, no ConfigDict'),
    ('a.py', f'{HEAD}    c.unlock()\n    c.zz = 3\n    return c', 'the config has no field zz'),
    ('a.py', "import sys\nsys.exit('bye')", 'the config file stopped the program: bye'),
    ('a.json', '{"model_type": "gpt2"}', 'no config that a run has written: .*field model_type'),
    ('a.json', '[' * 10**5, 'no config that a run has written: RecursionError'),
    ('a.json', '{"seed": 1e999}', 'no config that a run has written: seed = inf must be a int'),
    ('a.json', '{"model": null}', 'no config that a run has written: model = None must be a sec'),
    ('a.json', '{"model": {"n_layers": "x"}}', "model.n_layers = 'x' must be a int"),
    ('a.json', '{"model": {"zz": 1}}', 'model has no field zz'),
]


@pytest.mark.parametrize('number', range(len(FILES)))
def test_a_file_that_is_no_config_is_told(number, tmp_path):
    name, content, said = FILES[number]
    if name.endswith('.json') and content.startswith('{"') and 'model_type' not in content:
        whole = json.loads(base.get_config().to_json())
        changed = json.loads(content)
        for key, value in changed.items():
            changed[key] = whole[key] | value if isinstance(value, dict) else value
        content = json.dumps(whole | changed)
    (tmp_path / name).write_text(content)
    with pytest.raises(errors.InputError, match=said) as caught:
        helpers.args(str(tmp_path / name), tmp_path)
    assert '\n' not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_what_is_no_file_is_no_config(tmp_path):
    os.mkfifo(tmp_path / 'pipe.py')
    (tmp_path / 'loop.py').symlink_to(tmp_path / 'loop.py')
    with (tmp_path / 'large.py').open('wb') as file:
        file.truncate(2**40)
    for named, said in (
        (tmp_path / 'pipe.py', 'it is no file but a pipe or a device'),
        ('/dev/zero', 'it is no file but a pipe or a device'),
        ('/dev/null', 'it is no file but a pipe or a device'),
        (tmp_path, 'it is a folder'),
        (tmp_path / 'loop.py', 'Too many levels of symbolic links'),
        (tmp_path / 'large.py', 'it is too large to be one'),
        (tmp_path / ('a' * 300), 'File name too long'),
        (tmp_path / 'pipe.py' / 'below.py', 'it is not there'),
    ):
        with pytest.raises(errors.UsageError, match=f'cannot read the config file .*{said}'):
            helpers.args(str(named), tmp_path)


def test_what_does_not_print_is_escaped(tmp_path):
    assert streams.one_line('a\n\r\0\x1b\u2028\u202e\ud800b') == (
        'a\\n\\r\\x00\\x1b\\u2028\\u202e\\ud800b'
    )
    assert streams.one_line('한국어 – a') == '한국어 – a'
    made = tmp_path / 'made.py'
    made.write_text("raise ValueError('\\x1b[2J\\u202e')")
    flags = (f'--config={made}', '--workdir=x')
    found = helpers.run_program('prepare_corpus', *flags)
    assert found.returncode == 2
    assert found.stderr == f'error: ValueError: \\x1b[2J\\u202e (at {made}:1)\n'
    found = helpers.run_program('prepare_corpus', '--config=a\nerror: b\x1b', '--workdir=x')
    assert found.stderr.count('\n') == 1
    assert '\x1b' not in found.stderr
