# SPDX-License-Identifier: Apache-2.0
"""The model section, by family. Defaults are GPT-2's small model and the papers' baselines.

GPT-2's choices: its paper, section 2.3, and the released src/model.py.
"""

from gptjax.configs.fields import fixed, free

GPT = {
    'family': fixed('gpt', 'a module of gptjax.models'),
    'n_layers': fixed(12, 'blocks of attention and a feed-forward net'),
    'd_model': fixed(768, 'width of the residual stream'),
    'n_heads': fixed(12, 'query heads; n_heads x d_head is d_model in every published size'),
    'd_head': fixed(64, 'width of a head'),
    'n_kv_heads': fixed(0, 'heads with keys and values of their own (Llama); 0 = n_heads'),
    'd_ff': fixed(3072, 'width inside the feed-forward net; 4 x d_model in the papers'),
    'n_ctx': fixed(1024, 'tokens of context'),
    'n_vocab': fixed(50257, "ids; more than the tokenizer's are padding"),
    'norm': fixed('pre', 'where: pre (GPT-2, GPT-3) or post (GPT-1)'),
    'norm_kind': fixed('layer', 'a function of models/layers.py: layer, rms (Llama)'),
    'norm_eps': fixed(1e-5, 'added to the variance'),
    'parallel_residual': fixed(False, 'attention and feed-forward net side by side (GPT-J)'),
    'attention': fixed(
        ('dense',), 'pattern repeated over the layers: forms of models/masks.py: dense, banded'
    ),
    'band_width': fixed(0, 'positions a banded layer sees, its own included; 0 = no such layer'),
    'positions': fixed('learned', 'learned or rotary (GPT-J, Llama)'),
    'rotary_dims': fixed(0, 'of each head, that are rotated; 0 = no rotary positions'),
    'rotary_base': fixed(1e4, 'wave lengths run from 2 pi up to this many times as long'),
    'rotary_scaling': fixed(
        (), "or Llama 3.1's factor, low, high frequency factor, original n_ctx"
    ),
    'mlp': fixed('dense', 'a module of gptjax.models.mlps; NAME:option=value,...', was='dense'),
    'activation': fixed('gelu_tanh', 'gelu_tanh, gelu (by erf), relu, silu'),
    'gated_mlp': fixed(False, 'activation(gate) x up (Shazeer 2020); with silu: SwiGLU'),
    'attention_bias': fixed(True, 'of queries, keys, values and the output'),
    'mlp_bias': fixed(True, 'of the feed-forward net'),
    'norm_bias': fixed(True, 'of the norms'),
    'head_bias': fixed(False, 'of the logits (GPT-J)'),
    'tied_embedding': fixed(True, 'the token embedding gives the logits too'),
    'mup_base_width': fixed(
        0, 'muP: d_model of the model whose rates are taken over; 0 = standard', was=0
    ),
    'init_std': fixed(0.02, 'of weights at the beginning'),
    'position_init_std': fixed(0.01, 'of learned positions (src/model.py; the paper is silent)'),
    # "Scaled at initialization by 1/sqrt(N), N the number of residual layers": two a block.
    'residual_init_std': fixed(
        0.02 / 24**0.5, 'of weights that write to the residual stream: init_std / sqrt(2 n_layers)'
    ),
    'embed_dropout': fixed(0.0, 'of the embedded tokens'),
    'attention_dropout': fixed(0.0, 'of attention weights; above 0 no kernel is used'),
    'residual_dropout': fixed(0.0, 'of what a branch adds to the residual stream'),
    'param_dtype': fixed('float32', 'float32, bfloat16 or float16; float32 in training'),
    'compute_dtype': free('float32', 'as param_dtype; softmax, norms and losses stay float32'),
    'scan_layers': free(True, 'one compiled block for all repeats of the pattern; False unrolls'),
    'remat': free('none', 'none, dots, blocks, full or offload: see models/stack.py'),
}
# Parameters: the small model of Zaremba et al. 2014 (section 4.1): 2 x 200, uniform, no dropout.
RNN = {
    'family': fixed('rnn', 'a module of gptjax.models'),
    'cell': fixed('lstm', 'lstm or gru'),
    'n_layers': fixed(2, 'recurrent layers'),
    'd_model': fixed(200, 'units of a layer, and of the embedding'),
    'n_ctx': fixed(128, 'tokens of a window; the state starts at zero before each'),
    'n_vocab': fixed(10000, "ids; more than the tokenizer's are padding"),
    'bptt_tokens': fixed(32, 'gradients go back at most so many tokens; 0 = the whole window'),
    'init_range': fixed(0.1, 'weights begin uniform over plus and minus this'),
    'dropout': fixed(0.0, 'of the embedding, between layers, of the output'),
    'tied_embedding': fixed(True, 'the embedding gives the logits too (Press and Wolf 2017)'),
    'param_dtype': fixed('float32', 'float32 or bfloat16'),
    'compute_dtype': free('float32', 'as param_dtype'),
}
NGRAM = {
    'family': fixed('ngram', 'a module of gptjax.models'),
    'order': fixed(5, 'n; it sees n - 1 tokens'),
    'n_ctx': fixed(128, 'tokens of a window that is scored'),
    'n_vocab': fixed(50257, "ids; more than the tokenizer's are padding"),
    'entries': free((), 'n-grams of each order; () until they are counted'),
}
FAMILIES = {'gpt': GPT, 'rnn': RNN, 'ngram': NGRAM}
COUNTING = {
    'total_tokens': fixed(
        0, 'tokens counted: of the windows that training reads first by the seed; 0 = all', was=0
    ),
    'memory_tokens': free(50_000_000, 'n-grams counted in memory; more are sorted on disk'),
}
