# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl: what a resumed run keeps of it, whatever stands in it, in a memory that stays."""

import json
import tracemalloc

import numpy as np
import pytest

from gptjax.runtime import metrics
from gptjax.storage import documents


def written(path, steps):
    rows = [
        {'step': s, 'tokens': s * 8, 'perf/total_secs': s / 2, 'train/loss': 1 / s} for s in steps
    ]
    path.write_bytes(documents.lines(rows).encode())
    return rows


def damaged(content: bytes, rng) -> bytes:
    """A file with something wrong at some place, or nothing."""
    at, lines = int(rng.integers(len(content))), content.splitlines(keepends=True)
    line = int(rng.integers(len(lines)))
    row = json.loads(lines[line])
    plain = json.dumps({name: x for name, x in row.items() if name != 'checksum'}).encode() + b'\n'
    kinds = (
        content,
        content[:at],
        content[:at] + bytes([content[at] ^ 1 << int(rng.integers(8))]) + content[at + 1 :],
        b''.join([*lines[:line], b'\n\n', *lines[line:]]),
        b''.join([*lines[:line], *lines[line + 1 :], lines[line]]),
        b''.join([*lines[:line], plain, *lines[line + 1 :]]),
        b''.join([*lines[:line], b'nothing of ours \xff\n', *lines[line:]]),
    )
    return kinds[rng.integers(len(kinds))]


@pytest.mark.parametrize('seed', range(60))
def test_what_a_resumed_run_keeps(tmp_path, seed):
    """All rows up to its step that are whole, on which later ones follow; what is none is aside."""
    rng = np.random.default_rng(seed)
    path, step = tmp_path / metrics.FILE, int(rng.integers(0, 14))
    written(path, range(1, 13))
    path.write_bytes(damaged(path.read_bytes(), rng))
    there = metrics.read(tmp_path)
    expected = [row for row in there if row['step'] <= step]
    before = metrics.past(tmp_path, step)
    assert before.total_secs == max((row['perf/total_secs'] for row in there), default=0.0)
    assert before.row == (expected[-1] if expected else {})
    writer = metrics.Writer(tmp_path, before, 1.0)
    assert metrics.read(tmp_path) == expected
    writer.write(20, 160, {'train/loss': 0.5})
    writer.close()
    added = {'step': 20, 'tokens': 160, 'flops': 160.0, 'train/loss': 0.5}
    lines = documents.read_lines(path, ('step',))
    assert (lines.rows, lines.bad, lines.cut) == ([*expected, added], {}, False)


def test_rows_from_before_checksums_are_sealed(tmp_path):
    path = tmp_path / metrics.FILE
    rows = [{'step': s, 'tokens': s * 8} for s in (1, 2, 3)]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    writer = metrics.Writer(tmp_path, metrics.past(tmp_path, 2), 1.0)
    writer.write(5, 40, {})
    writer.close()
    assert [row['step'] for row in metrics.read(tmp_path)] == [1, 2, 5]
    assert path.read_bytes().count(b'checksum') == 3
    assert not (tmp_path / 'metrics.jsonl.bad').exists()


@pytest.mark.parametrize('rows', [1000, 8000])
def test_memory_does_not_grow_with_rows(tmp_path, rows):
    written(tmp_path / metrics.FILE, range(1, rows + 1))
    metrics.Writer(tmp_path, metrics.past(tmp_path, 10**9), 1.0).close()  # what is imported once
    tracemalloc.start()
    try:
        before = metrics.past(tmp_path, rows)
        metrics.Writer(tmp_path, before, 1.0).close()
        assert sum(row['train/loss'] > 0 for row in metrics.rows(tmp_path)) == rows
        assert tracemalloc.get_traced_memory()[1] < 500_000  # 1,000 rows are 400,000 bytes at once
    finally:
        tracemalloc.stop()
