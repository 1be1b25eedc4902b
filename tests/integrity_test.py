# SPDX-License-Identifier: Apache-2.0
"""Whatever is damaged in what we wrote: the right numbers, or one line that says which file.

A workdir with a file of every kind is damaged in one place; then one program runs in it. It ends
with what an undamaged workdir gives, or with an error that names a file or folder there; where the
error says that tokens and their like are to be made again, doing so helps.
"""

import collections
import itertools
import json
import os
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest

from gptjax import (
    convert,
    count_ngrams,
    evaluate,
    forgetting,
    generate,
    prepare_corpus,
    prepare_tokens,
    train,
    train_tokenizer,
)
from gptjax.configs import base, cli, errors
from gptjax.data import tokens
from gptjax.models import pretrained
from gptjax.runtime import checkpoint, metrics, program, results
from gptjax.storage import documents
from tests import helpers

LENGTH = ('--config.train.total_tokens=4096', '--config.checkpoint.every_steps=3')
LENGTH += ('--config.train.log_every_steps=1', '--config.checkpoint.keep=3')
MANY = ('--config.corpus.shard_bytes=3000',)
SUITE = ('--config.suite.tasks=("piqa",)',)
UNREAD = ('.lock', 'parameters.txt', 'results.md', '.done')


class Workdir:
    """Runs programs in a workdir, and says what they made."""

    def __init__(self, path: pathlib.Path, config: str, data: pathlib.Path) -> None:
        self.path, self._config, self._data = path, config, data
        self._kept = path.with_name('kept')

    def keep(self):
        """As it is now it will be restored."""
        shutil.copytree(self.path, self._kept)

    def restore(self):
        shutil.rmtree(self.path)
        shutil.copytree(self._kept, self.path)

    def _main(self, main, *flags, define=lambda values: None):
        main(helpers.args(self._config, self.path, *flags, define=define))

    def _read(self, main, *flags, define=lambda values: None):
        """Runs a program whose config is that of the run."""
        argv = ['program', f'--workdir={self.path}', *flags]
        main(cli.parse(argv, define, base.OF_RUN))

    def prepare_corpus(self):
        self._main(prepare_corpus.main, *MANY)
        return sorted(p.read_bytes() for p in (self.path / 'corpus').glob('documents-*.jsonl'))

    def train_tokenizer(self):
        self._main(train_tokenizer.main)
        return {p.name: p.read_bytes() for p in (self.path / 'tokenizer').glob('bytes.*')}

    def prepare_tokens(self):
        self._main(prepare_tokens.main)
        sets = [tokens.open_set(self.path / 'tokens', split) for split in tokens.SPLITS]
        return [s.read(0, len(s)).tolist() for s in sets] + [sets[1].table().tolist()]

    def train(self):
        """Goes on to the end."""
        self._main(train.main, *LENGTH)
        folder, meta = checkpoint.latest(self.path)
        listed = documents.read(folder / 'manifest.json', dict, '')
        arrays = {n: h for n, h in listed.items() if n.split('/')[-1][0].isdigit()}
        found = results.read(self.path)
        scores = {name: value for name, value in found.items() if name.startswith('eval/')}
        assert meta['step'] == found['steps'] == 8
        rows = {row['step']: row['train/loss'] for row in metrics.read(self.path)}
        return arrays, scores, rows

    def evaluate(self):
        self._read(evaluate.main)
        return documents.read(self.path / 'evaluation.json', dict, '')['sets']

    def suite(self):
        self._read(evaluate.main, *SUITE, f'--config.data_dir={self._data}')
        rows = documents.read_lines(self.path / 'results.jsonl').rows
        return [(row['metric'], row['value'], row['n']) for row in rows]

    def generate(self):
        flags = ('--prompt=the cat', '--prompt=one dog', '--config.decode.max_new_tokens=8')
        self._read(generate.main, *flags, define=generate.define)
        return [row['text'] for row in documents.read_lines(self.path / 'samples.jsonl').rows]

    def forget(self):
        flags = (f'--run=GPT={self.path}', '--windows=4', '--config.evaluate.max_tokens=0')
        self._read(forgetting.main, *flags, define=forgetting.define)
        return documents.read(self.path / 'forgetting.json', dict, '')['runs']['GPT']

    def count(self):
        """Counts n-grams beside the run, of its tokens; what the counts score."""
        spec = f'{self._config}:model=ngram'
        counted = Workdir(self.path / 'ngram', spec, self._data)
        shared = ('--config.tokenizer.dir=../tokenizer', "--config.data.sets=('../tokens',)")
        scored = ('--config.data.eval_sets.tokens=../tokens', '--arpa')
        counted._main(count_ngrams.main, *shared, *scored, define=count_ngrams.define)
        found = results.read(counted.path)
        arpa = (counted.path / 'model.arpa').read_bytes()
        return {name: x for name, x in found.items() if name.startswith('eval/')}, arpa

    def exported(self, folder: str = 'exported'):
        """The weights of a published folder that convert wrote."""
        found = pretrained.load(self.path / folder)
        text = found.tokenizer.encode('the cat')
        return [np.asarray(x).tolist() for x in jax.tree.leaves(found.params)], text

    def convert(self, folder: str = 'again'):
        """Writes a published folder, and what it holds."""
        flags = (f'--config.init_from={self.path}', '--to=huggingface')
        where = Workdir(self.path / folder, self._config, self._data)
        where._read(convert.main, *flags, define=convert.define)
        return self.exported(folder)


PROGRAMS = {
    'corpus': ['prepare_corpus', 'prepare_tokens', 'train_tokenizer'],
    'tokenizer': ['train_tokenizer', 'prepare_tokens', 'train', 'evaluate', 'generate', 'convert'],
    'tokens': ['prepare_tokens', 'train', 'evaluate', 'forget', 'count'],
    'checkpoints': ['train', 'evaluate', 'generate', 'suite', 'convert', 'forget'],
    'ngram': ['count'],
    'exported': ['exported'],
    'items': ['suite'],
    '': ['train', 'evaluate', 'generate', 'suite', 'convert'],
}
SAMPLE = int(os.environ.get('SAMPLE', 60))
READERS = ('evaluate', 'suite', 'generate', 'convert', 'forget')
PREPARING = ('prepare_corpus', 'train_tokenizer', 'prepare_tokens')


@pytest.fixture(scope='module')
def whole(tmp_path_factory, corpus_file):
    """(a workdir stopped in the middle of its training, what each program makes in it)."""
    folder = tmp_path_factory.mktemp('whole')
    data = folder / 'data'
    (data / 'piqa').mkdir(parents=True)
    items = [{'query': f'the cat {i}', 'choices': ['sat', 'run'], 'gold': i % 2} for i in range(4)]
    (data / 'piqa' / 'validation.jsonl').write_text('\n'.join(map(json.dumps, items)))
    workdir = Workdir(folder / 'run', helpers.tiny_config(folder, corpus_file), data)
    for name in PREPARING:
        getattr(workdir, name)()
    with helpers.stopped_after(5), pytest.raises(program.Preempted):
        workdir.train()
    workdir.convert('exported')
    for name in ('evaluate', 'suite', 'generate', 'forget', 'count'):
        getattr(workdir, name)()
    workdir.keep()
    reference = {}
    for name in (*PREPARING, *READERS, 'exported', 'count', 'train'):
        workdir.restore()
        reference[name] = getattr(workdir, name)()
    for name in READERS:  # of the checkpoint before the newest
        workdir.restore()
        shutil.rmtree(checkpoint.latest(workdir.path)[0])
        for made in ('items', 'samples.jsonl'):
            _remove(workdir.path / made)
        reference[f'older {name}'] = getattr(workdir, name)()
    workdir.restore()
    return workdir, reference


def _remove(path: pathlib.Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def another_type(content: bytes, rng: random.Random) -> bytes:
    """A field of a JSON document, or of one of its lines, of another type."""
    lines = content.split(b'\n') if content.count(b'\n{') else [content]
    number = rng.randrange(len(lines))
    try:
        said = json.loads(lines[number])
        said[rng.choice(list(said))] = rng.choice([None, [], 'x', -1, {}])
    except (ValueError, TypeError, IndexError):
        return content[:-1] + b'\0'
    lines[number] = json.dumps(said).encode()
    return b'\n'.join(lines)


DAMAGES = {
    'flip': flip,
    'flip again': flip,
    'cut': lambda content, rng: content[: rng.randrange(len(content))],
    'empty': lambda content, rng: b'',
    'zeros': lambda content, rng: bytes(len(content)),
    'list': lambda content, rng: b'[]',
    'object': lambda content, rng: b'{}',
    'null': lambda content, rng: b'null',
    'not UTF-8': lambda content, rng: b'\xff\xfe\xfa' + content,
    'deep': lambda content, rng: b'[' * 100_000,
    'another type': another_type,
    'twice': lambda content, rng: content + content,
    'removed': None,
    'swapped': None,
    'a folder': None,
    'a dangling link': None,
}


def kinds(path: pathlib.Path) -> dict[tuple[str, str], list[pathlib.Path]]:
    """The files of a workdir that programs read, by folder and name without numbers."""
    found = collections.defaultdict(list)
    for each in sorted(path.rglob('*')):
        place = each.relative_to(path).parts
        if not each.is_file() or each.name in UNREAD or place[0] in ('tensorboard', '.lock'):
            continue
        top = place[0] if len(place) > 1 else ''
        name = ''.join(c for c in each.name if not c.isdigit())
        found[top, name].append(each)
    return dict(found)


def damage(victim: pathlib.Path, how: str, rng: random.Random) -> None:
    siblings = [p for p in victim.parent.glob(f'*{victim.suffix}') if p != victim and p.is_file()]
    if how == 'swapped' and siblings:
        other = rng.choice(siblings)
        contents = victim.read_bytes(), other.read_bytes()
        other.write_bytes(contents[0])
        victim.write_bytes(contents[1])
    elif how in ('removed', 'swapped', 'a folder', 'a dangling link'):
        victim.unlink()
        if how == 'a folder':
            victim.mkdir()
        elif how == 'a dangling link':
            victim.symlink_to(victim.with_name('nowhere'))
    else:
        content = victim.read_bytes()
        victim.write_bytes(DAMAGES[how](content, rng) if content else b'x')


def cases(path: pathlib.Path):
    """Every file kind x damage x program that reads it, seeded, each folder's in turn."""
    found = collections.defaultdict(list)
    for kind in kinds(path):
        for how in DAMAGES:
            found[kind[0]] += [(kind, how, name) for name in PROGRAMS.get(kind[0], ())]
    for each in found.values():
        random.Random(0).shuffle(each)
    turns = itertools.zip_longest(*found.values())
    return [case for turn in turns for case in turn if case]


def run(whole, case: tuple, seed: int) -> str:
    """How a case ended: 'right', 'said', or with the 'older' weights. Raises where it is none."""
    (copy, reference), (kind, how, name), rng = whole, case, random.Random(seed)
    copy.restore()
    victim = rng.choice(kinds(copy.path)[kind])
    damage(victim, how, rng)
    told = f'{victim.relative_to(copy.path)}, {how}, {name}'
    try:
        found = getattr(copy, name)()
    except (errors.InputError, OSError) as e:
        said = str(e)
        assert '\n' not in said, told
        assert str(copy.path) in said, f'{told}: {said}'
        if kind[0] in ('corpus', 'tokens', 'tokenizer') and how not in ('a folder',):
            for each in (*PREPARING, name):
                try:
                    found = getattr(copy, each)()
                except errors.InputError as again:
                    if 'remove' not in str(again):  # what is to be taken away is said
                        raise
                    return 'said'
            assert found == reference[name], told
        return 'said'
    if name == 'train':  # rows that are lost are lost, none is another
        rows, expected = found[2], reference[name][2]
        assert rows.items() <= expected.items(), told
        found, expected = found[:2], reference[name][:2]
    else:
        expected = reference[name]
    if kind[0] == 'checkpoints' and found == reference.get(f'older {name}'):
        return 'older'  # which a warning says
    assert found == expected, told
    return 'right'


def run_all(whole, some: list) -> collections.Counter:
    ended, wrong = collections.Counter(), []
    for seed, case in enumerate(some):
        if seed % 100 == 99:
            print(f'{seed + 1} of {len(some)}: {dict(ended)}, {len(wrong)} wrong', flush=True)
        try:
            ended[run(whole, case, seed)] += 1
        except Exception as e:
            wrong.append(f'{seed} {case}: {type(e).__name__} {str(e)[:300]}')
            print(wrong[-1], flush=True)
    print(dict(ended), len(wrong), 'wrong')
    assert not wrong, '\n'.join(wrong)
    return ended


def test_sixty_damages_end_right_or_with_a_line(whole):
    ended = run_all(whole, cases(whole[0].path)[:SAMPLE])
    assert ended['right'] >= 5
    assert ended['said'] >= 5


# What the whole series has found.
FOUND = [
    ('tokenizer/recipe.json', 'not UTF-8', 'train_tokenizer'),
    ('config.json', 'object', 'evaluate'),
]


@pytest.mark.parametrize(('name', 'how', 'program_'), FOUND)
def test_what_once_ended_wrong(whole, name, how, program_):
    folder, _, last = name.rpartition('/')
    assert run(whole, ((folder, last), how, program_), 0) in ('right', 'said')


def results_are_made_again(whole, damages) -> None:
    copy, reference = whole
    copy.restore()
    copy.train()
    ended, path = collections.Counter(), copy.path / 'results.json'
    for seed, how in enumerate(damages):
        damage(path, how, random.Random(seed))
        try:
            found, said = copy.train(), ''
        except (errors.InputError, OSError) as e:
            said = str(e)
            shutil.rmtree(path)  # a folder, which is to be moved away
            found = copy.train()
        assert found == reference['train'], how
        assert not said or str(path) in said, how
        ended['said' if said else 'right'] += 1
    print(dict(ended))
    assert ended['right'] > len(damages) / 2


@pytest.mark.slow
def test_some_damaged_results_are_made_again(whole):
    results_are_made_again(whole, ('swapped', 'object', 'a folder', 'flip'))


@pytest.mark.slow
def test_all_damaged_results_are_made_again(whole):
    results_are_made_again(whole, [*DAMAGES, *DAMAGES])


@pytest.mark.slow
def test_every_damage_ends_right_or_with_a_line(whole):
    run_all(whole, cases(whole[0].path))
