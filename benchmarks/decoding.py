# SPDX-License-Identifier: Apache-2.0
"""What the decoding options do to a model's text: writes docs/decoding.md and its picture.

  python benchmarks/decoding.py --model=SmolLM2.gguf

Every method continues the same prompts. Measured are repetition (the share of 4-grams that the same
text had before), diversity (distinct 2-grams among all 2-grams of all texts) and the perplexity
that the model itself gives the text; people's text has little of the first and much of the second
(Holtzman et al. 2020, section 5).
"""

import argparse
import math
import pathlib
import statistics

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

from gptjax.sampling.pipeline import pipeline

_PROMPTS = (
    'The history of the city begins',
    'In the morning, the old fisherman',
    'Scientists have recently discovered',
    'The best way to learn a language is',
    'Once upon a time, in a small village,',
    'The main difference between cats and dogs is',
    'After the war, the country',
    'To bake a good loaf of bread, you',
)
_SAMPLES, _NEW = 3, 100
_METHODS = {
    'greedy': {},
    'beam 5': {'num_beams': 5},
    'beam 5, no_repeat_ngram 3': {'num_beams': 5, 'no_repeat_ngram_size': 3},
    'greedy, repetition_penalty 1.2': {'repetition_penalty': 1.2},
    'temperature 0.5': {'do_sample': True, 'temperature': 0.5, 'top_k': 0},
    'temperature 1.0': {'do_sample': True, 'temperature': 1.0, 'top_k': 0},
    'temperature 1.5': {'do_sample': True, 'temperature': 1.5, 'top_k': 0},
    'top_k 50': {'do_sample': True, 'temperature': 1.0, 'top_k': 50},
    'top_p 0.9': {'do_sample': True, 'temperature': 1.0, 'top_p': 0.9, 'top_k': 0},
    'min_p 0.1': {'do_sample': True, 'temperature': 1.0, 'min_p': 0.1, 'top_k': 0},
    'typical_p 0.9': {
        'do_sample': True,
        'temperature': 1.0,
        'typical_p': 0.9,
        'top_k': 0,
    },
}
_HOW = """
    python benchmarks/decoding.py --model={name}

| method | 4-grams repeated | distinct 2-grams | perplexity by the model |
|---|---|---|---|
"""


def repeated(tokens: list[int], n: int = 4) -> float:
    """The share of n-grams that came before in the same text."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: list[list[int]], n: int = 2) -> float:
    """Distinct n-grams among all n-grams of all texts."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', required=True)
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('docs'))
    args = parser.parse_args()
    generate = pipeline('text-generation', model=args.model)
    prompts = [generate.tokenizer.encode(prompt) for prompt in _PROMPTS]
    rows, shown = [], []
    for name, options in _METHODS.items():
        n = _SAMPLES if options.get('do_sample') else 1
        found = generate(
            prompts,
            max_new_tokens=_NEW,
            num_return_sequences=n,
            logprobs=0,
            return_tensors=True,
            eos_token_id=-1,
            batch_size=1 if 'num_beams' in options else len(prompts),
            **({'do_sample': False} | options),
        )
        texts, nats = [], []
        for prompt, answers in zip(prompts, found, strict=True):
            for answer in answers:
                texts.append(answer['generated_token_ids'][len(prompt) :])
                nats += answer['logprobs']
        rows.append(
            (
                name,
                statistics.mean(map(repeated, texts)),
                distinct(texts[::n]),
                math.exp(statistics.mean(nats)) ** -1,
            )
        )
        shown.append((name, _PROMPTS[1] + generate.tokenizer.decode(texts[n][:60])))
        print('{}: repeated {:.2f}, distinct {:.2f}, perplexity {:.1f}'.format(*rows[-1]))
    _write(args.out, pathlib.Path(args.model).name, rows, shown)


def _draw(out: pathlib.Path, name: str, rows: list[tuple]) -> None:
    """Bars of the three measures, a row a method."""
    titles = ('4-grams repeated', 'distinct 2-grams', 'perplexity by the model')
    figure, panels = plt.subplots(1, 3, sharey=True, figsize=(10, 4.5), layout='constrained')
    labels = [row[0] for row in rows]
    colors = ['tab:blue' if _METHODS[n].get('do_sample') else 'tab:orange' for n in labels]
    for column, (panel, title) in enumerate(zip(panels, titles, strict=True), 1):
        bars = panel.barh(labels, [row[column] for row in rows], color=colors)
        panel.bar_label(bars, fmt='{:.1f}' if column == 3 else '{:.2f}', padding=3, fontsize=8)
        panel.set_title(title, fontsize=10)
        panel.margins(x=0.2)
        panel.spines[['top', 'right']].set_visible(False)
    panels[0].invert_yaxis()
    panels[2].set_xscale('log')
    figure.suptitle(f'{name}: {_NEW} tokens behind 8 prompts; blue = tokens are drawn')
    figure.savefig(out / 'decoding.png', dpi=120)


def _write(out: pathlib.Path, name: str, rows: list[tuple], shown: list[tuple]) -> None:
    _draw(out, name, rows)
    table = ''.join(f'| {n} | {r:.2f} | {d:.2f} | {p:.1f} |\n' for n, r, d, p in rows)
    quoted = '\n\n'.join(f'**{label}**: {" ".join(text.split())} ...' for label, text in shown)
    page = (
        '# What the decoding options do\n\n'
        f'{_NEW} tokens behind each of {len(_PROMPTS)} prompts ({_SAMPLES} texts each where tokens '
        f'are drawn), by {name}. Distinct 2-grams are counted over one text a prompt.\n'
        f'{_HOW}{table}'
        '\n![repetition against perplexity](decoding.png)\n\n'
        'The most likely text is not the most human one: greedy decoding and beam search say the '
        'same again and again, and the model finds that ever more likely. Forbidding repeated '
        'n-grams or drawing tokens breaks the loop; a temperature above 1 without a filter draws '
        'from the tail, where the model knows little.\n\n## One prompt, every method\n\n'
        f'{quoted}\n'
    ).replace('{name}', name)
    (out / 'decoding.md').write_text(page, encoding='utf-8')


if __name__ == '__main__':
    main()
