# SPDX-License-Identifier: Apache-2.0
"""Every program on a tiny config, and again from its own output."""

import json
import shutil

import jax
import numpy as np
import pytest

from gptjax import convert, count_ngrams, evaluate, generate, train
from gptjax.configs import base, errors
from gptjax.evals import perplexity
from gptjax.models import pretrained, sources
from gptjax.runtime import metrics
from gptjax.storage import documents
from gptjax.text import tokenizer as tokenizer_lib
from tests import helpers


@pytest.fixture(scope='module')
def trained(tmp_path_factory, corpus_file):
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp('trained')
    config = helpers.tiny_config(folder, corpus_file)
    helpers.prepare(config, folder / 'run')
    train.main(helpers.args(config, folder / 'run'))
    return config, folder / 'run'


def test_training_leaves_what_it_promises(trained):
    _, workdir = trained
    results = json.loads((workdir / 'results.json').read_text())
    assert results['steps'] == 6
    assert 0 < results['eval/tokens/bits_per_byte'] < 9
    rows = metrics.read(workdir)
    assert [row['step'] for row in rows] == list(range(1, 7))
    for row in rows:
        assert row['tokens'] == row['step'] * 512
        assert row['flops'] > 0
        assert {'train/loss', 'opt/lr', 'opt/grad_norm', 'perf/tokens_per_sec'} <= row.keys()
    assert sum('eval/tokens/bits_per_byte' in row for row in rows) == 2
    assert any((workdir / 'tensorboard').iterdir())
    assert (workdir / 'config.json').exists()
    assert rows[-1]['train/loss'] < rows[0]['train/loss']


def test_training_again_changes_nothing(trained):
    config, workdir = trained
    before = (workdir / 'metrics.jsonl').read_text()
    train.main(helpers.args(config, workdir))
    assert (workdir / 'metrics.jsonl').read_text() == before


def test_scores_of_too_little_text_are_marked_in_the_results(trained, monkeypatch):
    config, workdir = trained
    results = workdir / 'results.json'
    before = results.read_text()
    assert 'notes' not in json.loads(before)
    monkeypatch.setattr(perplexity, '_TOO_LITTLE', 10**9)
    results.unlink()
    train.main(helpers.args(config, workdir))
    noted = json.loads(results.read_text())['notes']
    assert 'which is too little to measure a model by' in noted['tokens']
    results.write_text(before)


def test_evaluate_agrees_with_training(trained, capsys):
    config, workdir = trained
    evaluate.main(helpers.args(config, workdir))
    found = helpers.evaluation_of(workdir)
    results = json.loads((workdir / 'results.json').read_text())
    assert found['bits_per_byte'] == pytest.approx(results['eval/tokens/bits_per_byte'], rel=1e-5)
    assert 'windows of 32 tokens' in found['protocol']
    assert 'bits_per_byte' in capsys.readouterr().out
    evaluate.main(helpers.args(config, workdir, '--config.evaluate.stride=16'))
    strided = helpers.evaluation_of(workdir)
    assert strided['tokens'] == found['tokens']
    assert strided['nats_per_token'] != found['nats_per_token']


def test_generate_writes_samples(trained, capsys):
    config, workdir = trained
    flags = ('--prompt=the cat', '--prompt=한국어', '--config.decode.do_sample=True')
    flags += ('--config.decode.num_return_sequences=2',)
    generate.main(helpers.args(config, workdir, *flags, define=generate.define))
    rows = [json.loads(line) for line in (workdir / 'samples.jsonl').read_text().splitlines()]
    assert [row['prompt'] for row in rows] == ['the cat'] * 2 + ['한국어'] * 2
    assert 'the cat' in capsys.readouterr().out
    with pytest.raises(errors.UsageError, match='give --prompt'):
        generate.main(helpers.args(config, workdir, define=generate.define))
    long = ('--prompt=' + 'x' * 40,)
    with pytest.raises(errors.InputError, match='do not fit n_ctx = 32'):
        generate.main(helpers.args(config, workdir, *long, define=generate.define))


def test_another_workdir_reads_the_weights(trained, tmp_path):
    config, workdir = trained
    flags = ('--prompt=the', f'--config.init_from={workdir}')
    generate.main(helpers.args(config, tmp_path, *flags, define=generate.define))
    assert (tmp_path / 'samples.jsonl').exists()


def test_load_gives_a_model_that_applies(trained):
    _, workdir = trained
    model, params, tokenizer = pretrained.load(str(workdir))
    tokens = np.array([tokenizer.encode('the cat sat')], np.int32)
    logits = model.apply({'params': params}, tokens)
    assert logits.shape == (1, 11, 512)
    with pytest.raises(errors.InputError, match='does not exist'):
        pretrained.load(str(workdir / 'none'))


def test_workdir_of_another_config(trained):
    config, workdir = trained
    with pytest.raises(errors.InputError, match='optim.peak_lr = 0.001 there, 0.5 here'):
        train.main(helpers.args(config, workdir, '--config.optim.peak_lr=0.5'))
    train.main(helpers.args(config, workdir, '--config.checkpoint.keep=3'))  # may differ


def test_batch_that_does_not_divide(trained, tmp_path):
    config, workdir = trained
    (tmp_path / 'tokens').symlink_to(workdir / 'tokens')
    (tmp_path / 'tokenizer').symlink_to(workdir / 'tokenizer')
    with pytest.raises(errors.UsageError, match='use a multiple of 8 windows'):
        train.main(helpers.args(config, tmp_path, '--config.batch.batch_tokens=96'))


def test_tokenizer_that_does_not_match_the_shards(trained, tmp_path):
    config, workdir = trained
    helpers.prepare(
        config, tmp_path / 'o', '--config.tokenizer.kind=bpe', '--config.tokenizer.n_vocab=300'
    )
    wrong = f'--config.tokenizer.dir={tmp_path}/o/tokenizer'
    flags = (wrong, f'--config.data.sets=("{workdir}/tokens",)')
    flags += (f'--config.data.eval_sets.tokens={workdir}/tokens',)
    with pytest.raises(errors.InputError, match='were made with another tokenizer'):
        train.main(helpers.args(config, tmp_path / 'run', *flags))
    with pytest.raises(errors.UsageError, match='set --config.model.n_vocab=257'):
        train.main(helpers.args(config, workdir, '--config.model.n_vocab=256'))


def test_tokenizer_travels_with_the_weights(trained, tmp_path):
    config, workdir = trained
    flags = [
        f'--config.tokenizer.dir={workdir}/tokenizer',
        '--config.train.total_tokens=512',
        '--config.optim.warmup_tokens=0',
    ]
    flags += [f"--config.data.sets=('{workdir}/tokens',)"]
    flags += [f'--config.data.eval_sets.tokens={workdir}/tokens']
    train.main(helpers.args(config, tmp_path, *flags))
    assert pretrained.load(str(tmp_path)).tokenizer.n_vocab == 257
    folder = tmp_path / 'tokenizer'
    (folder / 'SHA256SUMS').unlink()  # as before there were sums
    (folder / 'bytes.json').rename(folder / 'tokenizer.json')
    with pytest.raises(errors.InputError, match='no tokenizer that can be read'):
        pretrained.load(str(tmp_path))


def test_other_shards_under_a_run_are_noticed(trained, tmp_path):
    config, workdir = trained
    shutil.copytree(workdir, tmp_path / 'run')
    manifest = tmp_path / 'run' / 'tokens' / 'manifest.json'
    said = documents.read(manifest, dict, '')
    documents.write(manifest, said | {'source': {'corpus': 'another'}})
    with pytest.raises(errors.InputError, match='trained on other token shards'):
        train.main(helpers.args(config, tmp_path / 'run'))


def test_a_workdir_that_is_a_file(trained, tmp_path):
    config, _ = trained
    (tmp_path / 'file').write_text('')
    with pytest.raises(errors.UsageError, match='is a file, not a folder'):
        helpers.args(config, tmp_path / 'file' / 'run')


def test_nan_stops_the_run_before_anything_is_saved(trained, tmp_path):
    config, workdir = trained
    for name in ('tokens', 'tokenizer'):
        (tmp_path / name).symlink_to(workdir / name)
    flags = (
        '--config.optim.peak_lr=1000.0',
        '--config.optim.warmup_tokens=0',
        '--config.model.init_std=10.0',
        '--config.optim.weight_decay=1000.0',
        '--config.train.total_tokens=51200',
        '--config.checkpoint.every_steps=1',
    )
    with pytest.raises(errors.InputError, match='nothing of it was saved'):
        train.main(helpers.args(config, tmp_path, *flags))
    rows = {row['step']: row for row in metrics.read(tmp_path)}
    saved = [int(path.name) for path in (tmp_path / 'checkpoints').iterdir()]
    assert saved
    assert np.isfinite([rows[step]['train/loss'] for step in saved]).all()


def test_epochs_set_the_length(trained, tmp_path):
    config, workdir = trained
    for name in ('tokens', 'tokenizer'):
        (tmp_path / name).symlink_to(workdir / name)
    flags = (
        '--config.train.total_tokens=0',
        '--config.train.total_epochs=0.1',
    )
    train.main(helpers.args(config, tmp_path, *flags))
    results = json.loads((tmp_path / 'results.json').read_text())
    manifest = json.loads((workdir / 'tokens' / 'manifest.json').read_text())
    total = sum(shard['tokens'] for shard in manifest['splits']['train'])
    assert 0 <= results['tokens'] - 0.1 * total <= 512


SHARED = (
    '--config.tokenizer.dir=../run/tokenizer',
    "--config.data.sets=('../run/tokens',)",
    '--config.data.eval_sets.tokens=../run/tokens',
)


def no_flags(values):
    del values


@pytest.mark.parametrize('model', ['ngram', 'gru'])
def test_baselines_are_runs_like_any_other(trained, model, capsys):
    config, run = trained
    workdir = run.parent / model
    spec = f'{config}:model={model}'
    program = count_ngrams if model == 'ngram' else train
    args = helpers.args(spec, workdir, *SHARED, define=getattr(program, 'define', no_flags))
    program.main(args)
    results = json.loads((workdir / 'results.json').read_text())
    gpt_results = json.loads((run / 'results.json').read_text())
    assert results.keys() == gpt_results.keys()
    evaluate.main(helpers.args(config, run))
    evaluate.main(helpers.args(spec, workdir, *SHARED))
    found = helpers.evaluation_of(workdir)
    gpt_found = helpers.evaluation_of(run)
    for same in ('tokens', 'bytes', 'documents'):
        assert found[same] == gpt_found[same]
    assert found['bits_per_byte'] == pytest.approx(results['eval/tokens/bits_per_byte'], rel=1e-5)
    flags = ('--prompt=the cat', '--prompt=a')
    generate.main(helpers.args(spec, workdir, *flags, define=generate.define))
    assert len((workdir / 'samples.jsonl').read_text().splitlines()) == 2
    before = (workdir / 'results.json').stat().st_mtime_ns
    program.main(args)
    assert (workdir / 'results.json').stat().st_mtime_ns == before
    capsys.readouterr()


def count(config, workdir, *flags):
    flags = (*SHARED, *flags)
    spec = f'{config}:model=ngram'
    count_ngrams.main(helpers.args(spec, workdir, *flags, define=count_ngrams.define))


def test_counting_wants_an_ngram_and_training_does_not(trained, tmp_path):
    config, run = trained
    with pytest.raises(errors.UsageError, match="model.family is 'gpt'"):
        count_ngrams.main(helpers.args(config, tmp_path, *SHARED))
    with pytest.raises(errors.UsageError, match=r'python -m gptjax\.count_ngrams'):
        train.main(helpers.args(f'{config}:model=ngram', tmp_path, *SHARED))
    workdir = run.parent / 'counted'  # beside run, whose tokens are read
    count(config, workdir)
    with pytest.raises(errors.InputError, match=r'model.order = 3 there, 2 here'):
        count(config, workdir, '--config.model.order=2')


def test_counts_are_kept_where_their_results_are_lost(trained):
    config, run = trained
    workdir = run.parent / 'recount'
    count(config, workdir)
    before = pretrained.load(workdir).params
    (workdir / 'results.json').unlink()
    count(config, workdir)
    jax.tree.map(np.testing.assert_array_equal, before, pretrained.load(workdir).params)
    assert (workdir / 'results.json').exists()


def test_an_arpa_file_is_written_when_it_is_asked_for(trained, monkeypatch):
    config, run = trained
    workdir = run.parent / 'with_arpa'
    count(config, workdir, '--arpa')
    arpa = workdir / 'model.arpa'
    wanted, results = arpa.read_bytes(), (workdir / 'results.json').read_bytes()
    late = run.parent / 'late_arpa'
    count(config, late)
    assert not (late / 'model.arpa').exists()
    monkeypatch.setattr(count_ngrams.kneser_ney, 'estimate', None)  # the tables are there
    count(config, late, '--arpa')
    assert (late / 'model.arpa').read_bytes() == wanted
    arpa.write_bytes(wanted[:-9])
    count(config, workdir)
    assert arpa.read_bytes() == wanted
    assert (workdir / 'results.json').read_bytes() == results
    assert not (workdir / '.work').exists()


def convert_args(source, target, *flags):
    flags = (f'--config.init_from={source}', *flags)
    return helpers.args(base.__file__, target, *flags, define=convert.define)


def test_convert_goes_both_ways(trained, tmp_path):
    config, run = trained
    convert.main(convert_args(run, tmp_path / 'hf', '--to=huggingface'))
    convert.main(convert_args(tmp_path / 'hf', tmp_path / 'back'))
    first, back = pretrained.load(run), pretrained.load(tmp_path / 'back')
    jax.tree.map(np.testing.assert_array_equal, first.params, back.params)
    assert tokenizer_lib.fingerprint(first.tokenizer) == tokenizer_lib.fingerprint(back.tokenizer)
    weights = tmp_path / 'hf' / 'model.safetensors'
    written = weights.stat()
    convert.main(convert_args(run, tmp_path / 'hf', '--to=huggingface'))
    assert weights.stat() == written, 'it was done already'
    for flags in (('--to=workdir',), ('--to=huggingface', '--dtype=float16')):
        with pytest.raises(errors.InputError, match='is not empty'):
            convert.main(convert_args(run, tmp_path / 'hf', *flags))
    with pytest.raises(errors.InputError, match='is not empty'):
        convert.main(convert_args(tmp_path / 'back', tmp_path / 'hf', '--to=huggingface'))
    with pytest.raises(errors.UsageError, match=r'give --config\.init_from'):
        convert.main(convert_args('', tmp_path / 'x'))
    convert.main(convert_args(tmp_path / 'hf', tmp_path / 'half', '--dtype=bfloat16'))
    assert pretrained.load(tmp_path / 'half').model.config.param_dtype == 'bfloat16'
    for folder in ('hf', 'back'):  # wherever a workdir is accepted
        source = f'--config.init_from={tmp_path}/{folder}'
        flags = (source, f'--config.data.eval_sets.tokens={run}/tokens')
        evaluate.main(helpers.args(config, tmp_path / 'e', *flags))
        found = helpers.evaluation_of(tmp_path / 'e')
        results = json.loads((run / 'results.json').read_text())
        wanted = results['eval/tokens/bits_per_byte']
        assert found['bits_per_byte'] == pytest.approx(wanted, rel=1e-4)
        generate.main(
            helpers.args(config, tmp_path / 'g', source, '--prompt=a', define=generate.define)
        )


def test_training_starts_from_published_weights(trained, tmp_path):
    config, run = trained
    kept = {'LICENSE': b'as you like', 'generation_config.json': b'{"top_k": 3}'}
    pretrained.save(tmp_path / 'hf', *pretrained.load(run), kept=kept)
    flags = [
        f'--config.tokenizer.dir={run}/tokenizer',
        f"--config.data.sets=('{run}/tokens',)",
        f'--config.data.eval_sets.tokens={run}/tokens',
        '--config.optim.peak_lr=1e-9',
        f'--config.init_from={tmp_path}/hf',
    ]
    train.main(helpers.args(config, tmp_path / 'more', *flags))
    beside = sources.open(tmp_path / 'more').beside  # what was published stays with the run
    assert {name: beside[name] for name in kept} == kept
    rows = metrics.read(tmp_path / 'more')
    scratch = metrics.read(run)
    assert rows[0]['train/loss'] < scratch[0]['train/loss'] - 0.1
    results = json.loads((tmp_path / 'more' / 'results.json').read_text())
    before = json.loads((run / 'results.json').read_text())
    name = 'eval/tokens/bits_per_byte'
    assert results[name] == pytest.approx(before[name], rel=1e-4)  # a rate of nearly zero
    with pytest.raises(errors.InputError, match="init_from = .*/hf there, '' here"):
        train.main(helpers.args(config, tmp_path / 'more', *flags[:-1]))
    convert.main(convert_args(tmp_path / 'hf', tmp_path / 'converted'))
    with pytest.raises(errors.InputError, match='holds converted weights'):
        train.main(helpers.args(config, tmp_path / 'converted', *flags[:-1]))
    with pytest.raises(errors.InputError, match='d_ff = 256 there, 128 here'):
        train.main(helpers.args(config, tmp_path / 'other', *flags, '--config.model.d_ff=128'))
