# SPDX-License-Identifier: Apache-2.0
"""Metrics, clock, progress, pictures, locks."""

import contextlib
import json
import logging
import os
import pty
import re
import subprocess
import sys
import termios
import time

import jax
import pytest

from gptjax.configs import errors
from gptjax.runtime import clock, metrics, plots, program, progress
from gptjax.scaling import flops
from gptjax.storage import leases


def test_rows_are_merged_and_later_ones_dropped_on_resume(tmp_path):
    writer = metrics.Writer(tmp_path, metrics.past(tmp_path, 0), 2.0)
    for step in range(1, 6):
        writer.write(step, step * 10, {'train/loss': 1.0 / step})
        writer.write(step, step * 10, {'eval/x': 1.0})
    writer.close()
    assert len(metrics.read(tmp_path)) == 5
    with (tmp_path / 'metrics.jsonl').open('a') as f:
        f.write('{"step": 6, "tok')  # cut short by a crash
    writer = metrics.Writer(tmp_path, metrics.past(tmp_path, 3), 2.0)
    writer.write(4, 40, {'train/loss': 9.0})
    writer.close()
    rows = metrics.read(tmp_path)
    assert [row['step'] for row in rows] == [1, 2, 3, 4]
    assert rows[-1] == {'step': 4, 'tokens': 40, 'flops': 80.0, 'train/loss': 9.0}


def test_clock_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(clock.time, 'monotonic', lambda: now[0])
    watch = clock.Clock(flops_per_token=10.0)
    watch.restore({'total_secs': 50.0, 'train_secs': 40.0})
    now[0] += 4
    watch.trained(800, 0.5)
    watch.waited(1.0)
    watch.pause()
    now[0] += 6
    watch.go_on()
    found = watch.read(tokens_left=400)
    assert found['perf/tokens_per_sec'] == pytest.approx(200)
    assert found['perf/eta_secs'] == pytest.approx(2)
    assert found['perf/data_wait'] == pytest.approx(0.25)
    assert found['perf/goodput'] == pytest.approx(44 / 60)
    assert 'perf/mfu' not in found  # a CPU has no stated peak
    assert watch.totals() == {'total_secs': 60.0, 'train_secs': 44.0}


def test_the_speed_is_that_of_steps_that_do_not_compile(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, 'monotonic', lambda: now[0])
    watch, found = clock.Clock(1.0), []
    for until, secs in ((700, 700.0), (701, 1.0), (702, 1.0)):
        now[0] = until
        watch.trained(100, secs)
    found.append(watch.read(tokens_left=1000))
    now[0] = 704
    watch.trained(100, 2.0)
    found.append(watch.read(tokens_left=1000))
    assert [row['perf/tokens_per_sec'] for row in found] == [100, 50]
    assert [row['perf/eta_secs'] for row in found] == [10, 20]
    assert watch.totals()['train_secs'] == 704


def test_mfu_where_the_peak_is_known(monkeypatch):
    class Device:
        device_kind = 'TPU v5 lite'

    monkeypatch.setattr(jax, 'devices', lambda: [Device()])
    monkeypatch.setattr(jax, 'device_count', lambda: 4)
    watch = clock.Clock(flops_per_token=1e9)
    time.sleep(0.01)
    watch.trained(1000, 0.5)
    found = watch.read(1)
    assert found['perf/mfu'] == pytest.approx(found['perf/tokens_per_sec'] * 1e9 / (4 * 197e12))


def test_due_by_steps_and_by_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, 'monotonic', lambda: now[0])
    due = clock.Due(every_steps=5, every_secs=10)
    assert [step for step in range(1, 12) if due(step)] == [5, 10]
    now[0] = 11
    assert due(11)
    assert not due(12)
    assert not clock.Due(0)(5)


def test_progress_writes_lines_in_a_log(caplog, monkeypatch):
    monkeypatch.setattr(progress, 'LOG_SECS', 0.0)
    now = [0.0]
    monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
    with caplog.at_level(logging.INFO), progress.Progress('work', 10, ' things', 0, 'wait') as bar:
        for now[0], amount in ((700.0, 2), (701.0, 2), (703.0, 4)):  # the first compiles
            bar.advance(amount, 'note')
    assert [record.getMessage() for record in caplog.records] == [
        'work: wait',
        'work: 2 of 10 things, note',
        'work: 4 of 10 things, note, 3 s left',
        'work: 8 of 10 things, note, 1 s left',
        'work: 8 of 10 things, note, 1 s left',
    ]


_BAR = """
import time
from gptjax.runtime import progress
note = 'loss 4.214, 12,345 tokens/s, held-out 2.412 bits/byte'
with progress.Progress('train', 1_024_000, ' tokens', 0, 'compiling ...') as bar:
    time.sleep(1.0)
    for step in range(20):
        bar.advance(1024, note if step else '')
        time.sleep(0.12)
"""


def test_a_bar_has_room_and_tells_the_speed_once():
    """On a terminal of 110 columns; what is left is reckoned without the first step."""
    main, other = pty.openpty()
    termios.tcsetwinsize(other, (30, 110))
    command = [sys.executable, '-c', _BAR]
    with subprocess.Popen(command, stderr=other, env={**os.environ, 'COLUMNS': '110'}) as process:
        os.close(other)
        shown = b''
        with contextlib.suppress(OSError):  # at its end
            while part := os.read(main, 4096):
                shown += part
    os.close(main)
    assert process.returncode == 0
    last = [line for line in shown.decode().split('\r') if line.strip()][-1]
    assert 'compiling ...' in shown.decode()
    assert last.count('tokens/s') == 1
    assert len(last.split('|')[1]) >= 10
    assert len(last.rstrip()) <= 110


def test_a_workdir_is_for_one_process(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(leases, 'LOCK_SECS', 0.3)
    said = rf'process {os.getpid()} on .* is at work in {tmp_path}'
    with (
        program.only_one(tmp_path),
        pytest.raises(errors.InputError, match=f'{said}; stop it or use another --workdir'),
        program.only_one(tmp_path),
    ):
        pass
    assert re.search(f'{said}: waiting up to 0 s for its end', caplog.text)
    assert caplog.text.count('waiting') == 1
    with program.only_one(tmp_path):
        pass


def test_a_loss_curve_is_a_picture(tmp_path):
    rows = [
        {'step': i, 'tokens': i * 10, 'train/loss': 5.0 / i, 'eval/t/bits_per_byte': 2.0 / i}
        for i in range(1, 9)
    ]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    plots.loss_curve(tmp_path, 'eval/t/bits_per_byte', tmp_path / 'loss.png')
    assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')


def test_flops_of_gpt3_are_table_d_1():
    """Table D.1 prints 3.14e23 FLOPs for 175B over 300B tokens, attention left out."""
    found = 300e9 * flops.per_token(174_600_000_000, 0, 0.0)
    assert found == pytest.approx(3.14e23, rel=0.002)
    seen = 96 * flops.mean_seen(2048, 0)
    with_attention = 300e9 * flops.per_token(174_600_000_000, 96 * 128, seen)
    assert 1.0 < with_attention / found < 1.05


@pytest.mark.parametrize(('n_ctx', 'band'), [(7, 0), (7, 3), (7, 1), (7, 100), (64, 16)])
def test_positions_seen_on_average(n_ctx, band):
    counted = sum(min(i + 1, band or n_ctx) for i in range(n_ctx)) / n_ctx
    assert flops.mean_seen(n_ctx, band) == pytest.approx(counted)


def test_work_that_was_lost_counts_against_goodput(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, 'monotonic', lambda: now[0])
    watch = clock.Clock(1.0)
    watch.restore({'total_secs': 60.0, 'train_secs': 60.0})  # the last checkpoint
    watch.lost(90.0)  # 30 s more had been trained when it was killed
    now[0] += 10
    watch.trained(10, 10.0)
    found = watch.read(0)
    assert found['perf/goodput'] == pytest.approx(70 / 100)
    assert found['perf/total_secs'] == pytest.approx(100)
