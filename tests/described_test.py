# SPDX-License-Identifier: Apache-2.0
"""What files beside a vocabulary say of it, in every form and place, beside transformers."""

import json
import random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from gptjax.configs import errors
from gptjax.text import chat, codec, described
from gptjax.text import tokenizer as tokenizer_lib

transformers = pytest.importorskip('transformers')

NAMES = ('<|endoftext|>', '<s>', '</s>', '<unk>', '<pad>', '<|im_end|>')
TEXTS = ('the cat', ' a<s>b </s> c', '한국어 <|im_end|>\n', '<new> one<more>two', '', '<pad><unk>')


def vocabulary() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(NAMES),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(['the cat sat on a mat, and the dog saw the cat'] * 9, trainer)
    return backend


def folder_of(seed: int, path):
    """A folder in one of the forms that tokenizers are published in; what it says, beside."""
    rng, backend = random.Random(seed), vocabulary()
    form = rng.choice(['tokenizer.json', 'vocab.json'])
    begin, end, pad = rng.sample(NAMES, 3)
    names = {'bos_token': begin, 'eos_token': end}
    names |= rng.choice([{}, {'pad_token': pad}, {'unk_token': '<unk>'}])
    if rng.random() < 0.4:
        names['additional_special_tokens'] = rng.sample(NAMES, 2)
    size = backend.get_vocab_size()
    added = rng.choice([[], ['<new>'], ['<new>', '<more>']])
    special = rng.random() < 0.5
    if form == 'tokenizer.json':
        if rng.random() < 0.5:
            backend.post_processor = processors.TemplateProcessing(
                single=[begin, '$A'],
                pair=[begin, '$A', begin, '$B'],
                special_tokens=[(begin, backend.token_to_id(begin))],
            )
        backend.save(str(path / form))
    else:
        table = json.loads(backend.to_str())['model']
        (path / form).write_text(json.dumps(table['vocab']))
        lines = ['#version: 0.2', *map(' '.join, table['merges']), '']
        (path / 'merges.txt').write_text('\n'.join(lines))
    if rng.random() < 0.5:
        names['eos_token'] = {'__type': 'AddedToken', 'content': end, 'normalized': False}
    known = {
        name: {'content': name, 'special': special, 'normalized': False, 'lstrip': False}
        for name in added
    }
    # transformers' GPT2Tokenizer takes no more than vocabulary and merges out of a tokenizer.json
    own = {'tokenizer.json': 'PreTrainedTokenizerFast', 'vocab.json': 'GPT2Tokenizer'}
    fields = {'tokenizer_class': own[form]}
    asked = rng.choice([None, True, False])
    fields |= {} if asked is None else {'add_bos_token': asked}
    where = rng.choice(['tokenizer_config.json', 'special_tokens_map.json'])
    if where == 'tokenizer_config.json':
        fields |= names
        fields['added_tokens_decoder'] = {
            str(size + i): known[name] | {'rstrip': False, 'single_word': False}
            for i, name in enumerate(added)
        }
        if form == 'vocab.json':
            fields['added_tokens_decoder'] |= {
                str(backend.token_to_id(name)): {'content': name, 'special': True}
                for name in rng.sample(NAMES, 2)
            }
    else:
        older = {k: v for k, v in names.items() if k != 'eos_token'} | {'eos_token': end}
        (path / where).write_text(json.dumps(older))
        if added:
            ids = {name: size + i for i, name in enumerate(added)}
            (path / 'added_tokens.json').write_text(json.dumps(ids))
    (path / 'tokenizer_config.json').write_text(json.dumps(fields))
    (path / 'config.json').write_text(json.dumps({'model_type': 'gpt2'}))
    return rng


@pytest.mark.parametrize('seed', range(24))
def test_every_form_is_read_as_transformers_reads_it(seed, tmp_path):
    rng = folder_of(seed, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for ours in (tokenizer_lib.load(tmp_path), _copied(tmp_path)):
        for text in TEXTS:
            ids = [*ours.prefix, *ours.encode(text, allow_special=True)]
            assert ids == theirs(text)['input_ids'], text
        assert ours.n_vocab == len(theirs)
        wrapped = codec.Codec(ours)
        for role in ('bos_token', 'eos_token', 'pad_token'):
            assert getattr(wrapped, role) == getattr(theirs, role), role
            assert getattr(wrapped, f'{role}_id') == getattr(theirs, f'{role}_id'), role
        assert ours.end_of_text == theirs.eos_token_id
        assert ours.beginning == theirs.bos_token_id
        for _ in range(5):
            ids = [rng.randrange(ours.n_vocab) for _ in range(12)]
            for skip in (False, True):
                assert wrapped.decode(ids, skip_special_tokens=skip) == theirs.decode(
                    ids, skip_special_tokens=skip
                )


def _copied(folder):
    """Saved by us and read again: as in a workdir."""
    tokenizer_lib.save(tokenizer_lib.load(folder), folder / 'copy')
    copy = tokenizer_lib.load(folder / 'copy')
    first = tokenizer_lib.load(folder)
    assert tokenizer_lib.fingerprint(copy) == tokenizer_lib.fingerprint(first)
    return copy


def test_ids_of_the_model_serve_where_no_name_is_given(tmp_path):
    backend = vocabulary()
    backend.save(str(tmp_path / 'tokenizer.json'))
    alone = tokenizer_lib.load(tmp_path)
    assert alone.decode([alone.end_of_text]) == '<|endoftext|>'
    said = {'bos_token_id': backend.token_to_id('<s>'), 'eos_token_id': 260}
    (tmp_path / 'config.json').write_text(json.dumps(said))
    ends = {'eos_token_id': [backend.token_to_id('</s>'), backend.token_to_id('<|im_end|>')]}
    (tmp_path / 'generation_config.json').write_text(json.dumps(ends))
    found = tokenizer_lib.load(tmp_path)
    assert (found.decode([found.beginning]), found.decode([found.end_of_text])) == ('<s>', '</s>')
    assert tokenizer_lib.fingerprint(found) != tokenizer_lib.fingerprint(alone)
    (tmp_path / 'generation_config.json').unlink()  # 260 is a word: of another vocabulary
    assert tokenizer_lib.load(tmp_path).end_of_text == alone.end_of_text


def test_a_vocabulary_without_the_usual_end_gets_none(tmp_path):
    table = json.loads(vocabulary().to_str())['model']
    kept = {name: i for name, i in table['vocab'].items() if name not in NAMES}
    kept = {name: i for i, name in enumerate(kept)}
    (tmp_path / 'vocab.json').write_text(json.dumps(kept))
    (tmp_path / 'merges.txt').write_text('#version: 0.2\n')
    found = tokenizer_lib.load(tmp_path)
    assert (found.n_vocab, found.end_of_text, found.beginning) == (len(kept), -1, -1)


def test_what_does_not_fit_is_said(tmp_path, caplog):
    backend = vocabulary()
    backend.save(str(tmp_path / 'tokenizer.json'))
    fields = {
        'add_bos_token': True,
        'bos_token': '<s>',
        'pad_token': '[PAD]',
        'added_tokens_decoder': {'900': {'content': '<far>', 'special': True}},
    }
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(fields))
    found = tokenizer_lib.load(tmp_path)
    assert found.prefix == []
    assert found.n_vocab == backend.get_vocab_size()
    for said in (
        "special token '[PAD]' is not in the vocabulary",
        "added token '<far>' cannot have id 900",
        'says add_bos_token = true, but the tokenizer puts none',
    ):
        assert said in caplog.text


@pytest.mark.parametrize('name', ['tokenizer_config.json', 'special_tokens_map.json'])
@pytest.mark.parametrize('content', [b'{', b'[]', b'\xff\xfe\x00', b'', b'3', b'nul'])
def test_damaged_files_are_one_line(tmp_path, name, content):
    vocabulary().save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(errors.InputError, match=f'{name} is no JSON object'):
        tokenizer_lib.load(tmp_path)


HOSTILE = [
    ('tokenizer_config.json', {'chat_template': 3}),
    ('tokenizer_config.json', {'chat_template': [3]}),
    ('tokenizer_config.json', {'chat_template': [{'nam': 'x'}]}),
    ('tokenizer_config.json', {'chat_template': [{'name': ['x'], 'template': 'y'}]}),
    ('tokenizer_config.json', {'eos_token': 5}),
    ('tokenizer_config.json', {'eos_token': ['</s>']}),
    ('tokenizer_config.json', {'pad_token': {'content': None}}),
    ('tokenizer_config.json', {'additional_special_tokens': '<s>'}),
    ('tokenizer_config.json', {'additional_special_tokens': [3]}),
    ('tokenizer_config.json', {'extra_special_tokens': {'a': 2}}),
    ('tokenizer_config.json', {'added_tokens_decoder': []}),
    ('tokenizer_config.json', {'added_tokens_decoder': {'abc': {'content': 'x'}}}),
    ('tokenizer_config.json', {'added_tokens_decoder': {'-1': {'content': 'x'}}}),
    ('tokenizer_config.json', {'added_tokens_decoder': {'300': 'x'}}),
    ('tokenizer_config.json', {'added_tokens_decoder': {'300': {'content': ''}}}),
    ('tokenizer_config.json', {'added_tokens_decoder': {'300': {'content': 'x', 'lstrip': None}}}),
    ('tokenizer_config.json', {'gptjax_token_ids': 3}),
    ('special_tokens_map.json', {'bos_token': 3.5}),
    ('added_tokens.json', {'x': '300'}),
    ('added_tokens.json', {'x': None}),
    ('added_tokens.json', {'x': 1.5}),
    ('added_tokens.json', {'': 300}),
]


@pytest.mark.parametrize('number', range(len(HOSTILE)))
def test_values_of_no_known_form_name_their_file_and_field(tmp_path, number):
    name, content = HOSTILE[number]
    vocabulary().save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / name).write_text(json.dumps(content))
    (field,) = content
    with pytest.raises(errors.InputError, match=f'/{name}: .*{field}.* is no'):
        tokenizer_lib.load(tmp_path)


def test_a_vocabulary_without_added_tokens_takes_one(tmp_path):
    backend = tokenizers.Tokenizer(models.BPE({'a': 0, 'b': 1}, []))
    backend.save(str(tmp_path / 'tokenizer.json'))
    added = {'2': {'content': '<end>', 'special': True}}
    fields = {'added_tokens_decoder': added, 'eos_token': '<end>'}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(fields))
    found = tokenizer_lib.load(tmp_path)
    assert (found.n_vocab, found.end_of_text, found.special) == (3, 2, {2})


def test_odd_folders_are_one_line_or_nothing(tmp_path):
    vocabulary().save(str(tmp_path / 'tokenizer.json'))
    expected = tokenizer_lib.load(tmp_path)
    (tmp_path / 'additional_chat_templates' / 'a.jinja').mkdir(parents=True)
    (tmp_path / 'additional_chat_templates' / 'b.jinja').symlink_to(tmp_path / 'nowhere')
    (tmp_path / 'special_tokens_map.json').mkdir()
    assert tokenizer_lib.load(tmp_path).n_vocab == expected.n_vocab
    assert tokenizer_lib.files_of(tmp_path) == [tmp_path / 'tokenizer.json']
    (tmp_path / 'tokenizer_config.json').write_text('[' * 10**5)
    with pytest.raises(errors.InputError, match='tokenizer_config.json is no JSON object'):
        tokenizer_lib.load(tmp_path)
    (tmp_path / 'tokenizer_config.json').unlink()
    (tmp_path / 'chat_template.jinja').write_bytes(b'caf\xe9')
    with pytest.raises(errors.InputError, match='chat_template.jinja is no text'):
        tokenizer_lib.load(tmp_path)


def test_a_token_that_is_said_to_be_none_is_none(tmp_path):
    """As Qwen's: bos is null beside the vocabulary, config.json has an id."""
    backend = vocabulary()
    backend.save(str(tmp_path / 'tokenizer.json'))
    fields = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': None, 'eos_token': '</s>'}
    template = {'chat_template': '{{ bos_token }}{{ messages[0].content }}'}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(fields | template))
    said = {'model_type': 'gpt2', 'bos_token_id': backend.token_to_id('<s>')}
    (tmp_path / 'config.json').write_text(json.dumps(said))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for found in (tokenizer_lib.load(tmp_path), _copied(tmp_path)):
        ours = codec.Codec(found)
        assert (ours.bos_token, ours.bos_token_id) == (theirs.bos_token, theirs.bos_token_id)
        chatted = [{'role': 'user', 'content': 'x'}]
        assert ours.apply_chat_template(chatted, tokenize=False) == 'x'
        assert theirs.apply_chat_template(chatted, tokenize=False) == 'x'
        assert found.beginning == backend.token_to_id('<s>')  # an empty prompt is the model's bos


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-32'])
def test_files_with_a_byte_order_mark(tmp_path, encoding):
    path = tmp_path / 'plain'
    path.mkdir()
    folder_of(3, path)
    expected = tokenizer_lib.load(path)
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_text().encode(encoding))
    found = tokenizer_lib.load(tmp_path)
    assert tokenizer_lib.fingerprint(found) == tokenizer_lib.fingerprint(expected)


@pytest.mark.parametrize('add', [None, True, False])
def test_sentencepiece_says_what_goes_before_a_text(real_data, tmp_path, add):
    model = (real_data / 'sentencepiece' / 'test_model.model').read_bytes()
    (tmp_path / 'tokenizer.model').write_bytes(model)
    plain = tokenizer_lib.load(tmp_path)
    assert (plain.prefix, plain.beginning) == ([], plain.end_of_text)
    added = {
        '1000': {'content': '<|user|>', 'special': True},
        '1001': {'content': '<tool>', 'special': False},
    }
    fields = {'bos_token': '<s>', 'eos_token': '</s>', 'added_tokens_decoder': added}
    fields |= {} if add is None else {'add_bos_token': add}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(fields))
    for found in (tokenizer_lib.load(tmp_path), _copied(tmp_path)):
        assert found.prefix == ([1] if add else [])
        assert (found.beginning, found.end_of_text, found.n_vocab) == (1, 2, 1002)
        ids = found.encode('<|user|>hello<tool>', allow_special=True)
        assert ids == [1000, *plain.encode('hello'), 1001]
        assert found.decode(ids) == '<|user|>hello<tool>'
        assert 1000 not in found.encode('<|user|>hello')
        assert found.special >= {1, 2, 1000}
        assert tokenizer_lib.fingerprint(found) != tokenizer_lib.fingerprint(plain)


TEMPLATES = {
    'chatml': "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    '{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}',
    'trims': '{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{% if '
    "m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
    'tags': "{%- for m in messages %}\n    {%- if m.role == 'assistant' %}{% generation %}"
    '{{ m.content }}{% endgeneration %}{% else %}\n{{- m.content | tojson }}{% endif %}\n'
    '    {%- if loop.index > 4 %}{% break %}{% endif %}\n{%- endfor %}',
    'refuses': "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system')"
    ' }}{% endif %}{{ m.content }}{% endfor %}',
}


@pytest.mark.parametrize('name', TEMPLATES)
@pytest.mark.parametrize('seed', range(6))
def test_chats_are_rendered_as_by_transformers(name, seed, tmp_path):
    rng = random.Random(seed)
    path = tmp_path / 'a'
    path.mkdir()
    folder_of(seed, path)
    places = [path / 'chat_template.jinja', path / 'additional_chat_templates' / 'other.jinja']
    places[1].parent.mkdir()
    places[0].write_text(TEMPLATES[name])
    if seed % 2:
        places[1].write_text('{{ messages[0].content }} {{ word }}')
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    ours = codec.Codec(tokenizer_lib.load(path))
    words = ['hi', ' two\n words ', '한국어 "quoted" <|im_end|>', '']
    messages = [{'role': 'system', 'content': 'be short'}] if rng.random() < 0.5 else []
    for turn in range(rng.randrange(1, 6)):
        role = ('user', 'assistant')[turn % 2]
        messages.append({'role': role, 'content': rng.choice(words)})
    for form in (
        {},
        {'add_generation_prompt': True},
        *([{'continue_final_message': True}] if messages[-1]['content'].strip() else []),
        *([{'chat_template': 'other', 'word': 'w'}] if seed % 2 else []),
    ):
        try:
            expected = theirs.apply_chat_template(messages, tokenize=False, **form)
        except Exception:
            with pytest.raises(errors.InputError, match='the chat template'):
                ours.apply_chat_template(messages, tokenize=False, **form)
            continue
        assert ours.apply_chat_template(messages, tokenize=False, **form) == expected, form
        ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **form)
        assert ours.apply_chat_template(messages, **form) == ids


def test_a_template_can_do_no_harm_and_tells_its_faults():
    for template in (
        "{{ ''.__class__.__mro__ }}",
        '{{ messages.append(1) }}',
        '{% for',
        '{{ undefined.x }}',
        '{{ 1 / 0 }}',
    ):
        said = described.Described({'chat_template': template})
        with pytest.raises(errors.InputError, match='the chat template refuses'):
            chat.render(said, [{'role': 'user', 'content': 'x'}])
    with pytest.raises(errors.InputError, match='published without a chat template'):
        chat.render(described.Described(), [{'role': 'user', 'content': 'x'}])
    two = described.Described({'chat_template': [{'name': 'a', 'template': 'x'}]})
    with pytest.raises(errors.InputError, match="no chat template 'default'; there are: a"):
        chat.render(two, [{'role': 'user', 'content': 'x'}])
    one = described.Described({'chat_template': 'x'})
    with pytest.raises(errors.InputError, match="no chat template 'b'; there are: default"):
        chat.render(one, [{'role': 'user', 'content': 'x'}], 'b')
    twice = described.Described({'chat_template': '{{ messages[0].content }}' * 2})
    with pytest.raises(errors.InputError, match='says the last message twice'):
        chat.render(twice, [{'role': 'user', 'content': 'x'}], continue_final_message=True)
