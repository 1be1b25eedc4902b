# SPDX-License-Identifier: Apache-2.0
"""Programs that score and write on several hosts find what they find on one."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from gptjax.evals import report
from tests import helpers, pods

pytestmark = pytest.mark.slow  # each program is two processes that compile
MESH = ('--config.mesh.data=1', '--config.mesh.fsdp=2', '--config.mesh.tensor=2')


def start(
    program: str, count: int, *flags: str, secs: float = 60, each: tuple = ([],) * 8
) -> list[subprocess.Popen]:
    """A program on so many hosts of four devices altogether. Args: each: one's own flags."""
    port = pods.free_port()
    told = [sys.executable, '-m', f'gptjax.{program}', *flags, f'--join_timeout={secs}']
    env = os.environ | {'XLA_FLAGS': f'--xla_force_host_platform_device_count={4 // count}'}
    joined = [f'--coordinator=localhost:{port}', f'--processes={count}']
    return [
        subprocess.Popen(
            [
                *told,
                *(joined if count > 1 else []),
                *([f'--process={i}'] if count > 1 else []),
                *each[i],
            ],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finish(running: list[subprocess.Popen], code: int = 0) -> list[tuple[str, str]]:
    """What they printed and said."""
    said = pods.communicated(running)
    assert [process.returncode for process in running] == [code] * len(running), said
    return said


@pytest.fixture(scope='module')
def run(tmp_path_factory, corpus_file):
    """A tiny model that reads bytes, and six items of a task."""
    folder = tmp_path_factory.mktemp('run')
    config, workdir = helpers.prepared(folder, corpus_file)
    flags = ('--config.train.total_tokens=2048', '--config.model.n_heads=2')
    finish(start('train', 1, f'--config={config}', f'--workdir={workdir}', *flags))
    (folder / 'tasks' / 'piqa').mkdir(parents=True)
    lines = [
        {'query': f'to {i}', 'choices': ['the cat', 'a dog runs'], 'gold': i % 2} for i in range(6)
    ]
    path = folder / 'tasks' / 'piqa' / 'validation.jsonl'
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return config, workdir, folder / 'tasks'


def test_suites(run, tmp_path):
    found = {}
    for count in (1, 2):
        flags = (f'--config={run[0]}', f'--workdir={tmp_path / str(count)}', *MESH)
        flags += (f'--config.init_from={run[1]}', f'--config.data_dir={run[2]}')
        flags += ("--config.suite.tasks=('piqa', 'arithmetic_2d_plus')", '--config.suite.k=(0, 1)')
        flags += ('--config.suite.limit=4', '--config.suite.batch_tokens=256')
        flags += ('--config.suite.n_ctx=32',)
        printed = [out for out, _ in finish(start('evaluate', count, *flags))]
        assert 'piqa' in printed[0]
        assert not any(printed[1:])
        # Once more: all of it is kept.
        finish(start('evaluate', count, *flags))
        found[count] = {
            f'{row["task"]}, {row["k"]}, {row["metric"]}': row['value']
            for row in report.read(tmp_path / str(count))
        }
    assert len(found[1]) > 4
    assert found[2] == pytest.approx(found[1], rel=1e-5)


def test_a_branch_of_a_run_in_a_bucket(bucket, prepared_bucket, config_file):
    """With another mixture: hosts agree where it begins, and it reads what one host reads."""
    pods.trained(bucket, config_file)
    found = []
    for count in (1, 2):
        branch = prepared_bucket.copy(f'{bucket}-{count}')
        flags = (f'--config={config_file}', f'--workdir={branch}', *pods.LENGTH, *MESH)
        flags += (f'--config.init_from={bucket}@6', '--config.init_state=whole')
        flags += ('--config.model.n_heads=2', "--config.data.sets=('tokens', 'tokens')")
        finish(start('train', count, *flags, '--config.data.weights=(0.5, 0.5)'))
        found.append(pods.outcome(branch, since=6))
    (_, scores, rows, step), (_, others, other_rows, other_step) = found
    assert step == other_step == 8
    assert list(rows) == list(other_rows) == [7, 8]
    assert others == pytest.approx(scores, rel=1e-5)
    assert other_rows == pytest.approx(rows, rel=1e-5)


@pytest.mark.parametrize(
    'asked',
    [
        ('--config.decode.do_sample=True', '--config.decode.logprobs=2'),
        ('--config.decode.num_beams=3', '--config.decode.do_sample=False'),
    ],
)
def test_generation(run, tmp_path, asked):
    (tmp_path / 'prompts.txt').write_text('the cat\na dog\nand then it runs\n')
    found = {}
    for count in (1, 2):
        flags = (f'--config={run[0]}', f'--workdir={tmp_path / str(count)}', *MESH)
        flags += (f'--config.init_from={run[1]}', f'--prompts={tmp_path / "prompts.txt"}')
        flags += ('--config.decode.max_new_tokens=12', *asked)
        printed = [out for out, _ in finish(start('generate', count, *flags))]
        assert printed[0].count('---') == 3
        assert not any(printed[1:])
        lines = (tmp_path / str(count) / 'samples.jsonl').read_text().splitlines()
        found[count] = [json.loads(line)['text'] for line in lines]
    assert found[1] == found[2]
    assert all(found[1])


def test_forgetting(run, tmp_path):
    found = {}
    for count in (1, 2):
        flags = (f'--config={run[0]}', f'--workdir={tmp_path / str(count)}', *MESH)
        flags += (f'--run=GPT={run[1]}', '--windows=6', '--config.evaluate.max_tokens=0')
        flags += (f'--config.data.eval_sets.tokens={run[1] / "tokens"}',)
        finish(start('forgetting', count, *flags))
        said = json.loads((tmp_path / str(count) / 'forgetting.json').read_text())['runs']['GPT']
        losses = said['nats_by_context_tokens'].values()
        found[count] = [*losses, *said['gradient_norm_by_distance']]
    assert found[2] == pytest.approx(found[1], rel=1e-4)


def test_an_error_on_one_host_ends_the_others_with_a_line(run, tmp_path):
    """At once, not when JAX's barrier at the end gives up."""
    flags = (f'--config={run[0]}', f'--workdir={tmp_path / "out"}', *MESH)
    running = start('generate', 2, *flags, f'--config.init_from={run[1]}', '--prompts=-')
    said = finish(running, 2)
    assert 'give --prompt=' in said[1][1]
    assert all(err.count('error:') == 1 for _, err in said), said


def test_a_host_that_does_not_come_is_named(run, tmp_path):
    flags = (f'--config={run[0]}', f'--workdir={run[1]}')
    running = start('train', 4, *flags, secs=8)
    running[2].kill()
    said = pods.communicated(running)
    assert [process.returncode for process in running] == [1, 1, -signal.SIGKILL, 1], said
    for number in (0, 1, 3):
        assert 'host 2 of 4 did not come within' in said[number][1]


def test_a_host_that_is_killed_ends_the_others(run, tmp_path):
    """By the connection that it had, or by its silence, whichever is noticed first."""
    helpers.prepare(run[0], tmp_path)
    flags = (f'--config={run[0]}', f'--workdir={tmp_path}', '--config.train.total_tokens=20000000')
    running = start('train', 2, *flags, '--config.mesh.data=4')
    while not (tmp_path / 'metrics.jsonl').exists():
        time.sleep(0.1)
    running[1].kill()
    said = pods.communicated(running)
    assert running[0].returncode == 1, said
    assert 'error:' in said[0][1]


def test_a_mistake_of_the_other_host_alone(run, tmp_path):
    """The first one, which has none, ends with its code and its words."""
    flags = (f'--config={run[0]}', f'--workdir={tmp_path}', f'--config.init_from={run[1]}', *MESH)
    running = start('generate', 2, *flags, each=([], ['--config.engine.slots=3']))
    said = finish(running, 2)
    assert all('give --prompt=' in err for _, err in said)
    running = start('generate', 2, *flags, '--prompt=x', each=([], ['--samples=x.txt']))
    said = finish(running, 2)
    assert 'error: host 1 has ended: --samples=x.txt is no name of a file' in said[0][1], said


def test_tasks_while_training(run, tmp_path):
    found = {}
    for count in (1, 2):
        workdir = tmp_path / str(count)
        helpers.prepare(run[0], workdir)
        flags = (f'--config={run[0]}', f'--workdir={workdir}', *MESH, '--config.model.n_heads=2')
        flags += ('--config.train.total_tokens=2048', f'--config.data_dir={run[2]}')
        flags += ("--config.suite.tasks=('piqa', 'arithmetic_2d_plus')", '--config.suite.limit=4')
        flags += ('--config.suite.n_ctx=32', '--config.suite.batch_tokens=256')
        finish(start('train', count, *flags))
        said = json.loads((workdir / 'results.json').read_text())
        found[count] = {name: value for name, value in said.items() if name.startswith('eval/')}
    assert any('piqa' in name for name in found[1])
    assert found[2] == pytest.approx(found[1], rel=1e-4)
