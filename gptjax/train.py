# SPDX-License-Identifier: Apache-2.0
"""Pretrains a language model on token shards; run again, it goes on where it stopped.

Laptop:
  python -m gptjax.train --config=experiments/quickstart.py --workdir=runs/quickstart
TPU VM, on every host of a v5e-16:
  python -m gptjax.train --config=experiments/gpt2/pretrain.py:size=small --workdir=gs://b/run \
      --config.mesh.fsdp=16 --config.mesh.data=1 --config.model.n_vocab=50304 \
      --config.batch.device_windows=8 --config.model.remat=full --distributed
"""

import dataclasses
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections

from gptjax.configs import base, cli, errors, fields, lookup, upgrade
from gptjax.data import inputs, loader, tokens
from gptjax.evals import during, perplexity, suite
from gptjax.models import heads, pretrained, sources, weights, workdirs
from gptjax.models.published import beside
from gptjax.runtime import checkpoint, hosts, inventory, program, progress, replicas
from gptjax.runtime import mesh as mesh_lib
from gptjax.storage import scratch
from gptjax.text import tokenizer as tokenizer_lib
from gptjax.training import branch as branch_lib
from gptjax.training import loop, losses, optim, parameters, section, stages
from gptjax.training import plan as plan_lib
from gptjax.training import recipe as recipe_lib
from gptjax.training import run as run_lib
from gptjax.training import step as step_lib

READS = (
    'seed',
    'init_from',
    'init_state',
    'data_dir',
    'tokenizer',
    'data',
    'model',
    'batch',
    'optim',
    'train',
    'evaluate',
    'suite',
    'checkpoint',
    'mesh',
)
_log = logging.getLogger('gptjax')


class Sections:
    """The sections of a config as their owners' dataclasses: every mistake is found here."""

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        self.model = heads.configure(config.model)
        errors.require(
            config.model.family != 'ngram',
            'an n-gram model is counted, not trained: python -m gptjax.count_ngrams',
        )
        _check_numerics(self.model)
        errors.require(
            config.init_state in ('weights', 'whole')
            and (bool(config.init_from) or config.init_state == 'weights'),
            f'init_state = {config.init_state!r} must be weights, or whole with init_from',
        )
        self.optim = optim.configure(config.optim)
        self.batch = fields.build(plan_lib.Config, config.batch, 'batch')
        self.train = fields.build(section.Config, config.train, 'train')
        self.data = loader.configure(config.data)
        self.evaluate = fields.build(perplexity.Config, config.evaluate, 'evaluate')
        self.suite = fields.build(suite.Config, config.suite, 'suite')
        self.checkpoint = fields.build(checkpoint.Config, config.checkpoint, 'checkpoint')
        self.mesh = fields.build(mesh_lib.Config, config.mesh, 'mesh')
        self.objective = lookup.plug_in('gptjax.training.objectives', self.train.objective)


def main(args: cli.Args) -> None:
    """Trains to the end of the config, then writes WORKDIR/results.json."""
    config, workdir, sections = args.config, pathlib.Path(args.workdir), Sections(args.config)
    with run_lib.Run(config, workdir, READS, sections.train, sections.checkpoint) as run:
        mesh = mesh_lib.Mesh(sections.mesh)
        with progress.Progress('open tokens', None, ' tokens checked') as bar:
            data = inputs.open_all(
                sections.data,
                scratch.within(workdir, config.tokenizer.dir),
                workdir,
                workdir / pretrained.TOKENIZER,
                hosts.is_first(),
                bar.advance,
            )
        inputs.check_vocabulary(sections.model.n_vocab, data.train)
        mesh.check_model(vocab=sections.model.n_vocab, embed=sections.model.d_model)
        with mesh.scope():
            _train(run, config, sections, mesh, data, workdir)


def _train(
    run: run_lib.Run,
    config: ml_collections.ConfigDict,
    sections: Sections,
    mesh: mesh_lib.Mesh,
    data: inputs.Inputs,
    workdir: pathlib.Path,
) -> None:
    """Trains from the newest checkpoint, or the beginning, to the end; again after a rollback."""
    model, n_ctx = heads.LanguageModel(sections.model), sections.model.n_ctx
    branch, parent = _branch(config, data, workdir)
    plan = _plan(sections, data, branch, sections.train.total_tokens, sections.train.total_epochs)
    _check_batches(sections, mesh, data, plan)
    described = heads.describe(model)
    options = _options(sections, described)
    trained = {path: about for path, about in described.items() if path not in options.frozen}
    optimizer = optim.make(sections.optim, plan, trained)
    target = step_lib.abstract(model.init_params, optimizer, mesh.shardings, options)
    _check_room(sections, mesh, data, plan, target)
    objective, asked = sections.objective
    loss = losses.with_sown(objective.make, model.apply, asked, sections.train.z_loss)
    train_step = stages.Stages(
        step_lib.make_train_step(loss, optimizer, config.seed, options, target, parameters.merge),
        plan.sizes(),
        mesh.scope,
    )
    tokenizer_dir = workdir / pretrained.TOKENIZER
    tasks = during.tasks(model, sections.suite, config.data_dir, tokenizer_dir, mesh.rows())
    evaluation = during.evaluation(
        model,
        data.held_out,
        sections.evaluate,
        sections.train.eval_max_tokens,
        sections.train.objective,
        tasks,
        mesh,
        average=options.ema_decay > 0,
    )
    _say_what_is_done(sections, mesh, data, plan)
    recipe = recipe_lib.Recipe(
        plan=plan,
        target=target,
        options=options,
        evaluation=evaluation,
        head='language_model',
        tokenizer=data.train[0].fingerprint,
        data=_identity(data, branch),
        flops_per_token=model.config.flops_per_token(step_lib.n_params(target)),
        rate_of=lambda *length: optim.rate_of(
            sections.optim, _plan(sections, data, branch, *length)
        ),
    )

    def fresh() -> tuple[step_lib.State, str]:
        """The state of the weights of init_from, or of the seed."""
        if not config.init_from:
            made = step_lib.init(model.init_params, optimizer, config.seed, target, options)
            return made, ''
        source = parent or sources.open(config.init_from)
        if branch:
            state = _whole(source, branch, sections.model, data.train[0], target, options)
        else:
            params = _initial(source, sections.model, data.train[0], mesh)
            state = step_lib.init_from(params, optimizer, target, options)
        if hosts.is_first():
            beside.keep(workdir / beside.FOLDER, source.beside)
        return state, source.provenance

    def batches(step: int) -> Iterator[loop.Batch]:
        """The batches from a step on."""
        windows = loader.batches(
            data.train,
            sections.data,
            n_ctx,
            config.seed,
            plan.examples,
            lambda windows: mesh.region(windows, n_ctx),
            step,
            plan.total_steps,
            loader.Order(**branch.order) if branch else None,
        )
        return map(mesh.put, windows)

    loop.train(run, recipe, fresh, batches, train_step)


def _plan(
    sections: Sections,
    data: inputs.Inputs,
    branch: branch_lib.Branch | None,
    total_tokens: int,
    total_epochs: float,
) -> plan_lib.Plan:
    """Which windows each step of a run so long reads."""
    epoch = sum(map(len, data.train))
    total = total_tokens or max(1, round(total_epochs * epoch))
    plan = plan_lib.of_tokens(sections.batch, sections.model.n_ctx, total, epoch)
    return branch.plan(plan) if branch else plan


def _identity(data: inputs.Inputs, branch: branch_lib.Branch | None) -> dict[str, Any]:
    """What must be the same of the data whenever the run goes on."""
    found = {'sets': [token_set.digest for token_set in data.train]}
    return found | ({branch_lib.NAME: dataclasses.asdict(branch)} if branch else {})


def _branch(
    config: ml_collections.ConfigDict, data: inputs.Inputs, workdir: pathlib.Path
) -> tuple[branch_lib.Branch | None, workdirs.Workdir | None]:
    """Where this run has branched off another, or is about to, and then that one's state."""
    if config.init_state != 'whole':
        return None, None
    if known := branch_lib.kept(workdir):
        return known, None
    source = sources.open(config.init_from)
    if not isinstance(source, workdirs.Workdir):
        raise errors.InputError(
            f'{config.init_from} holds weights alone; give --config.init_state=weights'
        )
    meta, digests = source.checkpoint[1], [token_set.digest for token_set in data.train]
    return branch_lib.off(source.run, meta, base.plain(config), digests), source


def _whole(
    source: workdirs.Workdir,
    branch: branch_lib.Branch,
    model: heads.Config,
    token_set: tokens.TokenSet,
    target: step_lib.State,
    options: step_lib.Options,
) -> step_lib.State:
    """The state of training at a checkpoint of another run, which must fit as _initial()'s."""
    folder, meta = source.checkpoint
    errors.require(
        meta['step'] == branch.step,
        f'this run goes on from step {branch.step}, and {source.path} is at step {meta["step"]}; '
        f'put that one back: {branch.origin[0]}',
    )
    other = heads.configure(upgrade.section('model', meta['config']['model']))
    _check_model(source.path, other, model)
    _check_tokenizer(source.path, meta['tokenizer'], token_set)
    errors.require(
        other.n_ctx == model.n_ctx,
        f'{errors.both("model.n_ctx", other.n_ctx, model.n_ctx)}: its windows were not of that '
        'length; give --config.init_state=weights',
    )
    wanted = step_lib.items(target)
    items = checkpoint.restore(folder, meta, may_lack={'rest': step_lib.LATER}, **wanted)
    _log.info('goes on from step %d of %s', meta['step'], source.path)
    return step_lib.from_items(items, options, target)


def _check_batches(
    sections: Sections, mesh: mesh_lib.Mesh, data: inputs.Inputs, plan: plan_lib.Plan
) -> None:
    """Raises UsageError where a batch does not divide over the mesh."""
    n_ctx = sections.model.n_ctx
    for windows in plan.sizes():
        mesh.check_batch(windows, n_ctx)
        pieces = replicas.count() * windows // _at_once(sections, mesh, windows)
        errors.require(
            pieces > 1 or not sections.train.noise_scale,
            f'train.noise_scale compares microbatches, and a batch of {windows} windows is one; '
            f'set --config.batch.device_windows={max(1, windows // 2)} or lower',
        )
    scored_ctx = sections.evaluate.n_ctx or n_ctx
    mesh.check_batch(sections.evaluate.batch_windows, scored_ctx, field='evaluate.batch_windows')
    for token_set in data.held_out.values():
        perplexity.check(token_set, scored_ctx, sections.evaluate)


def _check_room(
    sections: Sections, mesh: mesh_lib.Mesh, data: inputs.Inputs, plan: plan_lib.Plan, target: Any
) -> None:
    """Raises UsageError where a run cannot fit the memory, by what it holds at least."""
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(target))
    inventory.check_room(
        state, 'parameters and optimizer', 'Lower the sizes of --config.model, or add devices'
    )
    windows, n_ctx = max(plan.sizes()), sections.model.n_ctx
    at_once = max(_at_once(sections, mesh, size) for size in plan.sizes())
    held = loader.steps_held(data.train, sections.data)
    read = windows * n_ctx * 12 * held  # inputs, targets, weights
    inventory.check_room(
        read + at_once * n_ctx * sections.model.d_model * 2,
        f'a batch of {windows * n_ctx} tokens',
        'Lower --config.batch.batch_tokens, or set device_windows, or lower it',
    )


def _check_numerics(model: heads.Config) -> None:
    """Raises UsageError where training would stand still, or not be finite."""
    errors.require(
        model.param_dtype == 'float32',
        f'model.param_dtype = {model.param_dtype!r}: weights of 8 or 11 bits lose what updates add '
        "to them. Train with param_dtype='float32'; compute_dtype='bfloat16' is what is fast",
    )
    errors.require(
        model.compute_dtype != 'float16',
        "model.compute_dtype = 'float16': gradients would underflow without a scale of the loss, "
        "which there is not; use 'bfloat16'",
    )


def _say_what_is_done(
    sections: Sections, mesh: mesh_lib.Mesh, data: inputs.Inputs, plan: plan_lib.Plan
) -> None:
    """Says what becomes of batches, which kernels train, and what evaluations cost at last."""
    model = sections.model
    wanted = sections.batch.device_windows
    for windows in plan.sizes():
        at_once = _at_once(sections, mesh, windows)
        if at_once < windows:
            _log.info('batches of %d windows: %d microbatches', windows, windows // at_once)
        each, held = at_once // mesh.rows(), windows // mesh.rows()
        if 2 * each < min(wanted, held):
            _log.warning(
                'a device takes %d of its %d windows at once, as that divides them; a batch of a '
                'multiple of %d windows would let it take batch.device_windows = %d',
                *(each, held, mesh.rows() * wanted, wanted),
            )
    most = max(_at_once(sections, mesh, windows) for windows in plan.sizes())
    for part, kernel in model.kernels(most).items():
        _log.info('attention %s: %s, in %s', part, kernel, model.compute_dtype)
    steps = sections.train.eval_every_steps or plan.total_steps
    between = min(steps, plan.total_steps) * max(plan.sizes()) * plan.tokens_per_example
    config = during.within(sections.evaluate, sections.train.eval_max_tokens)
    if data.held_out:
        models = 2 if sections.optim.ema_decay else 1
        _log.info('%s', during.cost(data.held_out, config, between, models))


def _at_once(sections: Sections, mesh: mesh_lib.Mesh, windows: int) -> int:
    """The windows of a microbatch, over all devices."""
    return mesh.rows() * replicas.most(windows // mesh.rows(), sections.batch.device_windows)


def _options(sections: Sections, described: parameters.Described) -> step_lib.Options:
    return step_lib.Options(
        device_windows=sections.batch.device_windows,
        reduce_dtype=sections.optim.reduce_dtype,
        ema_decay=sections.optim.ema_decay,
        spike_sigmas=sections.train.spike_sigmas,
        skip_spikes=sections.train.on_spike == 'skip',
        norms_of=described if sections.train.layer_norms else None,
        offload=sections.optim.offload,
        shard_moments=sections.optim.shard_moments,
        frozen=optim.frozen(sections.optim, described),
        deterministic=sections.train.deterministic,
        dropout_bits=sections.train.dropout_bits,
        measure_noise=sections.train.noise_scale,
    )


def _initial(
    source: weights.Source, model: heads.Config, token_set: tokens.TokenSet, mesh: mesh_lib.Mesh
) -> Any:
    """The parameters of init_from, which must fit the model and the tokens."""
    with progress.Progress('read', None, ' parameters') as bar:
        found = pretrained.load(source, model.param_dtype, mesh.shardings, bar.advance)
    _check_model(source.path, found.model.config, model)
    if found.tokenizer:
        _check_tokenizer(source.path, tokenizer_lib.fingerprint(found.tokenizer), token_set)
    return found.params


def _check_model(path: pathlib.Path, there: heads.Config, here: heads.Config) -> None:
    """Raises InputError where the weights at a path are of another model."""
    differing = heads.differing(here, there)
    if differing:
        said = ', '.join(
            errors.both(f, getattr(there, f, None), getattr(here, f, None)) for f in differing
        )
        raise errors.InputError(
            f'{path} holds another model ({said}); set --config.model.<field> to what is there'
        )


def _check_tokenizer(path: pathlib.Path, fingerprint: str, token_set: tokens.TokenSet) -> None:
    """Raises InputError where the tokens were made by another tokenizer than that at a path."""
    if fingerprint != token_set.fingerprint:
        raise errors.InputError(
            f'the tokens in {token_set.folder} were made with another tokenizer than that of '
            f'{path}; prepare them with the latter: --config.tokenizer.kind=file '
            '--config.tokenizer.path=<its folder> (of a .gguf file: convert it first)'
        )


if __name__ == '__main__':
    program.run(main, __doc__, READS)
