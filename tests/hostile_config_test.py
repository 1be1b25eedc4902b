# SPDX-License-Identifier: Apache-2.0
"""Absurd values of every field, and files that are no configs: one line, or it works."""

import pytest

from gptjax.configs import base, cli, errors
from gptjax.data import loader
from gptjax.models import heads
from gptjax.sampling import loaded
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


def built(section: str, args: cli.Args) -> object:
    """What a section's owner makes of it."""
    if section == 'decode':
        return loaded.resolve('weights', {}, args.given('decode'))
    if section in ('optim', 'data'):
        return {'optim': optim, 'data': loader}[section].configure(args.config[section])
    if section == 'model':
        return heads.configure(args.config.model)
    return args.section(section, configs_test.OWNERS[section])


@pytest.mark.parametrize('part', range(8))
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
