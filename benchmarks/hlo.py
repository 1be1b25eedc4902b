# SPDX-License-Identifier: Apache-2.0
"""What the text of a compiled program says of its collectives."""

import collections
import math
import re

import numpy as np

COLLECTIVE = re.compile(
    r'= \(?([a-z0-9]+\[[\d,]*\]).* '
    r'(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\('
)


_HIDDEN = re.compile(r'\s+(?:ROOT )?%async-collective-(start|done)[\w.-]* = .*calls=%?([\w.-]+)')
_NAME = re.compile(r'(?:ENTRY )?%?([\w.-]+) ')


def overlap(text: str) -> dict[str, int]:
    """Collectives that run beside other work, and those that the core waits for."""
    started = [m for m in map(_HIDDEN.match, text.splitlines()) if m]
    hidden = {m[2] for m in started}
    found = {'overlapped': sum(m[1] == 'start' for m in started), 'blocking': 0}
    name = ''
    for line in text.splitlines():
        if line and not line[0].isspace() and (begins := _NAME.match(line)):
            name = begins[1]
        if COLLECTIVE.search(line) and name not in hidden and 'async_collective' not in name:
            op = COLLECTIVE.search(line)[2]
            found['overlapped' if f'{op}-start(' in line else 'blocking'] += 1
    return found


# What one slice sends to another: its shape, and what for.
_SENT = re.compile(r'= \(([a-z0-9]+)\[([\d,]*)\][^=]* send\(.*_xla_megascale_transfer_type="(\w+)"')


def between_slices(text: str) -> dict[str, int]:
    """Numbers that a device sends to other slices in a step, by the kind of transfer."""
    found: collections.Counter[str] = collections.Counter()
    for _, shape, kind in _SENT.findall(text):
        found[kind] += math.prod(int(n) for n in shape.split(',') if n)
    return dict(found)


# Groups of devices: listed, as rows of numbers in some order, or along axes of a mesh.
_LISTED = re.compile(r'replica_groups=(\{\{[\d,{}]*\}\})')
_ROWS = re.compile(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_ALONG = re.compile(
    r'replica_groups=mesh\[([^\]]*)\]'
    r'(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}'
)
_PAIRS = re.compile(r'source_target_pairs=(\{\{[\d,{}]*\}\})')
_CALLED = re.compile(
    r'(?:body|calls|to_apply|called_computations|branch_computations)=\{?%?([\w.-]+)'
)


def over_replicas(text: str, shape: tuple[int, ...]) -> dict[str, dict[str, int]]:
    """Collectives between devices that differ in the mesh's first axis: 'in_loops' and 'once'.

    Returns:
      what each place sends, as 'all-reduce f32' -> numbers that a device holds of it.
    """
    lines = _computations(text)
    loops = [
        body
        for some in lines.values()
        for line in some
        if ' while(' in line
        for body in re.findall(r'body=%?([\w.-]+)', line)
    ]
    inside, left = set(), loops
    while left:
        name = left.pop()
        if name in lines and name not in inside:
            inside.add(name)
            left += [called for line in lines[name] for called in _CALLED.findall(line)]
    apart = math.prod(shape[1:])
    found = {'in_loops': collections.Counter(), 'once': collections.Counter()}
    for name, body in lines.items():
        for line in body:
            if (op := COLLECTIVE.search(line)) and _crosses(line, apart):
                results = line.split(' = ', 1)[1].split(f' {op[2]}', 1)[0]
                # TPUs scatter what they add up in such a computation.
                kind = 'reduce-scatter' if name.startswith('all-reduce-scatter') else op[2]
                for dtype, sizes in re.findall(r'([a-z0-9]+)\[([\d,]*)\]', results):
                    size = math.prod(int(n) for n in sizes.split(',') if n)
                    found['in_loops' if name in inside else 'once'][f'{kind} {dtype}'] += size
    return {place: dict(sent) for place, sent in found.items()}


def _computations(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    name = ''
    for line in text.splitlines():
        if line and not line[0].isspace() and (begins := _NAME.match(line)):
            name = begins[1]
        found.setdefault(name, []).append(line)
    return found


def _crosses(line: str, apart: int) -> bool:
    """Whether a group of devices is not within one share of the first axis."""
    return any(len({number // apart for number in group}) > 1 for group in _groups(line))


def _groups(line: str) -> list[list[int]]:
    """Raises ValueError where they are written in another way."""
    if found := _LISTED.search(line) or _PAIRS.search(line):
        return [_ints(group) for group in re.findall(r'\{([\d,]+)\}', found[1])]
    if found := _ROWS.search(line):
        return _in_order(*found.groups()[1:]).reshape(_ints(found[1])).tolist()
    if found := _ALONG.search(line):
        mesh = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        size = str(math.prod(mesh.values()))
        numbers = _in_order(found[2] or size, found[3]).reshape([*mesh.values()])
        along = [[*mesh].index(name) for name in re.findall(r"'(\w+)'", found[4])]
        last = range(-len(along), 0)
        group = math.prod(numbers.shape[axis] for axis in along)
        return np.moveaxis(numbers, along, last).reshape(-1, group).tolist()
    raise ValueError(f'unknown groups of devices: {line[:300]}')


def _in_order(sizes: str, order: str | None) -> np.ndarray:
    numbers = np.arange(math.prod(_ints(sizes))).reshape(_ints(sizes))
    return (numbers.transpose(_ints(order)) if order else numbers).ravel()


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(',')]
