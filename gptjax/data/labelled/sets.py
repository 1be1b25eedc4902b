# SPDX-License-Identifier: Apache-2.0
"""Labelled items of evaluation sets, as records of few shapes.

A set is read from local files, else from TFDS where it has been prepared. The files are
DATA_DIR/<set>/<split>.jsonl with one record a line, as docs/evaluate.md lists them, or those that
the sets are published as; a set that is nowhere raises Absent and never counts as zero.
"""

import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from gptjax.configs import errors
from gptjax.data.labelled import rows, synthetic
from gptjax.storage import scratch

Record = dict[str, Any]


class Absent(errors.InputError):
    """The data of a task is not at hand."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a set is found, and how its rows become records.

    files: split -> patterns below the data folder, beside <set>/<split>.jsonl. tfds: names in
    TensorFlow Datasets, with {split: its split} where they differ. record: a row -> its records.
    """

    record: Callable[[Record], Iterable[Record]]
    files: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    tfds: tuple[str, ...] = ()
    tfds_splits: dict[str, str] = dataclasses.field(default_factory=dict)
    columns: tuple[str, ...] = ()  # of .tsv files without a header


def load(
    name: str, split: str, data_dir: str | pathlib.Path, download: bool = False
) -> list[Record]:
    """All records of a split.

    Args:
      name: a key of SETS.
      data_dir: '' = no local files.
      download: let TFDS fetch and prepare what it does not have.

    Raises:
      Absent: the set is nowhere. InputError: a file is there but cannot be read.
    """
    source = SETS[name]
    for path in _local(name, split, data_dir, source):
        read = list(_rows(path, source))
        found = [record for row in read for record in _recorded(source, row, path)]
        if not found:
            raise errors.InputError(f'{path} holds no item')
        return found
    for tfds_name in source.tfds:
        read = _tfds(tfds_name, source.tfds_splits.get(split, split), download)
        if read is not None:
            return [record for row in read for record in _recorded(source, row, tfds_name)]
    file = pathlib.Path(data_dir, name, f'{split}.jsonl')
    said = f'no {file}' if data_dir else f'no --config.data_dir=<folder> is given, to hold {file}'
    also = f', and TFDS has not prepared {" or ".join(source.tfds)}' if source.tfds else ''
    raise Absent(said + also)


def _recorded(source: Source, row: Record, where: Any) -> list[Record]:
    try:
        return list(source.record(row))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as e:
        raise errors.InputError(
            f'a record of {where} is not in a layout of docs/evaluate.md '
            f'({type(e).__name__}: {e}); it has the fields {", ".join(map(str, row))}'
        ) from e


def _local(
    name: str, split: str, data_dir: str | pathlib.Path, source: Source
) -> Iterator[pathlib.Path]:
    if not data_dir:
        return
    root = scratch.need(scratch.here(data_dir), own=False)
    if not root.is_dir():
        raise errors.UsageError(f'data_dir = {str(data_dir)!r} is no folder')
    own = (f'{name}/{split}.jsonl', f'{name}/{split}.jsonl.gz')
    for pattern in (*own, *source.files.get(split, ())):
        yield from sorted(root.glob(pattern))


def _rows(path: pathlib.Path, source: Source) -> Iterator[Record]:
    """The rows of a file, by its ending."""
    text = rows.content(path)
    kind = path.name.removesuffix('.gz').rpartition('.')[2]
    if kind == 'jsonl':
        for number, line in enumerate(text.split('\n'), 1):
            if line.strip():
                yield _object(_json(line, f'{path}:{number}'), f'{path}:{number}')
    elif kind == 'json':
        whole = _json(text, str(path))
        for row in whole if isinstance(whole, list) else [whole]:
            yield _object(row, str(path))
    elif source.columns or '\t' in text.partition('\n')[0]:
        names = source.columns or None
        try:
            yield from csv.DictReader(
                io.StringIO(text, newline=''), names, delimiter='\t', quoting=csv.QUOTE_NONE
            )
        except csv.Error as e:
            raise errors.InputError(f'{path} is no table: {e}') from e
    else:
        yield {'text': text, 'path': path}


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise errors.InputError(f'{where} is no JSON: {e}') from e


def _object(row: Any, where: str) -> Record:
    if not isinstance(row, dict):
        raise errors.InputError(f'{where} is a {type(row).__name__}, no object with fields')
    return row


def _tfds(name: str, split: str, download: bool) -> Sequence[Record] | None:
    """Rows of a prepared TFDS set; None where it is not there."""
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder(name, file_format='array_record')
        if download:
            builder.download_and_prepare()
        found = builder.as_data_source(split)
    except ImportError as e:
        if download:
            raise Absent("TFDS needs: pip install 'gptjax[data]'") from e
        return None
    except Exception as e:  # names, networks, disks: TFDS raises many kinds
        if download:
            reason = ' '.join(str(e).split())[:300]
            raise Absent(
                f'TFDS cannot prepare {name!r}: {reason} (some of its sets want TensorFlow)'
            ) from e
        return None
    try:
        return [_plain(row) for row in found]
    except Exception as e:
        raise errors.InputError(f'{name} of TFDS is damaged: {e}; prepare it again') from e


def _plain(value: Any) -> Any:
    """numpy's and TFDS's values as Python's: text, numbers, lists, dicts."""
    if isinstance(value, bytes):
        return value.decode('utf-8')
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if hasattr(value, 'tolist'):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def _files(**splits: str | tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {k: (v,) if isinstance(v, str) else v for k, v in splits.items()}


def _wmt(pair: str, name: str) -> Source:
    return Source(rows.translation(*pair.split('-')), tfds=(name,))


_DEV = {'validation': 'dev'}
_nli = rows.pair('entailment', 'neutral', 'contradiction')
SETS: dict[str, Source] = {
    # TFDS has LAMBADA tokenised and in lower case, which is another task.
    'lambada': Source(
        rows.text,
        _files(test=('lambada/lambada_test*.jsonl', 'lambada/lambada_openai*.jsonl')),
    ),
    'storycloze': Source(rows.choice, tfds=('story_cloze/2016',)),
    'hellaswag': Source(
        rows.hellaswag,
        _files(
            validation='hellaswag/hellaswag_val*.jsonl', train='hellaswag/hellaswag_train*.jsonl'
        ),
        ('hellaswag',),
    ),
    'cbt_cn': Source(
        rows.cbt,
        _files(
            validation='cbt*/cbtest_CN_valid*',
            test='cbt*/cbtest_CN_test*',
            train='cbt*/cbtest_CN_train*',
        ),
    ),
    'cbt_ne': Source(
        rows.cbt,
        _files(
            validation='cbt*/cbtest_NE_valid*',
            test='cbt*/cbtest_NE_test*',
            train='cbt*/cbtest_NE_train*',
        ),
    ),
    'triviaqa': Source(
        rows.question,
        _files(validation=('triviaqa/triviaqa*.jsonl',)),
        ('trivia_qa/unfiltered.nocontext',),
    ),
    'webquestions': Source(
        rows.question,
        _files(test='webquestions/test.jsonl', train='webquestions/train.jsonl'),
        ('web_questions',),
    ),
    'nq_open': Source(
        rows.question,
        _files(validation='nq_open/NQ-open.dev.jsonl', train='nq_open/NQ-open.train.jsonl'),
        ('natural_questions_open',),
    ),
    'wmt14_en_fr': _wmt('en-fr', 'wmt14_translate/fr-en'),
    'wmt16_en_de': _wmt('en-de', 'wmt16_translate/de-en'),
    'wmt16_en_ro': _wmt('en-ro', 'wmt16_translate/ro-en'),
    'multi30k_en_fr': Source(
        rows.parallel('en', 'fr'),
        _files(
            test='multi30k/test_2016_flickr.en',
            validation='multi30k/val.en',
            train='multi30k/train.en.gz',
        ),
    ),
    'multi30k_en_de': Source(
        rows.parallel('en', 'de'),
        _files(
            test='multi30k/test_2016_flickr.en',
            validation='multi30k/val.en',
            train='multi30k/train.en.gz',
        ),
    ),
    'ko_en_news': Source(
        rows.parallel('ko', 'en'),
        _files(
            test='ko_en_news/korean-english-park.test.ko',
            validation='ko_en_news/korean-english-park.dev.ko',
            train='ko_en_news/korean-english-park.train.ko',
        ),
    ),
    'wsc273': Source(rows.referents, _files(test='wsc273/winograd_wsc.jsonl'), ('wsc273',)),
    'winogrande': Source(
        rows.referents,
        _files(validation='winogrande/winogrande.jsonl'),
        ('winogrande',),
        {'train': 'train_xl'},
    ),
    'piqa': Source(rows.choice, _files(validation='piqa/piqa.jsonl'), ('piqa',)),
    'arc_easy': Source(rows.choice, _files(test='arc_easy/arc_easy.jsonl'), ('ai2_arc/ARC-Easy',)),
    'arc_challenge': Source(
        rows.choice, _files(test='arc_challenge/arc_challenge.jsonl'), ('ai2_arc/ARC-Challenge',)
    ),
    'openbookqa': Source(rows.choice, _files(test='openbookqa/openbook_qa.jsonl'), ('openbookqa',)),
    'copa': Source(rows.choice, _files(validation='copa/copa.jsonl'), ('super_glue/copa',)),
    'sat_analogies': Source(rows.choice),
    'boolq': Source(rows.boolq, _files(validation='boolq/boolq.jsonl'), ('super_glue/boolq',)),
    'cb': Source(rows.pair('entailment', 'contradiction', 'neutral'), tfds=('super_glue/cb',)),
    'rte': Source(rows.pair('entailment', 'not_entailment'), tfds=('super_glue/rte',)),
    'wic': Source(rows.same, tfds=('super_glue/wic',)),
    'wsc': Source(rows.wsc, tfds=('super_glue/wsc.fixed',)),
    'multirc': Source(rows.same, tfds=('super_glue/multirc',)),
    'record': Source(rows.same, tfds=('super_glue/record',)),
    'anli_r1': Source(_nli, tfds=('anli/r1',)),
    'anli_r2': Source(_nli, tfds=('anli/r2',)),
    'anli_r3': Source(_nli, tfds=('anli/r3',)),
    'race_h': Source(rows.race('high'), _files(test='race/race*.jsonl'), ('race/high',), _DEV),
    'race_m': Source(rows.race('middle'), _files(test='race/race*.jsonl'), ('race/middle',), _DEV),
    'squad2': Source(
        rows.squad,
        _files(
            validation=('squad2/dev-v2.0.json', 'squad_xquad_en/xquad.en.json'),
            train='squad2/train-v2.0.json',
        ),
        ('squad/v2.0',),
    ),
    'quac': Source(rows.same, tfds=('quac',)),
    'coqa': Source(
        rows.coqa,
        _files(
            validation=('coqa/coqa-dev*.json', 'coqa_sample/coqa-dev*.json'),
            train=('coqa/coqa-train*.json', 'coqa_sample/coqa-train*.json'),
        ),
        ('coqa',),
        {'validation': 'test'},
    ),
    'drop': Source(rows.drop, tfds=('drop',), tfds_splits=_DEV),
    'cnn_dailymail': Source(
        rows.summary, _files(test='summarization_t0/cnn_dailymail*.jsonl'), ('cnn_dailymail',)
    ),
    'wikitext2': Source(
        rows.whole, _files(validation='wikitext2/*valid*', test='wikitext2/*test*')
    ),
    'wikitext103': Source(
        rows.whole, _files(validation='wikitext103/*valid*', test='wikitext103/*test*')
    ),
    'ptb': Source(rows.whole, _files(validation='ptb/ptb.valid*', test='ptb/ptb.test*')),
    'lm1b': Source(rows.whole, _files(test='lm1b/news.en.heldout*'), ('lm1b',)),
    'enwik8': Source(rows.whole, _files(test='enwik8/enwik8*')),
    'text8': Source(rows.whole, _files(test='text8/text8*')),
    'nsmc': Source(rows.review, _files(train='nsmc/ratings_train*', test='nsmc/ratings_test*')),
    'kornli': Source(
        _nli, _files(validation='kornli/xnli.dev.ko.tsv', test='kornli/xnli.test.ko.tsv')
    ),
    'korsts': Source(
        rows.similarity,
        _files(
            train='korsts/sts-train.tsv',
            validation='korsts/sts-dev.tsv',
            test='korsts/sts-test.tsv',
        ),
    ),
    'klue_nli': Source(
        _nli, _files(validation='klue_nli/*dev*.json', train='klue_nli/*train*.json')
    ),
    'news_titles': Source(rows.same),
    **{
        name: Source(
            rows.synthetic,
            _files(test=(f'gpt3_synthetic/{file}.jsonl', f'gpt3_synthetic/{file}.jsonl.gz')),
        )
        for name, file in synthetic.PUBLISHED.items()
    },
}
