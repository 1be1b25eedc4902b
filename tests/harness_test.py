# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness from local files: our backend and its own, on the same weights."""

import json
import logging
import os
import pathlib
import subprocess
import sys

import pytest
import tokenizers

from gptjax.text import tokenizer as tokenizer_lib
from gptjax.text import vocabulary
from tests import conftest, helpers

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
lm_eval = pytest.importorskip('lm_eval')

_TEXT = 'the cat sat on a mat and saw one dog run to its red house'
_WORDS = _TEXT.split()


@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> pathlib.Path:
    """A folder with a random tiny GPT-2 and a tokenizer of some hundred merges."""
    folder = tmp_path_factory.mktemp('weights')
    config = vocabulary.Config(kind='bpe', path='', dir='', n_vocab=320, sample_bytes=10**6)
    lines = [' '.join(_WORDS[i:] + _WORDS[:i]) for i in range(len(_WORDS))]
    tokenizer = vocabulary.train(config, lines * 5)
    tokenizer_lib.save(tokenizer, folder)
    torch.manual_seed(0)
    end = tokenizer.end_of_text
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=tokenizer.n_vocab,
            n_positions=48,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=end,
            eos_token_id=end,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / 'tokenizer.json'),
        eos_token='<|endoftext|>',
        bos_token='<|endoftext|>',
    ).save_pretrained(folder)
    (folder / 'SHA256SUMS').unlink()  # of our own files, which theirs have replaced
    return folder


@pytest.fixture(scope='module')
def tasks(tmp_path_factory) -> pathlib.Path:
    """The harness's LAMBADA, PIQA, a rolling and a generating task, on local items."""
    folder = tmp_path_factory.mktemp('tasks')
    root = pathlib.Path(lm_eval.__file__).parent / 'tasks'
    items = {
        'lambada_openai': [{'text': ' '.join(_WORDS[i : i + 8])} for i in range(7)],
        'piqa': [
            {
                'goal': ' '.join(_WORDS[i : i + 3]),
                'sol1': 'on a mat',
                'sol2': 'red house and dog',
                'label': i % 2,
            }
            for i in range(6)
        ],
        'whole': [{'text': ' '.join(_WORDS * 12)}, {'text': 'one dog ran'}],
        'spoken': [{'text': ' '.join(_WORDS[i : i + 4])} for i in range(5)],
    }
    own = {
        'lambada_openai': root / 'lambada/lambada_openai.yaml',
        'piqa': root / 'piqa/piqa.yaml',
    }
    for name, rows in items.items():
        data = folder / f'{name}.jsonl'
        data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        split = {'piqa': 'validation'}.get(name, 'test')
        head = f'include: {own[name]}\n' if name in own else _OWN[name]
        (folder / f'{name}.yaml').write_text(
            f'{head}task: local_{name}\ndataset_path: json\ndataset_name: null\n'
            f'dataset_kwargs:\n  data_files:\n    {split}: {data}\n'
            + ('training_split: null\n' if name == 'piqa' else '')
        )
    return folder


_OWN = {
    'whole': 'output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ""\n'
    'doc_to_target: "{{text}}"\nmetric_list:\n  - metric: word_perplexity\n  - metric: '
    'bits_per_byte\n',
    'spoken': 'output_type: generate_until\ntest_split: test\ndoc_to_text: "{{text}}"\n'
    'doc_to_target: " and"\ngeneration_kwargs:\n  until: ["\\n", " mat"]\n  max_gen_toks: 8\n'
    '  do_sample: false\nmetric_list:\n  - metric: exact_match\n',
}


def _evaluated(model: object, tasks: pathlib.Path) -> tuple[dict, dict]:
    names = [f'local_{name}' for name in ('lambada_openai', 'piqa', 'whole', 'spoken')]
    from lm_eval import tasks as harness_tasks

    manager = harness_tasks.TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    return found['results'], found['samples']


@pytest.fixture
def _offline(monkeypatch, tmp_path):
    monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'datasets'))


@pytest.mark.usefixtures('_offline')
@pytest.mark.filterwarnings('ignore')
def test_the_same_numbers_as_its_own_backend(weights, tasks):
    from lm_eval.models import huggingface

    from gptjax.evals import harness

    theirs = huggingface.HFLM(str(weights), device='cpu', dtype='float32', batch_size=2)
    expected, their_samples = _evaluated(theirs, tasks)
    found, samples = _evaluated(harness.Model(str(weights)), tasks)
    assert set(found) == set(expected)
    for task, metrics in expected.items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert found[task][name] == pytest.approx(value, rel=1e-5), (task, name)
    for task, some in their_samples.items():
        for one, other in zip(samples[task], some, strict=True):
            if task == 'local_spoken':
                assert one['resps'] == other['resps']
            else:
                ours, their = (
                    [float(r[0][0] if isinstance(r[0], tuple) else r[0]) for r in sample['resps']]
                    for sample in (one, other)
                )
                assert ours == pytest.approx(their, abs=1e-4)


TEMPLATES = {
    'chatml': "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    '{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}',
    'no system': "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}",
}


@pytest.fixture(scope='module', params=TEMPLATES)
def chatty(request, tmp_path_factory):
    """A folder with a chat template whose texts begin and end with tokens of their own."""
    folder = tmp_path_factory.mktemp('chatty')
    config = vocabulary.Config(kind='bpe', path='', dir='', n_vocab=320, sample_bytes=10**6)
    content = vocabulary.train(config, [_TEXT] * 50).serialized()['tokenizer.json'].decode()
    backend = tokenizers.Tokenizer.from_str(content)
    backend.add_special_tokens(['<|im_start|>', '<|im_end|>'])
    if request.param == 'no system':
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=['<|im_start|>', '$A'],
            special_tokens=[('<|im_start|>', backend.token_to_id('<|im_start|>'))],
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token='<|im_start|>', eos_token='<|im_end|>'
    )
    tokenizer.chat_template = TEMPLATES[request.param]
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {'n_positions': 160, 'n_embd': 32, 'n_layer': 2, 'n_head': 4}
    ids = {'bos_token_id': tokenizer.bos_token_id, 'eos_token_id': tokenizer.eos_token_id}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=len(tokenizer), **shape, **ids)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures('_offline')
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
    'asked',
    [
        {},
        {'apply_chat_template': True, 'system_instruction': 'be short'},
        {'apply_chat_template': True, 'fewshot_as_multiturn': True, 'num_fewshot': 2},
        {
            'apply_chat_template': True,
            'fewshot_as_multiturn': False,
            'num_fewshot': 1,
            'system_instruction': 'be short',
        },
    ],
)
def test_chats_are_asked_as_by_its_own_backend(chatty, tmp_path, asked):
    from lm_eval import tasks as harness_tasks
    from lm_eval.models import huggingface

    from gptjax.evals import harness

    rows = [
        {'q': ' '.join(_WORDS[i : i + 3]), 'a': ['on a mat', 'red house'], 'gold': i % 2}
        for i in range(5)
    ]
    rows.append({'q': '', 'a': ['the', 'dog ran'], 'gold': 0})
    (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    head = (
        'dataset_path: json\ndataset_kwargs:\n  data_files:\n'
        f'    test: {tmp_path}/rows.jsonl\ntest_split: test\nfewshot_split: test\n'
        'fewshot_config:\n  sampler: first_n\ndoc_to_text: "{{q}}"\n'
    )
    (tmp_path / 'choice.yaml').write_text(
        f'task: choice\n{head}output_type: multiple_choice\ndoc_to_choice: "{{{{a}}}}"\n'
        'doc_to_target: gold\nmetric_list:\n  - metric: acc\n'
    )
    (tmp_path / 'said.yaml').write_text(
        f'task: said\n{head}output_type: generate_until\ndoc_to_target: "{{{{a[gold]}}}}"\n'
        'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 6\n'
        'metric_list:\n  - metric: exact_match\n'
    )
    found = []
    theirs = huggingface.HFLM(str(chatty), device='cpu', dtype='float32', batch_size=1)
    for model in (theirs, harness.Model(str(chatty))):
        manager = harness_tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
        names = ['choice'] if not asked else ['choice', 'said']
        result = lm_eval.simple_evaluate(
            model,
            tasks=names,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
            **asked,
        )
        found.append(result['samples'])
    for name in found[0]:
        for one, other in zip(*(samples[name] for samples in found), strict=True):
            assert one['arguments'] == other['arguments']
            if name == 'said':
                assert one['resps'] == other['resps']
                continue
            pairs = zip(one['resps'], other['resps'], strict=True)
            for ours, their in pairs:
                assert float(ours[0][0]) == pytest.approx(float(their[0][0]), abs=1e-3)


@pytest.mark.parametrize(
    'body',
    [
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\n',
        'output_type: generate_until\ndoc_to_text: "{{missing.x}}"\ndoc_to_target: a\n',
        'output_type: nonsense\n',
    ],
)
def test_what_goes_wrong_in_a_task_is_one_line(weights, tmp_path, capsys, monkeypatch, body):
    from gptjax.evals import harness

    monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'datasets'))
    monkeypatch.setattr('sys.argv', [])
    monkeypatch.setattr(logging, 'raiseExceptions', False)  # in streams of other tests
    (tmp_path / 'rows.jsonl').write_text('{"q": "the cat"}\n')
    (tmp_path / 'wrong.yaml').write_text(
        'task: wrong\ndataset_path: json\ndataset_kwargs:\n  data_files:\n'
        f'    test: {tmp_path}/rows.jsonl\ntest_split: test\n{body}'
    )
    flags = ['--model_args', f'pretrained={weights}', '--tasks', 'wrong']
    assert harness.main([*flags, '--include_path', str(tmp_path)]) == 1
    said = capsys.readouterr().err
    helpers.check_no_fault(said)
    assert said.strip().splitlines()[-1].startswith('error: ')


@pytest.mark.usefixtures('_offline')
def test_repeats_are_drawn_apart_and_the_same_again(weights):
    from lm_eval.api import instance

    from gptjax.evals import harness

    settings = {'until': [], 'do_sample': True, 'temperature': 3.0, 'max_gen_toks': 8}
    asked = [
        instance.Instance('generate_until', {}, ('the cat sat', dict(settings)), i)
        for i in range(4)
    ]
    said = harness.Model(str(weights)).generate_until(asked, disable_tqdm=True)
    assert len(set(said)) == 4
    assert harness.Model(str(weights)).generate_until(asked, disable_tqdm=True) == said


def test_the_program_runs_any_task(weights, tasks, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'gptjax.evaluate',
            'harness',
            '--model_args',
            f'pretrained={weights}',
            '--tasks',
            'local_piqa',
            '--include_path',
            str(tasks),
            '--output_path',
            str(tmp_path / 'out'),
        ],
        capture_output=True,
        text=True,
        cwd=conftest.ROOT,
        env=os.environ
        | {
            'HF_DATASETS_OFFLINE': '1',
            'HF_HUB_OFFLINE': '1',
            'HF_DATASETS_CACHE': str(tmp_path / 'datasets'),
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'local_piqa' in done.stdout
    assert 'acc_norm' in done.stdout


def test_bad_arguments_are_told(weights):
    from gptjax.configs import errors
    from gptjax.evals import harness

    with pytest.raises(errors.UsageError, match='pretrained='):
        harness.Model()
    with pytest.raises(errors.UsageError, match='unknown model_args: dtyp'):
        harness.Model(str(weights), dtyp='float32')
    with pytest.raises(errors.UsageError, match='beyond n_ctx = 48'):
        harness.Model(str(weights), max_length=99)
