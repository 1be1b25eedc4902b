# SPDX-License-Identifier: Apache-2.0
"""Tasks scored while a model trains, by the code that scores it afterwards."""

import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from gptjax.configs import errors
from gptjax.data.labelled import sets
from gptjax.evals import suite
from gptjax.models import heads
from gptjax.sampling import decode, pipeline
from gptjax.text import tokenizer as tokenizer_lib

_log = logging.getLogger(__name__)


def scorer(
    model: heads.LanguageModel,
    config: suite.Config,
    data_dir: str,
    tokenizer_dir: pathlib.Path,
    multiple: int,
) -> Callable[[Any], dict[str, float]]:
    """A function from parameters to scores, as eval/<task>/<K>shot/<metric>; of no tasks to none.

    Tasks whose data is absent are told of once, and left out.

    Args:
      multiple: of rows in a batch; the mesh's data x fsdp.
    """
    if not config.tasks:
        return lambda params: {}
    errors.require(
        jax.process_count() == 1, 'suite.tasks during training are for one process; leave them out'
    )
    tokenizer = tokenizer_lib.load(tokenizer_dir)
    decoder = decode.Decoder(model, min(model.config.n_vocab, tokenizer.n_vocab))
    missing: set[str] = set()

    def scores(params: Any) -> dict[str, float]:
        ends = {'eos_token_id': tokenizer.end_of_text}
        loaded = pipeline.Loaded(decoder, params, tokenizer, ends)
        respondent = suite.respondent(config, loaded, multiple)
        rows = []
        for job in suite.jobs(config):
            if job.name in missing:
                continue
            try:
                rows += suite.run(job, respondent, config, data_dir, None, {})
            except (sets.Absent, suite.Unscorable) as e:
                _log.warning('%s is not scored: %s', job.name, e)
                missing.add(job.name)
        return {
            f'eval/{row["task"]}/{row["k"]}shot/{row["metric"]}': row['value']
            for row in suite.over_seeds(rows)
        }

    return scores
