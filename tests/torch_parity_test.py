# SPDX-License-Identifier: Apache-2.0
"""Against the world: transformers' GPT-2 in torch, from identical weights and batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.training import step as step_lib
from tests import helpers

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

WINDOWS, N_CTX, N_VOCAB, STEPS = 4, 32, 96, 200


def peer_of(model, params):
    """A torch GPT-2 with the same weights."""
    cfg = model.config
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=cfg.n_vocab,
            n_positions=cfg.n_ctx,
            n_embd=cfg.d_model,
            n_layer=cfg.n_layers,
            n_head=cfg.n_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation='eager',
        )
    )
    gpt = jax.tree.map(np.asarray, params['network'])
    width = cfg.d_model
    new = {
        'transformer.wte.weight': gpt['token_embedding'],
        'transformer.wpe.weight': gpt['position_embedding'],
        'transformer.ln_f.weight': gpt['final_norm']['scale'],
        'transformer.ln_f.bias': gpt['final_norm']['bias'],
    }
    for layer in range(cfg.n_layers):
        block = jax.tree.map(lambda x, layer=layer: x[layer], gpt['block_0'])
        name = f'transformer.h.{layer}.'
        qkv = [block['attention'][k] for k in ('query', 'key', 'value')]
        new |= {
            name + 'ln_1.weight': block['norm_attention']['scale'],
            name + 'ln_1.bias': block['norm_attention']['bias'],
            name + 'ln_2.weight': block['norm_mlp']['scale'],
            name + 'ln_2.bias': block['norm_mlp']['bias'],
            name + 'attn.c_attn.weight': np.concatenate(
                [x['kernel'].reshape(width, width) for x in qkv], axis=1
            ),
            name + 'attn.c_attn.bias': np.concatenate([x['bias'].ravel() for x in qkv]),
            name + 'attn.c_proj.weight': block['attention']['out']['kernel'].reshape(width, width),
            name + 'attn.c_proj.bias': block['attention']['out']['bias'],
            name + 'mlp.c_fc.weight': block['up']['kernel'],
            name + 'mlp.c_fc.bias': block['up']['bias'],
            name + 'mlp.c_proj.weight': block['down']['kernel'],
            name + 'mlp.c_proj.bias': block['down']['bias'],
        }
    state = {k: torch.tensor(np.array(v)) for k, v in new.items()}
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert set(missing) <= {'lm_head.weight'}
    assert not unexpected
    return peer


def test_200_adamw_steps_match_torch():
    model = helpers.tiny_model(n_vocab=N_VOCAB, n_ctx=N_CTX, d_model=64, n_layers=3)
    params = jax.tree.map(jnp.copy, helpers.params_of(model))
    peer = peer_of(model, params)
    total = STEPS * WINDOWS * N_CTX
    plan = helpers.plan_of(WINDOWS * N_CTX, N_CTX, total)
    recipe = {'peak_lr': 3e-3, 'schedule': 'cosine', 'warmup_tokens': total // 10}
    optimizer = helpers.optimizer_of(plan, model, clip_norm=0.5, **recipe)
    train_step = step_lib.make_train_step(helpers.loss_of(model), optimizer, 0, step_lib.Options())
    state = helpers.state_of(params, optimizer)

    spared = [p for n, p in peer.named_parameters() if n.endswith('bias') or '.ln_' in n]
    decayed = [p for n, p in peer.named_parameters() if not (n.endswith('bias') or '.ln_' in n)]
    groups = [{'params': decayed, 'weight_decay': 0.1}, {'params': spared, 'weight_decay': 0.0}]
    torch_optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    worst = 0.0
    first = last = 0.0
    for step in range(STEPS):
        batch = helpers.batch_of(WINDOWS, N_CTX, N_VOCAB, seed=step % 20)
        state, metrics = train_step(state, batch)

        tokens = (step + 1) * WINDOWS * N_CTX  # the update's own batch included
        warm = min(tokens / (total // 10), 1.0)
        done = min(max((tokens - total // 10) / (total - total // 10), 0.0), 1.0)
        rate = 3e-3 * warm * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * done)))
        for group in torch_optimizer.param_groups:
            group['lr'] = rate
        logits = peer(torch.tensor(batch['tokens'], dtype=torch.long)).logits
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, N_VOCAB),
            torch.tensor(batch['targets'], dtype=torch.long).reshape(-1),
        )
        torch_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 0.5)
        torch_optimizer.step()
        worst = max(worst, abs(float(metrics['train/loss']) - loss.item()))
        first, last = first or loss.item(), loss.item()
    assert worst < 1e-3
    assert last < first - 0.5  # it did learn
