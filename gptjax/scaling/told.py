# SPDX-License-Identifier: Apache-2.0
"""Results of fits in words, for people."""

from collections.abc import Mapping
from typing import Any

_LEVEL = '90'


def of_fit(result: Mapping[str, Any]) -> str:
    """A result in some lines: its numbers with intervals, and what is best at each budget."""
    drawn = result['bootstrap']
    lines = [
        f'approach {result["approach"]}: {result["form"]}',
        f'{result["n_points"]} points; {drawn["samples"]} bootstrap samples of {drawn["unit"]}; '
        f'outliers: {result.get("outlier_rule", "none")}',
    ]
    if 'objective' in result:
        lines.append(
            f'{result["objective"]} = {result["value"]:.6g} by {result["method"]}, gradient '
            f'{result["gradient"]:.1e}'
        )
    for name, (low, high) in result['intervals'][_LEVEL].items():
        lines.append(f'  {name:14} {result[name]:>14.5g}   90 %: {low:.5g} to {high:.5g}')
    if 'exponents' in result:
        for name, (low, high) in result['exponents']['intervals'][_LEVEL].items():
            value = result['exponents'][name]
            lines.append(
                f'  {name.upper()}* over C      {value:>14.4f}   90 %: {low:.4f} to {high:.4f}'
            )
    for place in result.get('frontier', ()):
        lines.append(f'at {place["c"]:.4g} FLOPs:')
        for name in ('n', 'd', 'tokens_per_parameter', 'loss'):
            low, high = place['intervals'][_LEVEL][name]
            value = place[name]
            shown = 'not known' if value is None else f'{value:.5g}'
            lines.append(f'  {name:20} {shown:>10}   90 %: {low:.5g} to {high:.5g}')
    return '\n'.join(lines)
