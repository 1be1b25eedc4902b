# SPDX-License-Identifier: Apache-2.0
"""Tokens/s of generation, ours beside transformers and llama.cpp, alternating in one run.

  python benchmarks/generate_speed.py --rounds=5
  python benchmarks/generate_speed.py --cases batch1 batch8 --llama=<python with llama-cpp-python>

GPT-2 small's shape with random weights, prompts of 64 tokens, 128 new ones, greedy. Every contender
is a process of its own and waits while another one is timed. Printed are medians and ranges, the
ratio to each peer, the time to the first token, the programs compiled in all, and the share of what
reading the weights once a token at the memory's measured speed would allow.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

_PROMPT, _NEW, _VOCAB = 64, 128, 50257
_SHAPE = {'n_embd': 768, 'n_layer': 12, 'n_head': 12, 'n_positions': 1024, 'vocab_size': _VOCAB}
# rows or requests, beams, weights, cache, dtype, through the engine
_CASES = {
    'batch1': (1, 1, '', '', 'float32', False),
    'batch8': (8, 1, '', '', 'float32', False),
    'beams5': (1, 5, '', '', 'float32', False),
    'batch1-int8': (1, 1, 'int8', '', 'float32', False),
    'batch8-int8': (8, 1, 'int8', '', 'float32', False),
    'batch1-int4': (1, 1, 'int4', '', 'float32', False),
    'batch1-bf16': (1, 1, '', '', 'bfloat16', False),
    'batch1-int8cache': (1, 1, '', 'int8', 'float32', False),
    'one-by-one16': (16, 1, '', '', 'float32', False),
    'engine16': (16, 1, '', '', 'float32', True),
}
_PEERS = {
    'batch1': ('transformers', 'llama'),
    'batch8': ('transformers', 'llama'),
    'beams5': ('transformers',),
}


def prompts(case: str, round_: int) -> list[list[int]]:
    """New ones every time; of different lengths where requests are ragged."""
    random = np.random.default_rng(round_)
    count = _CASES[case][0]
    lengths = [_PROMPT] * count
    if '16' in case:
        lengths = np.random.default_rng(0).integers(16, 96, count).tolist()
    return [random.integers(1, _VOCAB, n).tolist() for n in lengths]


def ours(case: str, folder: str):
    """(a function from prompts and a number of new tokens to how many came, programs compiled)."""
    from gptjax.configs import base
    from gptjax.runtime import program
    from gptjax.sampling import batch, beam, decode, engine, options
    from gptjax.sampling import loaded as loaded_lib

    program.keep_memory()
    _, beams, weights, cache, dtype, served = _CASES[case]
    loaded = loaded_lib.load(folder, dtype, weights, cache)
    greedy = {'eos_token_id': (-1,), 'do_sample': False}
    defaults = base.get_config().decode.to_dict() | greedy
    config = base.get_config().engine.to_dict() | {'slots': 16, 'max_tokens': 256}
    server = engine.Engine(loaded.decoder, loaded.params, engine.Config(**config)) if served else 0

    def run(asked_prompts: list[list[int]], new: int) -> int:
        asked = options.make(defaults, {'max_new_tokens': new, 'num_beams': beams})
        if served:
            requests = [server.submit(prompt, asked) for prompt in asked_prompts]
            server.run()
            return sum(len(request.result().tokens) for request in requests)
        if beams > 1:
            found = beam.search(loaded.decoder, loaded.params, asked_prompts, [asked])
            return len(found[0][0].tokens)
        if case == 'one-by-one16':
            return sum(
                len(batch.generate(loaded.decoder, loaded.params, [prompt], [asked])[0].tokens)
                for prompt in asked_prompts
            )
        found = batch.generate(
            loaded.decoder, loaded.params, asked_prompts, [asked] * len(asked_prompts)
        )
        return sum(len(text.tokens) for text in found)

    def compiled() -> int:
        programs = (decode.prefill, decode.steps, beam._search, engine._read_slot)
        return sum(program._cache_size() for program in programs)

    return run, compiled


def transformers(case: str, folder: str):
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    beams = _CASES[case][1]

    def run(asked_prompts: list[list[int]], new: int) -> int:
        tokens = torch.tensor(asked_prompts)
        with torch.inference_mode():
            found = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                num_beams=beams,
                pad_token_id=0,
            )
        return (found.shape[1] - tokens.shape[1]) * len(tokens)

    return run, lambda: 0


def llama(case: str, folder: str):
    """llama.cpp through its batch interface; greedy, the most likely token found by numpy."""

    import llama_cpp as lc

    rows = _CASES[case][0]
    lc.llama_backend_init()
    model = lc.llama_model_load_from_file(
        f'{folder}/model.gguf'.encode(), lc.llama_model_default_params()
    )
    params = lc.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 256 * rows, 2, 2
    params.n_seq_max, params.n_batch = rows, 2048
    context = lc.llama_init_from_model(model, params)
    batch = lc.llama_batch_init(2048, 0, rows)

    def fill(tokens: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(tokens)
        for i, (token, place, row, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, place, 1
            batch.seq_id[i][0], batch.logits[i] = row, wanted
        if lc.llama_decode(context, batch):
            raise RuntimeError('llama_decode failed')

    def best(index: int) -> int:
        logits = lc.llama_get_logits_ith(context, index)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(_VOCAB,))))

    def run(asked_prompts: list[list[int]], new: int) -> int:
        lc.llama_memory_clear(lc.llama_get_memory(context), True)
        length = len(asked_prompts[0])
        fill(
            [
                (t, p, b, p == length - 1)
                for b, one in enumerate(asked_prompts)
                for p, t in enumerate(one)
            ]
        )
        last = [best((b + 1) * length - 1) for b in range(rows)]
        for step in range(new - 1):
            fill([(token, length + step, b, True) for b, token in enumerate(last)])
            last = [best(b) for b in range(rows)]
        return new * rows

    return run, lambda: 0


def write_weights(folder: str) -> None:
    """Random weights as transformers and llama.cpp read them."""
    import gguf
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**_SHAPE))
    model.save_pretrained(folder)
    writer = gguf.GGUFWriter(f'{folder}/model.gguf', 'gpt2')
    writer.add_context_length(1024)
    writer.add_embedding_length(768)
    writer.add_feed_forward_length(3072)
    writer.add_block_count(12)
    writer.add_head_count(12)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model('gpt2')
    writer.add_token_list([f't{i}' for i in range(_VOCAB)])
    writer.add_token_merges(['t 0'])
    names = {
        'wte.weight': 'token_embd.weight',
        'wpe.weight': 'position_embd.weight',
        'ln_f': 'output_norm',
    }
    parts = {
        'ln_1': 'attn_norm',
        'attn.c_attn': 'attn_qkv',
        'attn.c_proj': 'attn_output',
        'ln_2': 'ffn_norm',
        'mlp.c_fc': 'ffn_up',
        'mlp.c_proj': 'ffn_down',
    }
    for name, tensor in model.state_dict().items():
        if name == 'lm_head.weight':
            continue
        name = name.removeprefix('transformer.')
        if name.startswith('h.'):
            _, number, rest = name.split('.', 2)
            part, kind = rest.rsplit('.', 1)
            tensor = tensor.T if part[:4] in ('attn', 'mlp.') and kind == 'weight' else tensor
            name = f'blk.{number}.{parts[part]}.{kind}'
        else:
            for theirs, our in names.items():
                name = name.replace(theirs, our)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def work(side: str, case: str, folder: str) -> None:
    """A contender: a line 'round new' on stdin is timed and answered by a line of JSON."""
    run, compiled = {'gptjax': ours, 'transformers': transformers, 'llama': llama}[side](
        case, folder
    )
    run(prompts(case, 10**6), _NEW)
    run(prompts(case, 10**6), 1)
    for line in sys.stdin:
        round_, new = map(int, line.split())
        asked = prompts(case, round_)
        began = time.perf_counter()
        count = run(asked, new)
        secs = time.perf_counter() - began
        print('!' + json.dumps([secs, count, compiled()]), flush=True)


class Contender:
    """A process that waits for its turn."""

    def __init__(self, python: str, side: str, case: str, folder: str) -> None:
        command = [python, __file__, '--worker', side, case, folder]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.run(0, 1)

    def run(self, round_: int, new: int) -> list[float]:
        """(seconds, tokens, programs compiled so far)."""
        self._process.stdin.write(f'{round_} {new}\n')
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith('!'):
                return json.loads(line[1:])
        raise RuntimeError('a contender died')

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def bandwidth() -> float:
    """Bytes a second at which XLA reads weights here: products of vectors with 24 matrices."""
    import jax
    import jax.numpy as jnp

    weights = [jnp.ones((768, 3072)) for _ in range(24)]
    read = jax.jit(lambda x, weights: [(x + i) @ w for i, w in enumerate(weights)])
    x = jnp.ones((1, 768))
    jax.block_until_ready(read(x, weights))
    secs = []
    for _ in range(15):
        began = time.perf_counter()
        jax.block_until_ready(read(x, weights))
        secs.append(time.perf_counter() - began)
    return sum(w.nbytes for w in weights) / statistics.median(secs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cases', nargs='+', choices=_CASES, default=list(_CASES))
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--llama', default='', help='python that has llama-cpp-python')
    parser.add_argument('--worker', nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*args.worker)
        return
    print(f'{_PROMPT} + {_NEW} tokens; medians of {args.rounds} rounds, in turns', flush=True)
    speeds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_weights(folder)
        for case in args.cases:
            sides = {'gptjax': sys.executable}
            for peer in _PEERS.get(case, ()):
                if peer == 'transformers' or args.llama:
                    sides[peer] = args.llama if peer == 'llama' else sys.executable
            contenders = {s: Contender(python, s, case, folder) for s, python in sides.items()}
            found: dict[str, list[float]] = {side: [] for side in sides}
            first: dict[str, list[float]] = {side: [] for side in sides}
            programs, rates = 0, []
            for round_ in range(1, args.rounds + 1):
                for side, contender in contenders.items():
                    first[side].append(contender.run(round_, 1)[0])
                    secs, count, compiled = contender.run(round_, _NEW)
                    found[side].append(count / secs)
                    programs = max(programs, compiled)
                rates.append(bandwidth())
            for contender in contenders.values():
                contender.close()
            medians = {side: statistics.median(x) for side, x in found.items()}
            speeds[case] = medians['gptjax']
            for side, x in found.items():
                print(
                    f'{case:17}{side:13}{medians[side]:7.1f} tokens/s ({min(x):.1f}-{max(x):.1f})'
                    f', first {statistics.median(first[side]) * 1e3:.0f} ms',
                    flush=True,
                )
            ratios = [f'{medians["gptjax"] / medians[s]:.2f} of {s}' for s in list(sides)[1:]]
            rate = statistics.median(rates)
            if case == 'batch1':
                bound = rate / (124.4e6 * 4)
                share = medians['gptjax'] / bound
                ratios.append(f'{share:.2f} of {bound:.1f} at {rate / 1e9:.1f} GB/s')
            print(f'{"":17}{", ".join([*ratios, f"{programs} programs"])}', flush=True)
    if {'one-by-one16', 'engine16'} <= speeds.keys():
        print(f'engine / one by one: {speeds["engine16"] / speeds["one-by-one16"]:.2f}')
    for case in speeds:
        if case.startswith('batch1-') and 'batch1' in speeds:
            print(f'{case} / batch1: {speeds[case] / speeds["batch1"]:.2f}')


if __name__ == '__main__':
    main()
