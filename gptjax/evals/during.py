# SPDX-License-Identifier: Apache-2.0
"""What is scored while a model trains, by the code that scores it afterwards.

Held-out text and tasks, of the weights and of their average where one is kept.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from gptjax.data import tokens
from gptjax.data.labelled import sets
from gptjax.evals import answers, fewshot, perplexity, suite
from gptjax.models import heads
from gptjax.runtime import alike
from gptjax.runtime import mesh as mesh_lib
from gptjax.runtime import scores as scores_lib
from gptjax.sampling import decode
from gptjax.sampling import loaded as loaded_lib
from gptjax.text import tokenizer as tokenizer_lib
from gptjax.training import parameters, recipe
from gptjax.training import step as step_lib

_DEAR = 0.1  # share of the work of training that evaluations may take unasked
_log = logging.getLogger(__name__)


def evaluation(
    model: heads.LanguageModel,
    held_out: Mapping[str, tokens.TokenSet],
    config: perplexity.Config,
    max_tokens: int,
    objective: str,
    tasks: 'Tasks',
    mesh: mesh_lib.Mesh,
    average: bool,
) -> recipe.Evaluation:
    """How a run is scored.

    Args:
      held_out: by label.
      max_tokens: of each of them; 0 = config's.
      objective: train.objective.
      average: whether an average of the weights is kept; its scores are eval_average/...
    """
    step = step_lib.make_eval_step(perplexity.measure(model.apply, config, objective))
    n_ctx = config.n_ctx or model.config.n_ctx
    config = within(config, max_tokens)

    def scores_of(params: Any, check: Callable[[], None]) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for label, token_set in held_out.items():
            score = perplexity.score(
                step, params, token_set, n_ctx, config, mesh, lambda windows: check()
            )
            found |= score.named(label)
        return found | tasks.scores(params, check)

    def scores(state: step_lib.State, check: Callable[[], None]) -> dict[str, float | None]:
        found = scores_of(parameters.merge(state.params, state.frozen), check)
        if average:
            averaged = scores_of(parameters.merge(state.average, state.frozen), check)
            found |= {_of_average(name): value for name, value in averaged.items()}
        return found

    names = [name for label in held_out for name in perplexity.names(label, config)] + tasks.names
    names += [_of_average(name) for name in names if average]
    return recipe.Evaluation(names, scores, perplexity.notes(held_out, config))


def within(config: perplexity.Config, max_tokens: int) -> perplexity.Config:
    """That scores no more of each set; 0 = as before."""
    wanted = [most for most in (config.max_tokens, max_tokens) if most]
    return dataclasses.replace(config, max_tokens=min(wanted, default=0))


def cost(
    held_out: Mapping[str, tokens.TokenSet],
    config: perplexity.Config,
    tokens_between: int,
    models: int,
) -> str:
    """What evaluations cost, as a line.

    Args:
      tokens_between: that are trained on from one to the next.
      models: that are scored; 2 where an average is kept.
    """
    scored = perplexity.n_tokens(held_out, config) * models
    # Three times as dear is a token to train on: forward, and twice that backward.
    share = scored / (3 * tokens_between)
    line = f'held-out text: {scored:,} tokens each time, {share:.1%} of the work of training'
    if share <= _DEAR:
        return line
    return f'{line}; lower --config.train.eval_max_tokens, or raise eval_every_steps'


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Tasks of a suite during training.

    names: of the scores; scores: parameters -> score by name, None where it is undefined; a
    function, too, that is called before every task.
    """

    names: list[str]
    scores: Callable[[Any, Callable[[], None]], dict[str, float | None]]


def tasks(
    model: heads.LanguageModel,
    config: suite.Config,
    data_dir: str,
    tokenizer_dir: pathlib.Path,
    multiple: int,
) -> Tasks:
    """The suite's tasks, read and checked now: a mistake shows before the first step.

    Tasks whose data is absent are told of, and left out. Items that the training data holds are not
    told apart: suite.clean_against is for a finished model.

    Args:
      multiple: of rows in a batch; the mesh's data x fsdp.

    Raises:
      InputError: data is damaged, or hosts have not the same. UsageError: suite.n_ctx is beyond the
        model's.
    """
    if not config.tasks:
        return Tasks([], lambda params, check: {})
    config = dataclasses.replace(config, clean_against='')
    tokenizer = tokenizer_lib.load(tokenizer_dir)
    decoder = decode.Decoder(model, min(model.config.n_vocab, tokenizer.n_vocab))

    def respondent(params: Any) -> answers.Respondent:
        ends = {'eos_token_id': tokenizer.end_of_text}
        loaded = loaded_lib.Loaded(decoder, params, tokenizer, ends)
        return suite.respondent(config, loaded, multiple)

    ready: list[tuple[suite.Job, fewshot.Prompts]] = []
    for job in suite.jobs(config):
        try:
            ready.append((job, suite.load(job, respondent(None), config, data_dir)))
        except (sets.Absent, suite.Unscorable) as e:
            _log.warning('%s, %d shots is not scored: %s', job.name, job.k, e)

    def scores(params: Any, check: Callable[[], None]) -> dict[str, float | None]:
        asked, rows = respondent(params), []
        for job, prompts in ready:
            check()
            rows += suite.run(job, prompts, asked, config, None, {})
        return {
            f'eval/{row["task"]}/{row["k"]}shot/{row["metric"]}': row['value']
            for row in suite.over_seeds(rows)
        }

    alike.check_same(tasks={job.label: suite.digest(found.prompts) for job, found in ready})
    names = [name for job, _ in ready for name in suite.names(job)]
    return Tasks(list(dict.fromkeys(names)), scores)


def _of_average(name: str) -> str:
    return scores_lib.OF_AVERAGE + name.removeprefix('eval')
