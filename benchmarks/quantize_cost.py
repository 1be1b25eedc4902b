# SPDX-License-Identifier: Apache-2.0
"""What quantised weights and caches cost in perplexity, and what they take in memory.

  python benchmarks/quantize_cost.py --model=SmolLM2.gguf --text=text.txt

The text is read in windows, each from an empty cache, as decoding reads it; every token but the
first of a window is scored.
"""

import argparse
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.sampling import loaded as loaded_lib

_WINDOW = 512


@functools.partial(jax.jit, static_argnames='decoder')
def nats(decoder, params, tokens_1xL):
    """The sum of -log p of a window's tokens."""
    positions_1xL = jnp.arange(tokens_1xL.shape[1])[None]
    cache = decoder.empty_cache(1, tokens_1xL.shape[1])
    logits, _ = decoder.extend(params, tokens_1xL, positions_1xL, cache, True)
    log_probs = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    return -jnp.take_along_axis(log_probs, tokens_1xL[:, 1:, None], axis=-1).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', required=True)
    parser.add_argument('--text', type=pathlib.Path, required=True)
    parser.add_argument('--windows', type=int, default=16)
    args = parser.parse_args()
    first = None
    for weights, cache in (('', ''), ('int8', ''), ('int4', ''), ('', 'int8'), ('int8', 'int8')):
        loaded = loaded_lib.load(args.model, 'float32', weights, cache)
        ids = loaded.tokenizer.encode(args.text.read_text(encoding='utf-8')[: 8 * 10**5])
        ids = np.array(ids[: args.windows * _WINDOW], np.int32).reshape(-1, 1, _WINDOW)
        total = sum(float(nats(loaded.decoder, loaded.params, window)) for window in ids)
        found = math.exp(total / (len(ids) * (_WINDOW - 1)))
        first = first or found
        size = sum(x.nbytes for x in jax.tree.leaves(loaded.params)) / 2**20
        slot = sum(x.nbytes for x in jax.tree.leaves(loaded.decoder.empty_cache(1, 1)))
        print(
            f'weights {weights or "float32":8} cache {cache or "float32":8} perplexity {found:.3f} '
            f'({found / first - 1:+.2%}), {size:.0f} MiB, {slot} bytes a cached token',
            flush=True,
        )


if __name__ == '__main__':
    main()
