# SPDX-License-Identifier: Apache-2.0
"""What a new user gets: one command, killed and run again, ends with a report."""

import os
import re
import signal
import subprocess
import sys

import pytest

from gptjax import evaluate, prepare_corpus, prepare_tokens, train, train_tokenizer
from tests import helpers


def _start(config, workdir):
    command = [sys.executable, '-m', 'gptjax.quickstart', f'--config={config}']
    return subprocess.Popen(
        [*command, f'--workdir={workdir}'],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )


@pytest.mark.slow  # two runs of the whole quickstart; its programs are stopped in stops_test.py
def test_killed_and_run_again_it_finishes_and_repeats_nothing(tmp_path, corpus_file):
    config = helpers.tiny_config(tmp_path, corpus_file)
    workdir = tmp_path / 'run'
    before = ''
    for how, code in ((signal.SIGKILL, -9), (signal.SIGINT, 75)):
        process = _start(config, workdir)
        for line in process.stderr:
            before += line
            if 'first step done' in line or '5/10' in line:  # it trains, or has trained
                break
        if how == signal.SIGINT:
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C on a terminal
        else:
            process.kill()
        before += process.communicate()[1]
        assert process.returncode in (code, 0)
    process = _start(config, workdir)
    out, said = process.communicate()
    assert process.returncode == 0, said
    helpers.check_no_fault(said)
    assert 'prepare_tokens: done already' in said
    assert 'going on from step' in before + said
    report = (workdir / 'report.md').read_text()
    for name in (
        'corpus',
        'tokens',
        'metrics.jsonl',
        'report_samples.jsonl',
        'loss.png',
        'checkpoints',
        'comparison.png',
        'ngram',
        'lstm',
    ):
        assert name in report
        assert (workdir / name).exists()
    for label in ('n-gram', 'LSTM', 'GPT'):  # a row each: bits per byte and tokens/s are numbers
        cells = re.search(rf'^\| {label} \|(.*)\|$', report, re.MULTILINE)[1].split('|')
        assert [float(cell.replace(',', '')) > 0 for cell in cells] == [True] * 4
    assert helpers.evaluation_of(workdir)['bits_per_byte'] > 0
    before = (workdir / 'report_samples.jsonl').stat().st_mtime_ns
    again = subprocess.run(process.args, capture_output=True, text=True)
    assert again.returncode == 0
    assert again.stderr.count('done already') == 10
    assert (workdir / 'report_samples.jsonl').stat().st_mtime_ns == before


def test_a_failing_program_is_named(tmp_path):
    config = helpers.tiny_config(tmp_path, tmp_path / 'missing.jsonl')
    found = helpers.run_program('quickstart', f'--config={config}', f'--workdir={tmp_path}/run')
    assert found.returncode == 1
    assert '--config.corpus.path names files of the kinds' in found.stderr
    assert 'gptjax.prepare_corpus failed with exit code 1' in found.stderr
    helpers.check_no_fault(found.stderr)


@pytest.mark.slow
def test_shakespeare_learns_as_nanogpt_does(real_data, tmp_path):
    """nanoGPT's README reaches 1.88 nats a character with this recipe; ours at most 1.90."""
    config = f'experiments/shakespeare_char.py:path={real_data}/tinyshakespeare/input.txt'
    workdir = tmp_path / 'run'
    flags = [f'--config={config}', f'--workdir={workdir}']
    environment = os.environ | {'XLA_FLAGS': ''}
    for program in (prepare_corpus, train_tokenizer, prepare_tokens, train, evaluate):
        name = program.__name__.removeprefix('gptjax.')
        found = subprocess.run(
            [sys.executable, '-m', f'gptjax.{name}', *flags],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert found.returncode == 0, found.stderr
    evaluation = helpers.evaluation_of(workdir)
    assert evaluation['tokens'] == 111_540
    assert evaluation['nats_per_token'] <= 1.90
