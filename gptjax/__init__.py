# SPDX-License-Identifier: Apache-2.0
"""GPT research in JAX and Flax. Nothing is imported here: configs do without jax."""

import sys

# python -m gptjax.X, before X and its imports: then -m stands where X's path will.
if sys.argv[:1] == ['-m']:
    if sys.orig_argv[-len(sys.argv)].removeprefix('-m').startswith('gptjax.'):
        from gptjax.runtime import signals

        signals.install()

    import importlib.util

    # By a Python that is not the environment's.
    if importlib.util.find_spec('ml_collections') is None:
        sys.exit(
            f'error: {sys.executable} has none of the packages of gptjax; run source '
            '.venv/bin/activate first (make quickstart makes it)'
        )
