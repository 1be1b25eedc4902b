# SPDX-License-Identifier: Apache-2.0
"""Korean: NSMC, KorNLI, KorSTS, KLUE-NLI and translation, with Korean prompts (ours)."""

from gptjax.evals import fewshot


def _review(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    del k
    return [fewshot.Item(f'리뷰: {record["text"]}\n감정:', ('부정', '긍정'), (record['label'],))]


def _entailed(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    del k
    context = (
        f'전제: {record["premise"]}\n가설: {record["hypothesis"]}\n'
        '질문: 가설은 참, 거짓, 알 수 없음 중 무엇입니까?\n답:'
    )
    gold = ('entailment', 'neutral', 'contradiction').index(record['label'])
    return [fewshot.Item(context, ('참', '알 수 없음', '거짓'), (gold,))]


def _alike(record: fewshot.Record, k: int) -> list[fewshot.Item]:
    """Two classes, as GLUE's STS is put to language models: at least 3 of 5 points alike."""
    del k
    context = (
        f'문장 1: {record["sentence1"]}\n문장 2: {record["sentence2"]}\n'
        '질문: 두 문장의 뜻이 같습니까?\n답:'
    )
    return [
        fewshot.Item(
            context, ('아니요', '예'), (int(record['score'] >= 3),), number=float(record['score'])
        )
    ]


def _translation(source: str, target: str) -> fewshot.Task:
    names = {'ko': '한국어', 'en': '영어'}

    def form(record: fewshot.Record, k: int) -> list[fewshot.Item]:
        del k
        context = f'{names[source]}: {record[source]}\n{names[target]}:'
        return [fewshot.Item(context, (record[target],))]

    return fewshot.Task(
        'ko_en_news',
        form,
        'Park et al. 2016, news',
        'generate',
        split='test',
        k=8,
        shots_from='validation',
        metrics=('bleu', 'chrf'),
        max_new_tokens=128,
        notes='BLEU and chrF by sacrebleu, tokenize=13a',
    )


TASKS = {
    'nsmc': fewshot.Task('nsmc', _review, 'NSMC (Park 2016)', split='test', k=32),
    'kornli': fewshot.Task(
        'kornli',
        _entailed,
        'KorNLI (Ham et al. 2020)',
        split='test',
        shots_from='validation',
        k=16,
    ),
    'klue_nli': fewshot.Task('klue_nli', _entailed, 'KLUE-NLI (Park et al. 2021)', k=16),
    'korsts': fewshot.Task(
        'korsts',
        _alike,
        'KorSTS (Ham et al. 2020)',
        split='test',
        k=16,
        metrics=('accuracy', 'spearman'),
        notes='right: "yes" from 3 points on; Spearman of log p(yes) - log p(no) with the points',
    ),
    'ko_en': _translation('ko', 'en'),
    'en_ko': _translation('en', 'ko'),
}
