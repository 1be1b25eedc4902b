# SPDX-License-Identifier: Apache-2.0
"""Weights stream: three billion parameters in ten files, read within what they take up."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from gptjax.models import gpt
from gptjax.models.published import llama

GIB = 2**30
LLAMA_3B = {
    'model_type': 'llama',
    'num_hidden_layers': 28,
    'hidden_size': 3072,
    'num_attention_heads': 24,
    'num_key_value_heads': 8,
    'intermediate_size': 8192,
    'vocab_size': 32000,
    'max_position_embeddings': 4096,
}
LOAD = """
import json, pathlib, sys
import jax
from gptjax.models import pretrained
model, params, _ = pretrained.load(sys.argv[1])
leaves = jax.tree.leaves(params)
last = params['network']['block_0']['down']['kernel'][-1, -1, -1]
status = pathlib.Path('/proc/self/status').read_text()
peak = int(status.split('VmHWM:')[1].split()[0]) * 1024
print(json.dumps({'bytes': sum(x.nbytes for x in leaves), 'peak': peak, 'last': float(last),
                  'dtypes': sorted({str(x.dtype) for x in leaves})}))
"""


def write_shards(folder, config: gpt.Config, n_shards: int) -> int:
    """A random float16 checkpoint; returns the bytes of its largest tensor."""
    (folder / 'config.json').write_text(json.dumps(LLAMA_3B))
    paths = {path for tensor in llama.LLAMA.tensors for path in tensor.paths}
    paths = {path for path in paths if 'bias' not in path}
    names = list(llama.LLAMA.places(paths, config.n_layers))
    rng, index, largest = np.random.default_rng(0), {}, 0
    for shard in range(n_shards):
        tensors = {}
        for place in names[shard::n_shards]:
            name = place.name if place.name.startswith('lm_head') else f'model.{place.name}'
            shape = llama.LLAMA.shape(place.tensor, config)
            row = rng.normal(0, 0.02, shape[-1]).astype(np.float16)
            tensors[name] = np.ascontiguousarray(np.broadcast_to(row, shape))
            largest = max(largest, tensors[name].nbytes)
        file = f'model-{shard + 1:05d}-of-{n_shards:05d}.safetensors'
        safetensors_numpy.save_file(tensors, folder / file)
        index |= dict.fromkeys(tensors, file)
    text = json.dumps({'metadata': {}, 'weight_map': index})
    (folder / 'model.safetensors.index.json').write_text(text)
    return largest


@pytest.mark.slow
def test_peak_memory_is_the_parameters_and_little_more(tmp_path):
    config = llama.LLAMA.config(LLAMA_3B)
    largest = write_shards(tmp_path, config, 10)
    found = subprocess.run(
        [sys.executable, '-c', LOAD, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {'XLA_FLAGS': ''},
    )
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout.splitlines()[-1])
    assert report['dtypes'] == ['float16']
    assert report['bytes'] / 2 > 3e9
    assert report['last'] != 0
    assert report['peak'] < report['bytes'] + largest + GIB, report
