# SPDX-License-Identifier: Apache-2.0
"""Names of special tokens: one rule for every door; stop strings that are, or hold, such names."""

import functools
import json
import random

import pytest
import tokenizers

from gptjax import generate
from gptjax.configs import base
from gptjax.evals import harness
from gptjax.models import pretrained
from gptjax.sampling import texts
from gptjax.sampling.pipeline import pipeline
from gptjax.text import tokenizer as tokenizer_lib
from gptjax.text import vocabulary
from tests import helpers

START, END = '<|im_start|>', '<|im_end|>'
PROMPT = f'{START}user\nhello{END}\n{START}assistant\n'


def subwords() -> tokenizer_lib.Subwords:
    config = vocabulary.Config('bpe', '', '', 300, 10**6)
    backend = tokenizers.Tokenizer.from_str(
        vocabulary.train(config, ['hello user, the assistant said hello'] * 9)
        .serialized()['tokenizer.json']
        .decode()
    )
    backend.add_special_tokens([START, END])
    return tokenizer_lib.Subwords(backend)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('chat') / 'weights'
    tokenizer = subwords()
    model = helpers.tiny_model(n_vocab=tokenizer.n_vocab, n_ctx=128)
    pretrained.save(path, model, helpers.params_of(model), tokenizer)
    return path


def test_every_door_cuts_a_prompt_alike(folder, tmp_path, monkeypatch):
    tokenizer = subwords()
    ids = tokenizer.encode(PROMPT, allow_special=True)
    plain = tokenizer.encode(PROMPT)
    assert len(ids) < len(plain)
    (tmp_path / 'a.jsonl').write_text(json.dumps({'prompt': PROMPT}) + '\n')
    (tmp_path / 'own.jsonl').write_text(
        json.dumps({'prompt': PROMPT, 'split_special_tokens': True}) + '\n'
    )

    def cut(name, *flags):
        echo = ('--config.decode.max_new_tokens=2', '--config.decode.echo=True')
        given = (f'--config.init_from={folder}', *echo, *flags)
        generate.main(helpers.args(base.__file__, tmp_path / name, *given, define=generate.define))
        (line,) = (tmp_path / name / 'samples.jsonl').read_text().splitlines()
        return json.loads(line)['prompt_tokens']

    one_line = PROMPT.replace('\n', ' ')
    (tmp_path / 'a.txt').write_text(one_line)
    split = '--config.decode.split_special_tokens=True'
    assert cut('flag', f'--prompt={PROMPT}') == ids
    assert cut('jsonl', f'--prompts={tmp_path}/a.jsonl') == ids
    assert cut('txt', f'--prompts={tmp_path}/a.txt') == tokenizer.encode(one_line, True)
    monkeypatch.setattr('sys.stdin', (tmp_path / 'a.jsonl').open())
    assert cut('stdin', '--prompts=-') == ids
    assert cut('text', f'--prompt={PROMPT}', split) == plain
    assert cut('own', f'--prompts={tmp_path}/own.jsonl') == plain
    call = pipeline('text-generation', model=folder)
    for given, wanted in (({}, ids), ({'split_special_tokens': True}, plain)):
        (said,) = call(PROMPT, max_new_tokens=1, return_tensors=True, **given)
        assert said['generated_token_ids'][:-1] == wanted
    assert harness.Model(str(folder)).tok_encode(PROMPT) == ids


KINDS = ('subwords', 'bytes', 'sentencepiece')


@functools.cache
def tokenizer_of(kind: str) -> tokenizer_lib.Tokenizer:
    if kind == 'bytes':
        return tokenizer_lib.Bytes()
    if kind == 'subwords':
        return subwords()
    config = vocabulary.Config('sentencepiece', '', '', 300, 10**6)
    words = ['hello user, the assistant said hello to other users'] * 50
    return vocabulary.train(config, words)


@pytest.mark.parametrize('kind', KINDS)
def test_names_are_tokens_only_where_they_may_be(kind):
    tokenizer = tokenizer_of(kind)
    for i in sorted(tokenizer.special):
        name = tokenizer.decode([i])
        around = f'hello{name} user'
        assert i in tokenizer.encode(around, allow_special=True)
        assert i not in tokenizer.encode(around)
        assert name in tokenizer.decode(tokenizer.encode(around, allow_special=True))


@pytest.mark.parametrize('seed', range(40))
@pytest.mark.parametrize('kind', KINDS)
def test_stops_of_text_and_names_cut_alike_at_once_and_as_a_stream(kind, seed):
    """Against the definition: special tokens spelt out, cut at the first stop, names taken out."""
    rng, tokenizer = random.Random(seed), tokenizer_of(kind)
    special = sorted(tokenizer.special)
    words = [tokenizer.encode(word) for word in ('hello', ' user', ', the', ' said', ' assistant')]
    tokens, before = [], words[0]
    for _ in range(rng.randrange(1, 9)):
        tokens += [rng.choice(special)] if rng.random() < 0.4 else rng.choice(words)
    names = [tokenizer.decode([i]) for i in special]
    some = rng.choice(names)
    strings = [some, 'lo' + some, some + ' us', ' the', 'said' + some + some]
    strings = tuple(rng.sample(strings, rng.randrange(1, 4)))

    spelt = texts.continuation(tokenizer, before, tokens, spelt=True)
    places = [spelt.find(s) for s in strings if s in spelt]
    wanted = spelt[: min(places)] if places else spelt
    for name in names:
        wanted = wanted.replace(name, '')
    kept = texts.Stops(tokenizer)(before, tokens, strings)
    assert (kept >= 0) == bool(places)
    if kept >= 0:
        until = texts.continuation(tokenizer, before, tokens[:kept], spelt=True)
        assert any(s in until for s in strings)
        shorter = texts.continuation(tokenizer, before, tokens[: kept - 1], spelt=True)
        assert not any(s in shorter for s in strings)
        tokens = tokens[:kept]
    found = texts.before_stop(tokenizer, before, tokens, strings)
    assert found.replace(' ', '') == wanted.replace(' ', '')  # SentencePiece joins words anew
    if kind != 'sentencepiece':
        assert found == wanted
    stream = texts.Stream(tokenizer, before, strings)
    pieces = [stream.push(tokens[:n], n == len(tokens)) for n in range(1, len(tokens) + 1)]
    assert ''.join(pieces) == found


def test_a_name_as_stop_string_ends_a_text(folder):
    call = pipeline('text-generation', model=folder)
    tokenizer = subwords()
    given = {'max_new_tokens': 40, 'do_sample': True, 'top_k': 0, 'temperature': 3.0}
    end = tokenizer.encode(END, allow_special=True)[0]
    stopped = 0
    for seed in range(12):
        ids = call(PROMPT, return_tensors=True, seed=seed, eos_token_id=-1, **given)
        ids = ids[0]['generated_token_ids']
        found = call(PROMPT, return_tensors=True, seed=seed, eos_token_id=-1, stop=[END], **given)
        found = found[0]['generated_token_ids']
        start = len(tokenizer.encode(PROMPT, allow_special=True))
        until = ids.index(end, start) + 1 if end in ids[start:] else len(ids)
        assert found == ids[:until]
        stopped += until < len(ids)
    assert stopped
