# SPDX-License-Identifier: Apache-2.0
"""Sources, documents, token shards, and the windows of a run."""

from gptjax.configs.fields import fixed, free

CORPUS = {
    'set': free('stdlib', 'a module of gptjax.data.sets'),
    'path': free('', "what the set reads: folder, file, glob or TFDS name; '' = nothing"),
    'text_field': free('text', 'the field or column of records that holds the text'),
    'dir': free('corpus', 'where the documents are written'),
    'shard_bytes': free(2**29, 'text per document shard; above 0'),
    'repeated': free('once', 'documents that repeat another one exactly: once, or all', was='all'),
    'max_bad': free(100, 'records that cannot be read and are set aside before it ends', was=0),
    'processes': free(0, 'cores that read a set in parts, as files are; 0 = all', was=1),
}
TOKENIZER = {
    'kind': free('bpe', 'bpe (byte-level), sentencepiece, bytes, or file (see path)'),
    'path': free('', 'kind=file: tokenizer.json, *.model, encoder.json, or a folder'),
    'dir': free('tokenizer', 'where it is written and read'),
    'n_vocab': free(4096, 'ids, end-of-text included; above 257 for bpe'),
    'sample_bytes': free(256 * 2**20, 'text it is trained on, drawn from all of the corpus'),
}
TOKENS = {
    'dir': free('tokens', 'where the shards and their manifest are written'),
    'valid_fraction': free(0.05, 'share of documents held out, by document hash; 0 <= x < 1'),
    'valid_bytes': free(
        2**26, 'bytes of text held out, at most, of a large corpus; 0 = any', was=0
    ),
    'processes': free(0, 'cores that tokenise; 0 = all'),
}
DATA = {
    'sets': free(('tokens',), 'folders of token shards to train on, here or in buckets (gs://)'),
    'weights': fixed((1.0,), 'their shares, in windows; normalised'),
    'eval_sets': free(
        {'tokens': 'tokens'},
        "label -> folder whose held-out split is scored as eval/<label>/...; '' = none",
    ),
    'prefetch_steps': free(4, 'batches made ahead of the device'),
    'read_threads': free(16, 'windows of a batch that are read at once', was=1),
    'stage_dir': free('staged', 'where shards are copied from elsewhere; of ~/.cache/gptjax'),
    'read': free(
        'auto',
        'shards in a bucket: stage (copy first), stream (ranges of bytes) or auto: copied where '
        'the disk has room',
        was='auto',
    ),
    'verify': free(
        'changed',
        'hashes of training shards compared: those of changed files, always or never; held-out '
        'ones always are',
        was='changed',
    ),
}
