# SPDX-License-Identifier: Apache-2.0
"""GPT research in JAX and Flax. Nothing is imported here: configs do without jax."""

import importlib.util
import sys

# python -m gptjax.X by a Python that is not the environment's.
if sys.argv[:1] == ['-m'] and importlib.util.find_spec('ml_collections') is None:
    sys.exit(
        f'error: {sys.executable} has none of the packages of gptjax; run source '
        '.venv/bin/activate first (make quickstart makes it)'
    )
