# SPDX-License-Identifier: Apache-2.0
"""Scoring beside lm-evaluation-harness's Hugging Face backend, on the same weights and requests.

  python benchmarks/score_speed.py SmolLM2.gguf DATA_DIR

Both are asked through the harness's interface, alternating; medians of the rounds. The weights are
those of the .gguf file, written as float32 for the Hugging Face backend.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
import time

import jax
import torch
from lm_eval.api import instance
from lm_eval.models import huggingface

from gptjax.evals import fewshot, harness
from gptjax.models import pretrained
from gptjax.runtime import program

os.environ['TOKENIZERS_PARALLELISM'] = 'false'
TASKS = ('hellaswag', 'piqa', 'lambada', 'arc_easy')


def requests_of(task: str, k: int, limit: int, data_dir: str) -> tuple[int, list]:
    """(items, requests) of a task of ours."""
    known = fewshot.find(task)
    found = []
    asked = fewshot.prompts(known, k, 0, data_dir, limit).prompts
    for prompt in asked:
        for answer in prompt.item.answers:
            arguments = (prompt.text() + prompt.item.context, known.separator + answer)
            found.append(instance.Instance('loglikelihood', {}, arguments, len(found)))
    return len(asked), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('weights')
    parser.add_argument('data_dir')
    parser.add_argument('--tasks', nargs='+', default=TASKS)
    parser.add_argument('--k', type=int, nargs='+', default=[0, 5])
    parser.add_argument('--limit', type=int, default=64)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--batch', type=int, nargs='+', default=[1, 8])
    args = parser.parse_args()
    program.keep_memory()
    torch.set_num_threads(os.cpu_count())
    ours = harness.Model(args.weights)
    with tempfile.TemporaryDirectory() as folder:
        model, params, tokenizer = pretrained.load(args.weights)
        pretrained.save(pathlib.Path(folder), model, jax.device_get(params), tokenizer, 'float32')
        theirs = huggingface.HFLM(
            folder, device='cpu', dtype='float32', batch_size=1, max_length=ours.max_length
        )
    for task in args.tasks:
        for k in args.k:
            items, asked = requests_of(task, k, args.limit, args.data_dir)
            speeds = {'ours': []} | {f'hf, batch {b}': [] for b in args.batch}
            answers = {}
            for round_ in range(args.rounds + 1):  # the first compiles
                for name in speeds:
                    if name != 'ours':
                        theirs.batch_size_per_gpu = int(name.split()[-1])
                    start = time.perf_counter()
                    one = ours if name == 'ours' else theirs
                    answers[name] = one.loglikelihood(asked, disable_tqdm=True)
                    if round_:
                        speeds[name].append(items / (time.perf_counter() - start))
            medians = {name: statistics.median(some) for name, some in speeds.items()}
            best = max(value for name, value in medians.items() if name != 'ours')
            apart = max(abs(a[0] - b[0]) for a, b in zip(*list(answers.values())[:2], strict=True))
            print(
                f'{task}, K = {k}: {medians} items/s; ours / best of theirs '
                f'{medians["ours"] / best:.2f}; largest difference {apart:.1e} nats',
                flush=True,
            )


if __name__ == '__main__':
    main()
