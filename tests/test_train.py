"""
train.py end to end: what resumes, accumulates, runs in parallel or is compiled equals what does not; what cannot work
says so in one line and leaves everything as it was.
"""
import contextlib
import faulthandler
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from conftest import (LLAMA, TINY, build, content, largest_difference, log, make_dataset, ran, refused,
                      result_of, run, start, tensors, toy_text, train)
import torch

import data.compiling
import data.loader
import data.machine
import data.optimizers
from data.checkpoint import load_checkpoint, load_model, save_checkpoint
from data.compiling import DEEP
from data.loader import load_meta
from data.machine import fast_bf16
from data.record import made
from data.rounding import prepare
from data.tokenizer import from_meta, train_bpe
from data.writer import write_chats
from engine import Engine, Sampling
from model import GPT, GPTConfig

# the block of a Llama
SWITCHES = ['--mlp=swiglu', '--qk_norm=False', '--embed_norm=False', '--softcap=0', '--norm_eps=1e-5',
            '--rope_base=500']

# ----- two processes

def poisoned(at):
    """A GPT.forward whose losses are NaN in call number at."""
    forward, calls = GPT.forward, []

    def nan_once(self, *batch, **how):
        calls.append(batch)
        return {k: v * (math.nan if len(calls) == at else 1.0) for k, v in forward(self, *batch, **how).items()}
    return nan_once


def one_of_two(rank, port, stop_in, nan_at, args, answer):
    os.environ |= {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2',
                   'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    faulthandler.enable()                                                 # a crash says where
    data.optimizers.fast_bf16 = lambda device: False                      # Muon's bfloat16 would hide mistakes
    GPT.forward = poisoned(nan_at if rank == 1 else None)
    batch = data.loader.Loader.batch

    def batch_and_signal(self, step, *rest):
        if step == stop_in and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step, *rest)
    data.loader.Loader.batch = batch_and_signal
    got = run('train.py', *args)
    answer.send((got.status, got.out, got.err))


def answer_of(child, answer):
    try:
        assert answer.poll(300), 'the processes wait for each other'
        status, out, err = answer.recv()
    except EOFError:
        status, out, err = None, '', 'it died'
    child.join()
    return SimpleNamespace(status=child.exitcode if status is None else status, out=out, err=err)


def two(*args, stop_in=None, nan_at=None):
    """Of two processes the second gets SIGTERM in step stop_in, NaN in forward nan_at -> what each of them said."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['torch._dynamo', 'torch.distributed.fsdp', 'distill', 'engine', 'conftest'])
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    children, answers = [], []
    for rank in (0, 1):
        reader, writer = context.Pipe(duplex=False)
        child = context.Process(target=one_of_two, daemon=True,
                                args=(rank, port, stop_in, nan_at, [*TINY, *map(str, args)], writer))
        child.start()
        writer.close()  # only the child has it now: when that ends, the reader is told
        children.append(child)
        answers.append(reader)
    return [answer_of(child, answer) for child, answer in zip(children, answers)]


# ----- equalities

def test_wandb(toy, tmp_path, monkeypatch):
    begun, told = [], []
    wandb = SimpleNamespace(init=lambda **how: begun.append(how),
                            log=lambda row, step: told.append({**row, 'step': step}), finish=lambda: None)
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    train(tmp_path / 'run', toy, '--wandb_log=True')
    assert [how['name'] for how in begun] == ['run'] and begun[0]['config']['n_layer'] == 2
    assert [{k: str(v) for k, v in row.items()} for row in told] == [
        {k: v for k, v in row.items() if v} for row in log(tmp_path / 'run')]


@pytest.mark.parametrize('args', [
    ['--total_batch_size=128', '--warmup_iters=3', '--tie_weights=True', *SWITCHES],
    ['--ema=0.9', '--sample_interval=3', '--sample_tokens=4'],
    ['--dropout=0.3', '--total_batch_size=128', '--quant_bits=8', '--qat_start=0.5', '--multi_token_n=2',
     '--draft_n=2']], ids=' '.join)
def test_resumed_equals_uninterrupted(toy, tmp_path, interrupt, args):
    """To the bit, stopped before, at, and after the step where the rounding begins (4)."""
    whole = train(tmp_path / 'whole', toy, *args)
    for i, (at, signum) in enumerate([(3, signal.SIGTERM), (4, signal.SIGINT), (7, signal.SIGTERM)]):
        interrupt(at - 1, signum)
        stopped = train(tmp_path / 'parts', toy, *args, '--init_from=resume' if i else '--init_from=scratch')
        assert stopped['iters'] == at == load_checkpoint(f'{tmp_path}/parts/ckpt.pt')['step']
    interrupt(None, None)
    with open(tmp_path / 'parts' / 'log.csv', 'ab') as f:
        f.write(b'\xff\n8,512,9.9,9.9,,,0.1,1\n5,3')  # as if a step had been logged and then the power was cut
    resumed = train(tmp_path / 'parts', toy, *args, '--init_from=resume')
    same = ('iters', 'tokens', 'params', 'val_loss', 'val_bpb', 'best_val_loss', 'best_step')
    assert {k: whole[k] for k in same} == {k: resumed[k] for k in same}
    for name in ('ckpt.pt', 'best.pt'):
        a, b = (load_checkpoint(f'{tmp_path}/{run}/{name}') for run in ('whole', 'parts'))
        assert largest_difference(a, b) == 0 and a['step'] == b['step'] and a['best'] == b['best']
    for name in ('step', 'train_loss', 'val_loss', 'lr_factor'):
        assert [row[name] for row in log(tmp_path / 'whole')] == [row[name] for row in log(tmp_path / 'parts')]
    assert [int(row['step']) for row in log(tmp_path / 'parts')] == list(range(1, 9))
    again = train(tmp_path / 'parts', toy, *args, '--init_from=resume')  # nothing left to do
    assert {k: again[k] for k in same} == {k: whole[k] for k in same} and again['seconds'] == resumed['seconds']


def test_in_a_ladder_the_same_command_goes_on(toy, tmp_path, interrupt, monkeypatch):
    """Stopped at step 5 it is as if it had not been; another command, or a file that changed, starts again."""
    source = train(tmp_path / 'start', toy)
    args = [toy, f"--init_from={tmp_path}/start/best.pt", '--save_interval=4']
    whole = train(tmp_path / 'whole', *args)
    monkeypatch.setenv('PICOCHAT_LADDER', 'ladder.json')
    rung = lambda: result_of(run('train.py', *TINY, f'--out_dir={tmp_path}/rung', *args, *other))
    for case in ('the same', 'another', 'newer'):
        other = []
        interrupt(4, signal.SIGTERM)
        assert rung()['iters'] == 5
        saved = os.path.getmtime(tmp_path / 'rung' / 'ckpt.pt')
        interrupt(3, signal.SIGTERM)  # a run that goes on does not come by step 3 again
        if case == 'another':
            other = ['--seed=1']
        if case == 'newer':
            os.utime(tmp_path / 'start' / 'best.pt', (saved + 9, saved + 9))
        done = rung()
        assert done['iters'] == (8 if case == 'the same' else 4)
        if case == 'the same':
            assert (done['val_loss'], done['best_step']) == (whole['val_loss'], whole['best_step'])
            cost = made(f'{tmp_path}/rung/best.pt')['cost']
            assert cost['train_tokens'] == source['tokens'] + whole['tokens']
            assert rung() == done  # which says that it is there
        shutil.rmtree(tmp_path / 'rung')


def test_a_resumed_run_keeps_the_dtype_that_was_faster(toy, tmp_path, monkeypatch):
    """Measured again, a busy machine might find otherwise, and the run would not be what it was."""
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: True)
    for args, found in ((['--max_iters=1'], True), (['--max_iters=2', '--init_from=resume'], False)):
        monkeypatch.setattr(data.machine, 'MEASURED', {})
        monkeypatch.setattr(data.machine, 'measure_bf16', lambda: found)
        train(tmp_path, toy, *args)
        assert data.machine.MEASURED == {'cpu': True}


def test_the_switches_of_the_block_reach_the_model(toy, tmp_path):
    train(tmp_path, toy, *SWITCHES)
    c = load_model(f'{tmp_path}/best.pt')[0].config
    switches = c.mlp, c.qk_norm, c.embed_norm, c.softcap, c.norm_eps, c.rope_base, c.n_hidden
    assert switches == ('swiglu', False, False, 0, 1e-5, 500, 42)


def test_best_is_of_the_weights_that_will_run(toy, tmp_path):
    still = [toy, '--muon_lr=0', '--adam_lr=0']
    assert train(tmp_path / 'a', *still)['best_step'] == 2
    assert train(tmp_path / 'b', *still, '--quant_bits=8', '--qat_start=0.5')['best_step'] == 6


def test_a_run_does_not_replace_what_it_learns_from(toy, tmp_path):
    train(tmp_path / 'run', toy, '--max_iters=2')
    before = content(tmp_path)
    for args in (f'--init_from={tmp_path}/run/best.pt', f'--init_from={tmp_path}/run/ckpt.pt',
                 f'--teacher={tmp_path}/run', f'--teacher={tmp_path}/run/../run/best.pt'):
        refused(run('train.py', *TINY, toy, args, f'--out_dir={tmp_path}/run'),
                'would replace .*run/(best|ckpt).pt, which this run learns from: give another --out_dir')
    assert content(tmp_path) == before
    (tmp_path / 'run' / 'ckpt.pt').unlink()
    again = run('train.py', *TINY, toy, '--max_iters=2', f'--out_dir={tmp_path}/run')
    assert 'run/best.pt will be replaced' in again.out and 'resume' not in again.out


def test_a_run_goes_on_with_its_tokens_a_step_its_text_and_the_rates_that_are_given(toy, tmp_path):
    train(tmp_path, toy, '--total_batch_size=128', '--max_iters=2')
    before = load_checkpoint(f'{tmp_path}/ckpt.pt')
    again = train(tmp_path, toy, '--max_iters=4', '--init_from=resume', '--muon_lr=0', '--adam_lr=0')
    after = load_checkpoint(f'{tmp_path}/ckpt.pt')
    assert again['tokens'] == 4 * 128 and largest_difference(before['model'], after['model']) == 0
    torch.save(after | {'data': 'of another text'}, tmp_path / 'ckpt.pt')
    refused(run('train.py', *TINY, toy, '--init_from=resume', f'--out_dir={tmp_path}'), 'prepared anew since .*ckpt.pt')


def test_the_loss_before_fine_tuning(toy, tmp_path):
    first = train(tmp_path / 'a', toy)
    source = f'--init_from={tmp_path}/a/best.pt'
    tuned = train(tmp_path / 'b', toy, source, '--max_iters=2')
    assert tuned['val_loss_before'] == first['best_val_loss'] != tuned['val_loss'] and first['val_loss_before'] is None
    assert (train(tmp_path / 'b', toy, '--init_from=resume', '--max_iters=4')['val_loss_before']
            == first['best_val_loss'])
    assert train(tmp_path / 'c', toy, source, '--max_iters=1', '--eval_interval=0')['val_loss_before'] is None
    rounded = train(tmp_path / 'd', toy, source, '--quant_bits=8', '--muon_lr=0', '--adam_lr=0')
    assert rounded['val_loss_before'] == rounded['val_loss'] != first['best_val_loss']


@pytest.fixture(scope='module')
def chats(tmp_path_factory):
    tokenizer = train_bpe([toy_text()], 280)
    chats = [tokenizer.render_chat([{'role': 'user', 'content': 'the' * n}, {'role': 'assistant', 'content': 'cat' * m}])
             for n, m in ((1, 6), (5, 1), (2, 3), (4, 2))] * 8
    folder = tmp_path_factory.mktemp('chats')
    with contextlib.redirect_stdout(io.StringIO()):
        write_chats(str(folder), tokenizer, chats, chats[:6], 32, 'toy')
    return [f'--dataset={folder}', '--block_size=32', '--total_batch_size=256', '--max_iters=20']


@pytest.mark.parametrize('more', [['--multi_token_n=2', '--draft_n=2'], ['--teacher={}/t']], ids=['heads', 'teacher'])
def test_uneven_masks_are_accumulated_exactly(chats, tmp_path, monkeypatch, more):
    monkeypatch.setattr('data.optimizers.fast_bf16', lambda device: False)
    train(tmp_path / 't', *chats, '--max_iters=120', '--adam_lr=0.02')
    args = [*chats, *(arg.replace('{}', str(tmp_path)) for arg in more)]
    losses = {}
    for batch_size in (8, 4, 2):
        losses[batch_size] = train(tmp_path / str(batch_size), *args, f'--batch_size={batch_size}')['val_loss']
    first, _ = two(*args, '--batch_size=2', f'--out_dir={tmp_path}/two')
    losses['two'] = result_of(first)['val_loss']
    assert max(losses.values()) - min(losses.values()) < 2e-5, losses
    at = {name: load_checkpoint(f'{tmp_path}/{name}/ckpt.pt')['model'] for name in losses}
    assert max(largest_difference(at[8], at[name]) for name in at) < 1e-3


def test_two_processes_equal_one(toy, tmp_path, interrupt):
    args = [toy, *SWITCHES, '--tie_weights=True', '--max_iters=100', '--total_batch_size=128', '--eval_interval=1']
    line = ' '.join([f'echo $BASHPID > {tmp_path}/pid$RANK; exec {sys.executable} train.py', *TINY, *args,
                     f'--out_dir={tmp_path}/rank$RANK'])
    p = start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--no-python', 'bash', '-c', line)
    timer = threading.Timer(300, p.terminate)  # processes that disagree wait for each other
    timer.start()
    out = []
    for text in p.stdout:
        out.append(text)
        if text.startswith('step 2/'):
            os.kill(int(open(f'{tmp_path}/pid1').read()), signal.SIGTERM)
    timer.cancel()
    assert p.wait() == 0, p.stderr.read()
    assert sum(text.startswith('{') for text in out) == sum(text.startswith('model:') for text in out) == 1
    assert not os.path.exists(tmp_path / 'rank1')
    two = json.loads(out[-1])
    assert 2 <= two['iters'] < 100
    interrupt(two['iters'] - 1, signal.SIGTERM)
    one = train(tmp_path / 'one', *args)
    loose = 100 if fast_bf16('cpu') else 1
    assert (one['iters'] == two['iters'] and one['tokens'] == two['tokens']
            and abs(one['val_loss'] - two['val_loss']) < 1e-5 * loose)
    a, b = (load_checkpoint(f'{tmp_path}/{name}/ckpt.pt') for name in ('one', 'rank0'))
    assert largest_difference(a['model'], b['model']) < 1e-4 * loose
    assert [row['step'] for row in log(tmp_path / 'one')] == [row['step'] for row in log(tmp_path / 'rank0')]
    interrupt(two['iters'] + 1, signal.SIGTERM)  # and goes on in one process
    a, b = (train(tmp_path / name, *args, '--init_from=resume') for name in ('one', 'rank0'))
    assert a['iters'] == b['iters'] == two['iters'] + 2 and abs(a['val_loss'] - b['val_loss']) < 1e-5 * loose


@pytest.mark.parametrize('args', [
    ['--dropout=0', '--tie_weights=True', '--n_kv_head=1', '--multi_token_n=1', '--draft_n=2', '--grad_clip=0.1',
     '--weight_decay=0.1', '--ema=0.9', '--teacher={}/t'],
    ['--quant_bits=8', '--qat_start=0.5', '--sample_interval=3', '--sample_tokens=4'],
    ['--init_from={}/t/best.pt', '--train_only=draft', '--draft_n=2', '--own_samples=0.5'],
    # a tied model with a last gain, as SmolLM2, goes on learning from the text and from itself as it was
    ['--init_from={}/smol/best.pt', '--teacher={}/smol', '--adam_lr=0.01']], ids=lambda args: args[0])
def test_shards_equal_one_process(toy, tmp_path, monkeypatch, interrupt, args):
    monkeypatch.setattr('data.optimizers.fast_bf16', lambda device: False)
    train(tmp_path / 't', toy, '--max_iters=30')
    tokenizer = from_meta(load_meta(toy.removeprefix('--dataset=')))
    save_checkpoint(f'{tmp_path}/smol.pt', build(tokenizer, 2, 16, **LLAMA), tokenizer.meta(), step=0, dataset='gone')
    train(tmp_path / 'smol', toy, f'--init_from={tmp_path}/smol.pt', '--max_iters=30')
    args = [toy, '--total_batch_size=256', *(arg.replace('{}', str(tmp_path)) for arg in args)]
    whole = train(tmp_path / 'one', *args)
    if '--train_only=draft' in args:
        # each process writes rows of its own, so only the shards are tested: two processes with and two without them
        two(*args, f'--out_dir={tmp_path}/two')
        pair = two(*args, '--fsdp=True', f'--out_dir={tmp_path}/parts')
    else:
        shutil.copytree(tmp_path / 'one', tmp_path / 'two')
        first = two(*args, '--fsdp=True', '--save_interval=1', f'--out_dir={tmp_path}/parts', stop_in=2)
        assert ([p.status for p in first] == [0, 0]
                and load_checkpoint(f'{tmp_path}/parts/ckpt.pt')['step'] == 3), first[0].err + first[1].err
        interrupt(4, signal.SIGTERM)
        train(tmp_path / 'parts', *args, '--init_from=resume')  # whole again for two steps
        pair = two(*args, '--fsdp=True', '--init_from=resume', f'--out_dir={tmp_path}/parts')
    assert [p.status for p in pair] == [0, 0] and not pair[1].out, pair[0].err + pair[1].err
    sharded = result_of(pair[0])
    for name in ('ckpt.pt', 'best.pt'):
        a, b = (load_checkpoint(f'{tmp_path}/{run}/{name}') for run in ('two', 'parts'))
        assert largest_difference(a, b) < 1e-4 and a['step'] == b['step']
    assert abs(sharded['best_val_loss'] - a['best']['loss']) < 1e-5 and sharded['params'] == whole['params']
    for a, b in zip(log(tmp_path / 'two'), log(tmp_path / 'parts'), strict=True):
        assert abs(float(a['val_loss'] or 0) - float(b['val_loss'] or 0)) < 1e-5 and a['step'] == b['step']


def test_a_process_that_dies_ends_the_job(toy, tmp_path, interrupt):
    """
    Of two that share a model one is killed: the job fails, what it had saved is whole, and one process goes on
    from it.
    """
    args = [toy, '--max_iters=1000', '--total_batch_size=128', '--eval_interval=0']
    line = ' '.join([f'echo $BASHPID > {tmp_path}/pid$RANK; exec {sys.executable} train.py', *TINY, *args,
                     '--fsdp=True', '--save_interval=1', f'--out_dir={tmp_path}/run'])
    p = start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--no-python', 'bash', '-c', line)
    timer = threading.Timer(300, p.terminate)
    timer.start()
    for text in p.stdout:
        if text.startswith('step 3/'):
            os.kill(int(open(f'{tmp_path}/pid1').read()), signal.SIGKILL)
            break
    p.communicate()
    timer.cancel()
    assert p.returncode not in (0, -signal.SIGTERM)
    step = load_checkpoint(f'{tmp_path}/run/ckpt.pt')['step']
    assert step >= 2
    interrupt(step + 1, signal.SIGTERM)
    train(tmp_path / 'run', *args, '--init_from=resume')
    train(tmp_path / 'one', *args)
    a, b = (load_checkpoint(f'{tmp_path}/{name}/ckpt.pt') for name in ('run', 'one'))
    assert (a['step'] == b['step'] == step + 2
            and largest_difference(a['model'], b['model']) < 1e-4 * (100 if fast_bf16('cpu') else 1))


def test_own_samples_are_what_the_rounded_model_writes(toy, tmp_path, monkeypatch):
    train(tmp_path / 'trunk', toy, '--max_iters=4')
    best, forward, seen = f'{tmp_path}/trunk/best.pt', GPT.forward, []
    monkeypatch.setattr(GPT, 'forward', lambda self, x, *rest, **how: seen.append(x.clone()) or forward(self, x, *rest, **how))
    got = ran('train.py', *TINY, toy, f'--init_from={best}', '--train_only=draft', '--draft_n=2', '--own_samples=1',
              '--quant_bits=8', '--total_batch_size=128', '--max_iters=1', '--eval_interval=0',
              f'--out_dir={tmp_path}/draft')
    own = got.names['own_rows']  # (64 * 4, 17)
    rounded = load_model(best)[0]
    prepare(rounded, 8)
    written = Engine(rounded).complete(own[:, :1].tolist(), 16, Sampling(seed=1337))
    assert own.shape == (256, 17) and own[:, 1:].tolist() == written
    assert [x.tolist() for x in seen] == [own[:4, :-1].tolist(), own[4:8, :-1].tolist()]


def test_the_average_of_the_weights(toy, tmp_path, interrupt):
    args = [toy, '--ema=0.3', '--max_iters=4', '--eval_interval=4']
    for step in range(4):
        interrupt(step, signal.SIGTERM)
        done = train(tmp_path / 'run', *args, '--init_from=resume' if step else '--init_from=scratch')
        state = load_checkpoint(f'{tmp_path}/run/ckpt.pt')
        if step == 0:
            torch.manual_seed(1337)
            average = GPT(GPTConfig(**state['config'])).state_dict()
        decay = (2 / 11, 3 / 12, 0.3, 0.3)[step]
        average = {name: decay * a + (1 - decay) * state['model'][name] for name, a in average.items()}
        assert state['step'] == step + 1 and largest_difference(average, state['ema']) < 1e-6
    best = load_checkpoint(f'{tmp_path}/run/best.pt')
    assert (largest_difference(best['model'], state['ema']) == 0
            and largest_difference(state['model'], state['ema']) > 1e-3)
    again = train(tmp_path / 'again', toy, f'--init_from={tmp_path}/run/best.pt', '--muon_lr=0', '--adam_lr=0',
                  '--max_iters=1')
    assert again['val_loss'] == done['val_loss']


def test_killed_at_any_moment():
    p = start('tests/kill.py', '--trials=3', '--hups=1', '--races=1')
    out, err = p.communicate()
    assert p.returncode == 0 and not err, err
    assert json.loads(out.splitlines()[-1])['trials'] == 3


# ----- torch.compile

def compile_by(monkeypatch, backend=lambda graph, examples: graph.forward):
    graphs, compile = [], torch.compile

    def count(graph, examples):
        graphs.append(graph)
        return backend(graph, examples)
    monkeypatch.setattr(torch, 'compile', lambda f, options=None, **how: compile(f, backend=count, **how))
    monkeypatch.setattr(data.compiling, 'can_compile', lambda device: True)
    torch._dynamo.reset()
    return graphs


def test_compiled_equals_eager(toy, tmp_path, monkeypatch):
    """Also across the step where the rounding begins: the compiled code must not go on without it."""
    args = [toy, '--n_layer=1', '--max_iters=4', '--eval_interval=0', '--muon_lr=0.1', '--quant_bits=8']
    train(tmp_path / 'eager', *args, '--qat_start=0.75')
    graphs = compile_by(monkeypatch, torch._dynamo.lookup_backend('aot_eager'))
    train(tmp_path / 'compiled', *args, '--qat_start=0.75', '--compile=True')
    assert graphs
    train(tmp_path / 'float', *args, '--quant_bits=0')
    compiled, eager, plain = ([float(row['train_loss']) for row in log(tmp_path / name)]
                              for name in ('compiled', 'eager', 'float'))
    difference = lambda a, b: max(abs(x - y) for x, y in zip(a, b, strict=True))
    assert eager[:3] == plain[:3]
    assert 10 * difference(compiled, eager) < difference(eager, plain)


def test_chats_are_compiled_once(chats, tmp_path, monkeypatch):
    graphs = compile_by(monkeypatch)
    train(tmp_path / 'run', *chats, '--max_iters=8', '--compile=True', '--sample_interval=3', '--quant_bits=8',
          '--qat_start=0.5')
    assert len(graphs) == 2


def test_a_deep_model_is_compiled_a_block_at_a_time(toy, tmp_path, monkeypatch):
    args = [toy, f'--n_layer={DEEP}', '--max_iters=2', '--eval_interval=1', '--sample_interval=1']
    train(tmp_path / 'eager', *args)
    graphs = compile_by(monkeypatch)
    train(tmp_path / 'compiled', *args, '--compile=True')
    assert len(graphs) == 1
    eager, compiled = ([float(row['train_loss']) for row in log(tmp_path / name)] for name in ('eager', 'compiled'))
    assert compiled == pytest.approx(eager, abs=1e-5)


# ----- what goes wrong

def test_nan_keeps_the_last_good_checkpoint(toy, tmp_path):
    train(tmp_path / 'run', toy, '--max_iters=2')
    state = load_checkpoint(f'{tmp_path}/run/ckpt.pt')
    state['model']['transformer.h.0.attn.c_q.weight'][3, 4] = math.nan
    torch.save(state, f'{tmp_path}/poisoned.pt')
    before = content(tmp_path)
    for args, pattern in ((['--init_from=resume', '--adam_lr=1e300', '--save_interval=1'],
                           'weights .* at step 2; .*ckpt.pt still holds step 2: .*adam_lr'),
                          (['--init_from=resume', '--adam_lr=1e300', '--log_interval=3'],
                           'loss .*nan.* at step 3; .*ckpt.pt still holds step 2: '),
                          (['--adam_lr=1e300', f'--out_dir={tmp_path}/new'],
                           'loss .*nan.* at step 1; nothing had been saved'),
                          ([f'--init_from={tmp_path}/poisoned.pt', f'--out_dir={tmp_path}/newer'],
                           'poisoned.pt is of no use: 1 of the 256 numbers of transformer.h.0.attn.c_q.weight are NaN')):
        refused(run('train.py', *TINY, toy, '--eval_interval=0', f'--out_dir={tmp_path}/run', *args), pattern)
        assert all(content(tmp_path)[path] == was for path, was in before.items() if path.endswith('.pt'))
    assert [row['step'] for row in log(tmp_path / 'run')][:2] == ['1', '2'] and not (tmp_path / 'newer').exists()
    resumed = load_checkpoint(f'{tmp_path}/run/ckpt.pt')
    next(t for name, t in tensors(resumed['optimizers']).items() if 'momentum' in name)[0, 0] = math.inf
    torch.save(resumed, tmp_path / 'run' / 'ckpt.pt')
    refused(run('train.py', *TINY, toy, '--init_from=resume', f'--out_dir={tmp_path}/run'),
            'numbers of optimizers/.*momentum are NaN or infinite')


def test_nan_in_a_batch(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(GPT, 'forward', poisoned(6))
    refused(run('train.py', *TINY, toy, '--save_interval=2', '--eval_interval=0', '--log_interval=8',
                f'--out_dir={tmp_path}'),
            'loss .*nan.* at step 5; .*ckpt.pt still holds step 4: ')
    assert load_checkpoint(f'{tmp_path}/ckpt.pt')['step'] == 4
    monkeypatch.undo()
    # now only one of two processes sees it
    a, b = two(toy, '--save_interval=2', '--eval_interval=0', f'--out_dir={tmp_path}/two', nan_at=3)
    refused(a, 'loss of another process .* at step 2; .*ckpt.pt still holds step 2: ')
    refused(b, 'loss .*nan.* at step 2; .*ckpt.pt still holds step 2: ')


@pytest.mark.skipif(sys.platform != 'linux' or os.geteuid() != 0, reason='only root may mount a small disk')
def test_a_full_disk_ends_in_one_line(toy, tmp_path):
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=400k', 'tmpfs', tmp_path]).returncode:
        pytest.skip('not allowed to mount here')
    try:
        train(tmp_path / 'run', toy, '--max_iters=2')
        before = {path: was for path, was in content(tmp_path).items() if path.endswith('.pt')}
        filler = tmp_path / 'filler'
        for left, message in ((8192, 'could not save .*ckpt.pt: .*the file that was there is kept'),
                              # the log fails first, if no file of an earlier run gives a page back
                              (0, 'could not (write|save) .*(log.csv|ckpt.pt): .*kept')):
            filler.unlink(missing_ok=True)
            filler.write_bytes(bytes(shutil.disk_usage(tmp_path).free - left))
            refused(run('train.py', *TINY, toy, '--eval_interval=0', '--save_interval=3', '--init_from=resume',
                        '--log_interval=1', f'--out_dir={tmp_path}/run'), f'{message}: free some disk space')
        assert {path: was for path, was in content(tmp_path).items() if path.endswith(('.pt', '.tmp'))} == before
        os.remove(filler)
        assert train(tmp_path / 'run', toy, '--init_from=resume')['iters'] == 8
    finally:
        subprocess.run(['umount', '-l', tmp_path], check=True)  # lazily: log.csv may still be open


def test_the_documents(toy, tmp_path):
    data = make_dataset(tmp_path / 'data', toy_text().replace('\n', ' '))
    got = run('train.py', *TINY, data, f'--out_dir={tmp_path}/out', '--sample_interval=4', '--sample_tokens=40',
              '--quant_bits=8', '--ema=0.5')
    result = result_of(got)
    assert result.keys() >= {'out_dir', 'iters', 'tokens', 'seconds', 'tok_s', 'params', 'val_loss', 'val_bpb'}
    assert (result['iters'] == 8 and result['tokens'] == 8 * 64
            and result['params'] == got.names['model'].params()['total'])
    assert math.isclose(result['val_bpb'], result['val_loss'] / math.log(2))  # one byte a character here
    assert got.out.count('----- sample at step') == 2
    assert [row['val_loss'] != '' for row in log(tmp_path / 'out')] == [False, True] * 4
    assert sorted(os.listdir(tmp_path / 'out')) == ['best.pt', 'ckpt.pt', 'log.csv', 'made.json']
    small = result_of(run('quantize.py', f'--out_dir={tmp_path}/out'))
    assert small['bytes'] == os.path.getsize(small['file']) and small['int_share'] > 0.9
    # what was trained through the rounding, and averaged, is what runs
    assert abs(small['val_loss_quant'] - result['best_val_loss']) < 1e-5
