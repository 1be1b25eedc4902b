# SPDX-License-Identifier: Apache-2.0
"""News articles to be written from a title and a subtitle: GPT-3, section 3.9.4.

People judge them; the task writes the texts to its items file and reports their length alone.
"""

from gptjax.evals import fewshot


def _titled(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    del k
    context = f'Title: {record["title"]}\nSubtitle: {record["subtitle"]}\nArticle:'
    return [fewshot.Item(context, (record.get('article', ''),))]


TASKS = {
    'news_articles': fewshot.Task(
        'news_titles',
        _titled,
        'GPT-3, 3.9.4',
        'generate',
        split='test',
        shots_from='train',
        k=3,
        metrics=('words',),
        delimiter='\n\n',
        stop=('\nTitle:',),
        max_new_tokens=400,
        decode={'num_beams': 1, 'do_sample': True, 'top_p': 0.9},
        notes='three articles are shown as examples, as in the paper; top-p 0.9 is ours',
    ),
}
