# SPDX-License-Identifier: Apache-2.0
"""The one complete config tree: every field with its unit, constraint and source.

Folders that are relative (the `dir` fields, data.sets, data.eval_set) are taken from --workdir, so
that one folder holds a whole run; what is read from elsewhere is relative to where you stand.
An experiment copies this tree, replaces its `model` section with one from sizes.py, and locks it.
"""

import ml_collections

from gptjax.configs import sizes


def get_config() -> ml_collections.ConfigDict:
    """The default run: the Python documentation corpus and a tiny GPT."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # initialisation, dropout and data order; a run is f(commit, config, seed)
    # Weights to start from, instead of --workdir's (generate, evaluate) or of random ones (train):
    # a workdir, a Hugging Face folder or a .gguf file.
    config.init_from = ''
    config.data_dir = ''  # local files of evaluation tasks, as docs/evaluate.md lists; '' = none

    config.corpus = ml_collections.ConfigDict(
        {
            'set': 'stdlib',  # a module of gptjax.data.sets
            'path': '',  # what the set reads: folder, file, glob or TFDS name; '' = nothing
            'text_field': 'text',  # the field of JSONL or TFDS records that holds the text
            'dir': 'corpus',  # where the documents are written
            'shard_bytes': 64 * 2**20,  # text per document shard; above 0
        }
    )
    config.tokenizer = ml_collections.ConfigDict(
        {
            'kind': 'bpe',  # bpe (byte-level), sentencepiece, bytes, or file (see path)
            'path': '',  # kind=file: tokenizer.json, *.model, encoder.json, or a folder
            'dir': 'tokenizer',  # where it is written and read
            'n_vocab': 4096,  # ids, end-of-text included; above 257 for bpe
            'sample_bytes': 256 * 2**20,  # text it is trained on, from the start of the corpus
        }
    )
    config.tokens = ml_collections.ConfigDict(
        {
            'dir': 'tokens',  # where the shards and their manifest are written
            'valid_fraction': 0.05,  # share of documents held out, by document hash; 0 <= x < 1
            'processes': 2,  # tokenising processes; at least 1
        }
    )
    config.data = ml_collections.ConfigDict(
        {
            'sets': (
                'tokens',
            ),  # folders of token shards to train on; gs:// and the like are staged first
            'weights': (1.0,),  # their shares, in windows; normalised
            'eval_set': 'tokens',  # folder whose held-out split is scored
            'prefetch_steps': 4,  # batches made ahead of the device
            'stage_dir': 'staged',  # where remote shards are copied before training
        }
    )
    config.model = sizes.model('tiny', n_vocab=4096)
    config.ngram = ml_collections.ConfigDict(
        {
            'memory_tokens': 50_000_000,  # n-grams counted in memory; more are sorted on disk
        }
    )
    config.batch = ml_collections.ConfigDict(
        {
            'batch_tokens': 2048,  # tokens an update; a multiple of n_ctx
            'accum_steps': 1,  # microbatches an update; divides the windows of every batch
            'ramp_from_tokens': 0,  # batch at the start of the ramp; 0 = no ramp
            'ramp_over_tokens': 0,  # tokens until the full batch (GPT-3, section B)
            'ramp_stages': 4,  # batch sizes the ramp goes through: each is one compilation
        }
    )
    config.optim = ml_collections.ConfigDict(
        {
            'peak_lr': 1e-3,
            # After the warm-up: cosine, linear, constant, wsd (stable, then decay), inverse_sqrt.
            'schedule': 'cosine',
            'warmup_tokens': 0,  # linear from 0
            'decay_tokens': 0,  # warm-up included; constant afterwards; 0 = to the end of training
            'cooldown_tokens': 0,  # of wsd: its decay, the last of decay_tokens
            'final_lr_fraction': 0.1,  # of peak_lr, at the end of the decay
            'b1': 0.9,
            'b2': 0.95,
            'eps': 1e-8,  # outside the square root, as in Adam's paper, algorithm 1
            'weight_decay': 0.1,  # decoupled (AdamW); biases and gains are spared
            'clip_norm': 1.0,  # global gradient norm; 0 = no clipping
            'mu_dtype': 'float32',  # of Adam's first moments: float32 or bfloat16
            'nu_dtype': 'float32',  # of its second moments; bfloat16 wants b2 up to 0.99
            'ema_decay': 0.0,  # of an average of the weights, an update; 0 = none is kept
            'offload': False,  # keep the moments in the host's memory between steps
        }
    )
    config.train = ml_collections.ConfigDict(
        {
            'total_tokens': 200_000,  # length of the run; exactly one of these two is above 0
            'total_epochs': 0.0,  # over all the training sets
            'log_every_steps': 10,
            'eval_every_steps': 200,  # 0 = only at the end
            # A loss that is not finite, or a spike: stop; skip the update; or rollback: go back
            # rollback_steps at least, to a checkpoint, and leave out the batches since.
            'on_spike': 'stop',
            'spike_sigmas': 0.0,  # deviations above the usual loss; 0 = only what is not finite
            'rollback_steps': 100,
            'layer_norms': False,  # log every layer's norms of weights, gradients, updates
            'profile_at_step': 0,  # write a profile from this step on; 0 = only on SIGUSR1
            'profile_steps': 5,  # how many steps it covers
            'wandb_project': '',  # also log to Weights & Biases (pip install wandb); '' = no
        }
    )
    config.evaluate = ml_collections.ConfigDict(
        {
            'n_ctx': 0,  # tokens of a window; 0 = the model's
            'stride': 0,  # tokens between windows; 0 = the window's, that is without overlap
            'batch_windows': 8,  # windows scored at once; a multiple of the mesh's data x fsdp
            'max_tokens': 0,  # score whole documents up to this many tokens; 0 = the whole split
        }
    )
    config.suite = ml_collections.ConfigDict(
        {
            'tasks': (),  # modules of gptjax.evals.tasks list them; () = held-out text alone
            'k': (0,),  # examples in the prompt; -1 = the paper's few-shot K of each task
            'seeds': (0,),  # of the draws of examples, each scored
            'limit': 0,  # items of a task, drawn; 0 = all
            'n_ctx': 0,  # tokens of a prompt with its answer; 0 = the model's
            'stride': 0,  # tokens between windows of whole texts; 0 = without overlap
            'batch_tokens': 1024,  # scored at once; accelerators want more
            'batch_prompts': 8,  # texts generated side by side
            'clean_against': '',  # folder of a prepared corpus: also score items not found in it
            'beside': (),  # workdirs of other evaluations: compared, drawn in the pictures
            'download': False,  # let TFDS fetch what it has not prepared
        }
    )
    config.checkpoint = ml_collections.ConfigDict(
        {
            'every_steps': 500,  # 0 = only by time and at the end
            'every_secs': 600.0,  # 0 = only by steps and at the end
            'keep': 2,  # newest ones kept; at least 2, so that a damaged one can be passed over
        }
    )
    config.mesh = ml_collections.ConfigDict(
        {
            'data': -1,  # devices along each axis; one of them may be -1: all that are left
            'fsdp': 1,
            'tensor': 1,
            'context': 1,
        }
    )
    config.decode = ml_collections.ConfigDict(
        {
            # Of each request, in transformers' names; processors apply in the order of
            # sampling/processors.py.
            'max_new_tokens': 64,  # 0 = max_length decides
            'max_length': 0,  # tokens of prompt and text together, where max_new_tokens is 0
            'min_new_tokens': 0,  # before these no end token
            'min_length': 0,  # the same, prompt included
            'do_sample': False,  # draw; else the most likely token, or beam search
            'temperature': 1.0,  # 0 = the most likely token
            'top_k': 50,  # draw from the k most likely; 0 = all
            'top_p': 1.0,  # ... from the fewest whose probabilities reach it
            'min_p': 0.0,  # ... from those at least this fraction of the most likely one
            'typical_p': 1.0,  # ... from the fewest, nearest to the entropy, that reach it
            'repetition_penalty': 1.0,  # of tokens in prompt or text (Keskar et al. 2019, 4.1)
            'presence_penalty': 0.0,  # of tokens in the text, off the logit, -2 to 2 (OpenAI)
            'frequency_penalty': 0.0,  # the same, times how often
            'no_repeat_ngram_size': 0,  # no n-gram twice, prompt included; 0 = off
            'bad_words_ids': (),  # sequences of ids that must not be completed
            'sequence_bias': (),  # ((ids, bias), ...): added to the last id's logit after the rest
            'logit_bias': (),  # ((id, bias), ...)
            'num_beams': 1,  # above 1: beam search, beam sampling with do_sample
            'num_beam_groups': 1,  # above 1: diverse beam search (Vijayakumar et al. 2018)
            'diversity_penalty': 0.0,  # a token's, each time an earlier group has just taken it
            'length_penalty': 1.0,  # scores are divided by length to this power
            'early_stopping': False,  # True, False, 'never': when beam search ends
            'num_return_sequences': 1,  # texts of each prompt
            'eos_token_id': (),  # ids that end a text; () = the model's; (-1,) = none
            'stop_strings': (),  # a text ends before the first of them
            'logprobs': -1,  # -1 = none; n = of the tokens, and of the n most likely ones (20)
            'echo': False,  # also give the prompt's tokens and log-probs
            'beyond_context': 'error',  # or slide: read the last half of the window again
            'prompt_lookup_num_tokens': 0,  # drafts found in the text so far; 0 = off
            'seed': 0,  # of the draws; requests without a seed of their own get seed, seed + 1, ...
        }
    )
    config.engine = ml_collections.ConfigDict(
        {
            'slots': 8,  # requests decoded side by side
            'max_tokens': 0,  # of a slot; 0 = n_ctx
            'chunk_tokens': 128,  # of a prompt, read between two decoding steps of the others
            'steps': 8,  # tokens between two looks at new requests
            'weights': '',  # int8 or int4: quantised; '' = as they are
            'dtype': '',  # of the weights: float32, bfloat16, float16; '' = as they are stored
            'cache_dtype': '',  # int8: quantised keys and values; '' = the model's
            'draft': '',  # a small model of the same vocabulary, for speculative decoding
            'draft_tokens': 4,  # it proposes at a time
        }
    )
    return config
