# SPDX-License-Identifier: Apache-2.0
"""Training that hangs is told of."""

import subprocess
import sys

import pytest

_HANGS = """
import time
from gptjax.runtime import hang, program
program.set_up_logging()
hang.LEAST_SECS = 0.2
watch = hang.Hang({end})
for _ in range(5):
    watch.step(0.01)
watch.pause()
time.sleep(0.5)
print('paused', flush=True)
watch.go_on()
time.sleep(1.0)
print('went on', flush=True)
watch.step(0.01)
watch.__exit__()
"""


@pytest.mark.parametrize('end', [True, False])
def test_training_that_hangs_is_told_of(end):
    found = subprocess.run(
        [sys.executable, '-c', _HANGS.format(end=end)], capture_output=True, text=True
    )
    assert 'no step has ended for' in found.stderr
    assert 'most recent call first' in found.stderr
    assert found.stdout == ('paused\n' if end else 'paused\nwent on\n')
    assert found.returncode == (1 if end else 0)
    assert ('error: training hung for' in found.stderr) == end
