# SPDX-License-Identifier: Apache-2.0
"""How text is generated: what a request may ask for, and how requests are served.

The names of a request's options are transformers', and so are the defaults: its pipeline's. What
generation_config.json beside weights says goes before them. Processors apply in the order of
sampling/processors.py.
"""

from gptjax.configs.fields import free

DECODE = {
    'max_new_tokens': free(256, '0 = max_length decides'),
    'max_length': free(0, 'tokens of prompt and text together, where max_new_tokens is 0'),
    'min_new_tokens': free(0, 'before these no end token'),
    'min_length': free(0, 'the same, prompt included'),
    'do_sample': free(True, 'draw; else the most likely token, or beam search'),
    'temperature': free(0.7, '0 = the most likely token'),
    'top_k': free(50, 'draw from the k most likely; 0 = all'),
    'top_p': free(1.0, '... from the fewest whose probabilities reach it'),
    'min_p': free(0.0, '... from those at least this fraction of the most likely one'),
    'typical_p': free(1.0, '... from the fewest, nearest to the entropy, that reach it'),
    'top_h': free(0.0, '... from the likeliest, of this part of the entropy; 0 = all', was=0.0),
    'epsilon_cutoff': free(0.0, '... from those of at least this probability', was=0.0),
    'eta_cutoff': free(0.0, '... or of its root times exp(-entropy), if less', was=0.0),
    'guidance_scale': free(
        1.0, 'log-probs are moved so far from those without the prompt; 1 = off', was=1.0
    ),
    'encoder_repetition_penalty': free(1.0, "above 1: favours the prompt's tokens", was=1.0),
    'repetition_penalty': free(1.0, 'of tokens in prompt or text (Keskar et al. 2019, 4.1)'),
    'presence_penalty': free(0.0, 'of tokens in the text, off the logit, -2 to 2 (OpenAI)'),
    'frequency_penalty': free(0.0, 'the same, times how often'),
    'no_repeat_ngram_size': free(0, 'no n-gram twice, prompt included; 0 = off'),
    'encoder_no_repeat_ngram_size': free(0, 'no n-gram of the prompt; 0 = off', was=0),
    'bad_words_ids': free((), 'sequences of ids that must not be completed'),
    'sequence_bias': free((), "((ids, bias), ...): added to the last id's logit after the rest"),
    'logit_bias': free((), '((id, bias), ...)'),
    'suppress_tokens': free((), 'ids that never come', was=()),
    'begin_suppress_tokens': free((), 'ids that do not come first', was=()),
    'forced_bos_token_id': free(-1, 'comes behind a prompt of one token; -1 = none', was=-1),
    'forced_eos_token_id': free((), 'ids of which one comes as the last that fits', was=()),
    'exponential_decay_length_penalty': free(
        (), '(start, factor): so many tokens on, end tokens gain by its powers', was=()
    ),
    'remove_invalid_values': free(False, 'NaN becomes 0, infinities the largest floats', was=False),
    'renormalize_logits': free(False, 'to log-probs, after all the others', was=False),
    'num_beams': free(1, 'above 1: beam search, beam sampling with do_sample'),
    'num_beam_groups': free(1, 'above 1: diverse beam search (Vijayakumar et al. 2018)'),
    'diversity_penalty': free(0.0, "a token's, each time an earlier group has just taken it"),
    'length_penalty': free(1.0, 'scores are divided by length to this power'),
    'early_stopping': free(False, "True, False, 'never': when beam search ends"),
    'num_return_sequences': free(1, 'texts of each prompt'),
    'eos_token_id': free((), "ids that end a text; () = the model's; (-1,) = none"),
    'stop_strings': free((), 'a text ends before the first of them; of special tokens their names'),
    'split_special_tokens': free(
        False, 'names of special tokens in a prompt are text, not these tokens', was=False
    ),
    'logprobs': free(-1, '-1 = none; n = of the tokens, and of the n most likely ones (20)'),
    'echo': free(False, "also give the prompt's tokens and log-probs"),
    'beyond_context': free('error', 'or slide: read the last half of the window again'),
    'prompt_lookup_num_tokens': free(0, 'drafts found in the text so far; 0 = off'),
    'seed': free(0, 'of the draws; requests without one of their own get seed, seed + 1, ...'),
}
ENGINE = {
    'slots': free(8, 'requests decoded side by side'),
    'max_tokens': free(0, 'of a slot; 0 = n_ctx'),
    'chunk_tokens': free(128, 'of a prompt, read between two decoding steps of the others'),
    'steps': free(8, 'tokens between two looks at new requests'),
    'weights': free('', "int8 or int4: quantised; '' = as they are"),
    'dtype': free('', "of the weights: float32, bfloat16, float16; '' = as they are stored"),
    'cache_dtype': free('', "int8: quantised keys and values; '' = the model's"),
    'draft': free('', 'a small model of the same vocabulary, for speculative decoding'),
    'draft_tokens': free(4, 'it proposes at a time'),
}
