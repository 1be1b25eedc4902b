# SPDX-License-Identifier: Apache-2.0
"""A throw-away second program that trains: texts into classes, on made data.

Its own model, loss, metric, epochs and rule for the best checkpoint; what it shares with
pre-training it takes from Run. tests/second_caller_test.py holds it to that.
"""

import pathlib

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax.configs import cli, fields
from gptjax.models import axes
from gptjax.runtime import checkpoint
from gptjax.runtime import mesh as mesh_lib
from gptjax.training import loop, losses, optim, parameters, section
from gptjax.training import plan as plan_lib
from gptjax.training import recipe as recipe_lib
from gptjax.training import run as run_lib
from gptjax.training import step as step_lib

READS = ('seed', 'optim', 'train', 'checkpoint', 'mesh')
N_VOCAB, N_CTX, N_CLASSES, BATCH = 32, 12, 4, 16


class Classifier(nn.Module):
    """Mean of the embeddings, then one linear layer."""

    @nn.compact
    def __call__(self, tokens_BxL):
        table = axes.table(nn.initializers.normal(0.1), 'vocab', 'embed')
        embedding_VxD = self.param('embedding', table, (N_VOCAB, 16), jnp.float32)
        head = axes.matrix(nn.initializers.normal(0.1), 'embed', 'mlp', inputs=(0,))
        head_DxC = self.param('head', head, (16, N_CLASSES), jnp.float32)
        return embedding_VxD[tokens_BxL].mean(axis=1) @ head_DxC


def records(split):
    """Random texts; the class is the most frequent quarter of the vocabulary."""
    rng = np.random.default_rng({'train': 0, 'valid': 1}[split])
    tokens = rng.integers(0, N_VOCAB, (160 if split == 'train' else 64, N_CTX)).astype(np.int32)
    counts = np.stack([(tokens // 8 == c).sum(axis=1) for c in range(N_CLASSES)], axis=1)
    return tokens, counts.argmax(axis=1).astype(np.int32)


def batches(plan, mesh, seed, start):
    """Every epoch in an order of its own; step s reads what the plan says."""
    tokens, labels = records('train')
    order = grain.MapDataset.range(len(tokens)).shuffle(seed=seed).repeat()
    for step in range(start, plan.total_steps):
        first, number = plan.examples(step)
        rows = np.array([order[i] for i in range(first, first + number)])
        yield mesh.put({'tokens': tokens[rows], 'labels': labels[rows]})


def loss_of(model):
    """Cross-entropy, with the accuracy logged beside it."""

    def loss(params, batch, rng):
        del rng
        logits = model.apply({'params': params}, batch['tokens'])
        nats = losses.token_nats(logits[:, None], batch['labels'][:, None])
        right = jnp.sum(logits.argmax(axis=-1) == batch['labels'])
        return nats.sum(), {'accuracy': right * 1.0, 'weight': jnp.array(len(logits) * 1.0)}

    return loss


def main(args: cli.Args) -> None:
    """Trains for train.total_epochs; WORKDIR/best is the most accurate checkpoint."""
    config = args.config
    optim_, train = optim.configure(config.optim), args.section('train', section.Config)
    kept = args.section('checkpoint', checkpoint.Config)
    with run_lib.Run(config, pathlib.Path(args.workdir), READS, train, kept) as run:
        mesh = mesh_lib.Mesh(fields.build(mesh_lib.Config, config.mesh, 'mesh'))
        model = Classifier()
        n_train = len(records('train')[0])
        plan = plan_lib.of_epochs(n_train, BATCH, train.total_epochs, N_CTX)

        def init(key):
            return model.init(key, jnp.zeros((1, N_CTX), jnp.int32))['params']

        described = axes.describe(jax.eval_shape(init, jax.random.key(0)))
        options = step_lib.Options(frozen=optim.frozen(optim_, described))
        optimizer = optim.make(optim_, plan, described)
        with mesh.scope():
            target = step_lib.abstract(init, optimizer, mesh.shardings, options)
            train_step = step_lib.make_train_step(
                loss_of(model), optimizer, config.seed, options, target, parameters.merge
            )
            measure = step_lib.make_eval_step(loss_of(model))
            held_out = mesh.put(dict(zip(('tokens', 'labels'), records('valid'), strict=True)))

            def scores(state, check):
                params = parameters.merge(state.params, state.frozen)
                _, sums = measure(params, held_out, jax.random.key(0))
                return {'eval/made/accuracy': float(sums['accuracy'] / sums['weight'])}

            evaluation = recipe_lib.Evaluation(['eval/made/accuracy'], scores)
            flops = 6.0 * sum(x.size for x in jax.tree.leaves(target.params))
            rates = lambda _, epochs: optim.rate_of(  # noqa: E731
                optim_, plan_lib.of_epochs(n_train, BATCH, epochs, N_CTX)
            )
            recipe = recipe_lib.Recipe(
                plan, target, options, evaluation, 'classifier', '', {}, flops, rates
            )
            loop.train(
                run,
                recipe,
                lambda: (step_lib.init(init, optimizer, config.seed, target, options), ''),
                lambda step: batches(plan, mesh, config.seed, step),
                train_step,
            )
