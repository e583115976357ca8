"""
Trains a GPT: characters or BPE, in float or with quantisation in the loop; from scratch, from a checkpoint, or resumed.

    python data/stdlib_char/prepare.py
    python train.py config/quickstart.py                                 # a config, then any knob as --key=value
    python train.py config/quickstart.py --init_from=resume              # goes on where it stopped, exactly
    torchrun --standalone --nproc_per_node=2 train.py config/train_38m.py # --fsdp=True for what does not fit one device

Ctrl+C (or SIGTERM) saves and stops. out_dir receives ckpt.pt (the last state, to resume from), best.pt (the weights
with the lowest validation loss), log.csv, and the answers of batch_size='auto' in batch_size.json. The last line on
stdout is one JSON document.
"""
import atexit
import contextlib
import csv
import json
import math
import os
import platform
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from data.loader import Loader, load_meta
from data.tokenizer import from_meta
from distill import DIVERGENCES, Distiller, Labels, find_nanochat, in_bfloat16, load_teachers
from engine import Engine
from model import (GPT, GPTConfig, atomic_write, can_compile, check_device, check_knobs, compile_step, evaluate,
                   fast_bf16, largest_that_fits, load_checkpoint, load_optimizer, make_config, make_optimizers,
                   memory_limit, out_of_memory, peak_flops, save_checkpoint, shard, share, update)
from quantize import prepare

# -----------------------------------------------------------------------------
# where things are
out_dir = 'out'
dataset = 'stdlib_char'     # a folder under data/, made by its prepare.py
hold_out = ''               # '1/4': leaves the first quarter of the text out; distill.py can label it with this model, which has not seen it
init_from = 'scratch'       # 'scratch', 'resume' (out_dir/ckpt.pt), or the path of a checkpoint to start from, whose shape is then taken
# the model; None takes the usual value: n_kv_head = n_head, head_dim = n_embd / n_head, n_hidden = 4 * n_embd
n_layer = 4
n_head = 4
n_kv_head = None            # 1 is multi-query attention: the cache shrinks n_head times
n_embd = 256
head_dim = None
n_hidden = None
block_size = 256            # tokens of context
tie_weights = False
dropout = 0.0               # only for small data seen many times
multi_token_n = 0           # extra heads for t+2, t+3, ...
multi_token_weight = 0.2    # their share of the loss
multi_token_hidden_mult = 0.5   # their hidden width, in n_embd
draft_n = 0                 # unroll of the draft head; 0: none
draft_weight = 0.1
draft_hidden_mult = 0.5
# the batch
batch_size = 16             # rows per forward, per device; 'auto': as many as fit, found by trying real steps
total_batch_size = 0        # tokens per optimizer step over all devices, reached by accumulation; 0: one forward on each device
# the optimizers: Muon for the trunk's matrices, AdamW for the tables
max_iters = 1000
muon_lr = 0.02
muon_steps = 5              # 3: two fifths less of Muon's work; where the batch is small and the epochs few the loss is the same
adam_lr = 0.003
weight_decay = 0.0          # Muon's; helps when data repeats
warmup_iters = 0            # steps of linear warm-up
decay_frac = 1.0            # the last share of the steps over which the rates fall linearly to zero
grad_clip = 1.0             # largest gradient norm; 0: no clipping
ema = 0.0                   # 0.99 to 0.999: a moving average of the weights is evaluated, sampled and written to best.pt; 0: the weights themselves
seed = 1337
# what it learns from; the text alone unless there is a teacher
teacher = ''                # the out_dir of a trained model, several joined by +, or a folder of labels (distill.py)
alpha = 0.5                 # the teacher's share of the loss; the text has the rest
temperature = 1.0           # of the teacher's and the student's distributions when they are compared
divergence = 'forward_kl'   # forward_kl, reverse_kl, jsd
train_only = ''             # draft or multi_token: that head learns, everything else is frozen
own_samples = 0.0           # the share of rows that the frozen model wrote itself
# quantisation in the loop
quant_bits = 0              # 8 or 4: train through the rounding of the file of integers; 0: float
quant_group = 32            # 4 bits: columns that share a step
tables_bits = 8             # of the vocabularies, whatever the rest has
qat_start = 0.0             # share of max_iters after which the rounding begins
# watching it, in steps
log_interval = 10
eval_interval = 250         # loss on the whole validation split
save_interval = 250         # 0: only at the end
sample_interval = 500       # prints a sample; 0: never
sample_tokens = 120
wandb_log = False           # needs pip install wandb
wandb_project = 'picochat'
# the machine
device = 'auto'             # cuda, mps, cpu
dtype = 'auto'              # float32 or bfloat16 (autocast); auto: bfloat16 where the device multiplies it faster
compile = True              # torch.compile; needs a C++ compiler on a CPU, goes on without one
fsdp = False                # the processes of torchrun share out weights, gradients, optimizer states and teachers, instead of each holding all
# -----------------------------------------------------------------------------
exec(open('configurator.py').read())
if hasattr(sys.stdout, 'reconfigure'):      # a character of a sample that the terminal has not ends no training
    sys.stdout.reconfigure(errors='replace')
# -----------------------------------------------------------------------------
# what knobs may be; bench.py, which measures such trainings, runs this block, too
check_knobs(config | {'batch_size': 1} if batch_size == 'auto' else config,
            ('n_layer n_head n_kv_head n_embd head_dim n_hidden block_size batch_size max_iters', int, 1, math.inf),
            ('multi_token_n draft_n total_batch_size warmup_iters log_interval eval_interval save_interval '
             'sample_interval sample_tokens', int, 0, math.inf),
            ('seed', int, 0, 2**63 - 1),
            ('dropout decay_frac qat_start alpha own_samples', float, 0, 1), ('ema', float, 0, 0.999999),
            ('temperature', float, 1e-3, math.inf),
            ('muon_lr adam_lr weight_decay grad_clip multi_token_weight multi_token_hidden_mult draft_weight '
             'draft_hidden_mult', float, 0, math.inf),
            ('quant_bits', (0, 8, 4)), ('tables_bits', (8, 4)), ('quant_group', (32, 64, 128)), ('muon_steps', (5, 3)),
            ('divergence', DIVERGENCES), ('train_only', ('', 'draft', 'multi_token')),
            ('dtype', ('auto', 'float32', 'bfloat16')), may_be_none='n_kv_head head_dim n_hidden')
if train_only and teacher:
    raise SystemExit(f"error: train_only ({train_only}) goes without a teacher ({teacher}): "
                     "a head learns from the frozen model and the text")
if own_samples and not train_only:
    raise SystemExit(f"error: own_samples ({own_samples}) is for train_only=draft or multi_token: "
                     "while the trunk learns, what it writes is not what it will write")
# -----------------------------------------------------------------------------
# set-up: processes, device, data, model

for name in teacher.split('+'):
    # A missing teacher is reported before missing data: the data are in this teacher's tokens.
    if name.startswith('nanochat:'):
        find_nanochat(name.partition(':')[2])
if wandb_log:
    try:
        import wandb
    except ImportError:
        raise SystemExit("error: wandb_log=True needs wandb: pip install wandb, "
                         "or leave it off (log.csv is always written)")

rank, local_rank, world_size = (int(os.environ.get(k, d))
                                for k, d in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
main_process, auto = rank == 0, batch_size == 'auto'
if fsdp and auto:
    raise SystemExit("error: batch_size=auto cannot go with fsdp=True: a process that runs out of memory "
                     "would leave the others waiting for its weights; give a number of rows")
if fsdp and world_size == 1:
    raise SystemExit("error: fsdp=True shares a model out among processes and there is only one: "
                     "start several, torchrun --standalone --nproc_per_node=2 train.py ...")
if device == 'auto':
    device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
if world_size > 1:
    if device == 'cuda':
        device = f'cuda:{local_rank}'
    # gloo is for the CPU, where evaluate adds up its totals
    dist.init_process_group('cpu:gloo,cuda:nccl' if device.startswith('cuda') else 'gloo')
check_device(device)
if device.startswith('cuda:'):
    torch.cuda.set_device(device)               # what is waited for below is the current device
device_type = device.split(':')[0]
if dtype == 'auto':
    dtype = 'bfloat16' if fast_bf16(device) else 'float32'
if device_type == 'cuda':
    torch.set_float32_matmul_precision('high')
if auto and device_type != 'cuda' and not (device_type == 'cpu' and platform.system() == 'Linux'):
    raise SystemExit("error: batch_size=auto needs a CUDA GPU, or a CPU under Linux, "
                     f"not {device_type} under {platform.system()}: give a number of rows")


def say(*words):
    if main_process:
        print(*words, flush=True)


def agree(x):
    """The least of the numbers that the processes bring."""
    if world_size == 1:
        return x
    x = torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(x, op=dist.ReduceOp.MIN)
    return x.item()


compile = compile and can_compile(device)

data_dir = os.path.join('data', dataset)
try:
    tokenizer = from_meta(load_meta(data_dir))
except ValueError as e:
    raise SystemExit(f'error: {e}')
gpt_config = make_config({k: config[k] for k in GPTConfig.__dataclass_fields__ if k in config}
                         | {'vocab_size': tokenizer.vocab_size}, 'the config')
rows = 1 if auto else batch_size
tokens_per_forward = rows * block_size * world_size
total_batch_size = total_batch_size or (0 if auto or init_from == 'resume' else tokens_per_forward)
loader = Loader(data_dir, 'train', rows, block_size, seed, rank, world_size, device, hold_out)
val_loader = Loader(data_dir, 'val', rows, block_size, seed, rank, world_size, device)
data_hash = loader.meta['sha256']['train.bin']  # of the text, for checkpoints

ckpt_path, best_path = os.path.join(out_dir, 'ckpt.pt'), os.path.join(out_dir, 'best.pt')
resumed, source = {}, {}                        # checkpoints: to go on with, to take weights from
if init_from == 'resume':
    resumed = source = load_checkpoint(ckpt_path)       # into the CPU's memory: the model that takes it may be sharded
    if 'optimizers' not in resumed:
        raise SystemExit(f"error: {ckpt_path} holds weights alone and cannot be resumed: "
                         f"start from it with --init_from={ckpt_path}")
    total_batch_size = total_batch_size or resumed['total_batch_size']
    if resumed['total_batch_size'] != total_batch_size:
        raise SystemExit(f"error: {ckpt_path} was trained with total_batch_size={resumed['total_batch_size']}, "
                         f"not {total_batch_size}: resume with the same, "
                         f"or start from it with --init_from={ckpt_path}")
    differ = [f'{k} is {resumed["knobs"].get(k)!r} there and {config[k]!r} here'
              for k in [*vars(gpt_config), 'hold_out', 'train_only', 'dataset',
                        'quant_bits', 'quant_group', 'tables_bits', 'qat_start']
              if k in config and k != 'dropout' and resumed['knobs'].get(k, config[k]) != config[k]]
    if differ:
        raise SystemExit(f"error: {ckpt_path} was trained in another way: {'; '.join(differ)}: "
                         "resume with the same knobs")
    if resumed.get('data', data_hash) != data_hash:
        raise SystemExit(f"error: {data_dir} has been prepared anew since {ckpt_path} was saved, from another text: "
                         f"start from it with --init_from={ckpt_path} and another --out_dir, or anew")
    config['init_from'] = resumed['knobs']['init_from']     # where its weights are from
elif init_from != 'scratch':
    source = load_checkpoint(init_from)
if not resumed:
    there = [path for path in (ckpt_path, best_path) if os.path.exists(path)]
    read = [init_from, *(name if name.endswith('.pt') else os.path.join(name, 'best.pt')
                         for name in teacher.split('+') if name)]
    for path in there:
        if os.path.realpath(path) in map(os.path.realpath, read):
            raise SystemExit(f"error: out_dir ({out_dir}) would replace {path}, which this run learns from: "
                             "give another --out_dir")
    if there:
        say(f"note: {' and '.join(there)} will be replaced"
            f"{' (--init_from=resume would go on)' * (ckpt_path in there)}")
if total_batch_size % tokens_per_forward:
    raise SystemExit(f"error: total_batch_size ({total_batch_size}) must be a multiple of "
                     f"batch_size*block_size*processes ({rows}*{block_size}*{world_size}={tokens_per_forward}): "
                     f"try {max(1, round(total_batch_size / tokens_per_forward)) * tokens_per_forward}")
if source and hold_out and source.get('knobs', {}).get('hold_out') != hold_out:
    raise SystemExit(f"error: {init_from} was not trained with hold_out={hold_out}: "
                     "it has seen that part of the text; start from scratch")
# The model takes the shape of the checkpoint, but for block_size and dropout, on which no weight depends,
# and for heads that the checkpoint does not have: they may be added.
if source:
    if source['tokenizer'] != tokenizer.meta():
        raise SystemExit(f"error: {ckpt_path if resumed else init_from} was trained with another tokenizer, "
                         f"on {source['dataset']}, than {data_dir} has: "
                         "give that dataset, or prepare this one with the same tokenizer")
    new = {'block_size': block_size, 'dropout': dropout,
           'draft_n': draft_n or source['config']['draft_n']}   # the cell is the same however often it is applied
    for head in ('multi_token', 'draft'):
        if not source['config'][f'{head}_n']:
            new |= {k: v for k, v in vars(gpt_config).items() if k.startswith(head)}
    gpt_config = make_config(source['config'] | new, init_from)
torch.manual_seed(seed)
model = GPT(gpt_config)
if source:
    heads = {name: p for name, p in model.state_dict().items() if name.startswith(('multi_token', 'draft'))}
    # heads that the checkpoint does not have start fresh; all else must be in it
    model.load_state_dict(heads | source['model'])
if train_only:
    if not hasattr(model, train_only):
        raise SystemExit(f"error: train_only={train_only} needs that head: give --{train_only}_n=4")
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(train_only))
model = shard(model, device_type) if fsdp else model.to(device)
optimizers = make_optimizers(model, muon_lr, adam_lr, weight_decay, muon_steps)
# the weights and their moving averages; where a checkpoint has no averages, its weights are their start
averages = {name: (p, p.detach().clone()) for name, p in model.named_parameters() if p.requires_grad} if ema else {}
for name, average in resumed.get('ema', {}).items() if ema else ():
    averages[name][1].copy_(share(average, averages[name][0]))
n_params = model.params()
say(f"model: {n_params['total']:,} parameters "
    f"({', '.join(f'{k} {v:,}' for k, v in n_params.items() if v and k != 'total')})")
say(f"machine: {device}, {dtype}, compile={compile}, {world_size} process{'es' if world_size > 1 else ''}, "
    f"{torch.get_num_threads()} threads")

trained, labels = model, None
if teacher and os.path.exists(os.path.join(teacher, 'meta.json')):
    labels = Labels(teacher, loader, device)
    if labels.meta['temperature'] != temperature or divergence != 'forward_kl':
        raise SystemExit(f"error: the labels in {teacher} are for forward_kl "
                         f"at temperature {labels.meta['temperature']}, not for {divergence} at {temperature}: "
                         "write others, or train beside the teacher itself")
    trained = Distiller(model, temperature=temperature)
elif teacher:
    teachers = load_teachers(teacher, tokenizer, block_size, 'cpu' if fsdp else device, dataset)
    if any(t.hold_out for t in teachers):
        raise SystemExit(f"error: a teacher in {teacher} was trained with hold_out: "
                         f"write labels (python distill.py --teacher={teacher} --out_dir=FOLDER), "
                         "which it gives only for what it has not seen")
    if fsdp:                                    # a GPT-2 is small enough to stay whole
        teachers = [shard(t, device_type) if isinstance(t, GPT) else t.to(device) for t in teachers]
    elif dtype == 'bfloat16':
        teachers = [in_bfloat16(t) for t in teachers]
    trained = Distiller(model, teachers, divergence, temperature)
forward = alone = (compile_step(trained, math.inf if auto else rows * block_size, tokenizer.vocab_size)
                   if compile else trained)
if world_size > 1 and not fsdp:
    forward = DDP(alone, device_ids=[local_rank] if device_type == 'cuda' else None)
autocast = torch.autocast(device_type, torch.bfloat16, enabled=dtype == 'bfloat16')
weight = {'ce': 1 - alpha if teacher else 1.0, 'kl': alpha, 'multi_token': multi_token_weight, 'draft': draft_weight}
if train_only:
    weight = dict.fromkeys(weight, 0.0) | {train_only: 1.0}
flops = trained.flops_per_token()               # what labels cost is in their meta.json
own, peak = None, peak_flops(device)

# -----------------------------------------------------------------------------
# a step, and how many rows of it fit

def backward(run, step, micro=0, accumulation=1):
    """
    Adds the gradients of one micro-batch to what is there; returns its losses, in nats per token.
    run: the model as it is called.
    """
    x, y = loader.batch(step, micro, accumulation)
    soft = labels.batch(loader.starts(step, micro, accumulation), block_size) if labels else ()
    if own is not None:
        n = len(own) // 64
        rows = own[(step * accumulation + micro) % 64 * n:][:n]
        x[:n], y[:n] = rows[:, :-1], rows[:, 1:]
    # DDP sums gradients over the processes only at the last micro-batch; fsdp does so each time, since whole
    # gradients are what does not fit
    waits = isinstance(run, DDP) and micro < accumulation - 1
    with run.no_sync() if waits else contextlib.nullcontext(), autocast:
        losses = run(x, y, *soft)
        sum(weight[k] * v for k, v in losses.items()).div(accumulation).backward()
    return {k: v.detach() for k, v in losses.items()}


def fits(rows):
    """
    Whether two real steps of this many rows run on every process.
    DDP is left out: a process that fails must not keep the others waiting.
    """
    loader.batch_size = rows
    accumulation = total_batch_size // (rows * block_size * world_size) if total_batch_size else 1
    try:
        for _ in range(2):                      # the first one makes the optimizers' states
            for micro in range(min(2, accumulation)):
                backward(alone, 0, micro, accumulation)
            update(model, optimizers, grad_clip)
        fit = True
    except Exception as e:
        if not out_of_memory(e):
            raise
        fit = False
    model.zero_grad()
    if compile:
        torch.compiler.reset()                  # or a second shape would be compiled for any size
    return agree(fit) > 0


model.train()
try:
    os.makedirs(out_dir, exist_ok=True)
except OSError as e:
    raise SystemExit(f"error: cannot make the folder out_dir ({out_dir}): {e.strerror}")
if auto:
    path = os.path.join(out_dir, 'batch_size.json')
    most = max(1, total_batch_size // (block_size * world_size) or loader.n_windows // world_size)
    # divisors of most, if there is a total_batch_size to divide
    sizes = [n for n in range(1, most + 1) if not total_batch_size or most % n == 0]
    classes = [(module, module.__class__) for module in model.modules()]
    if quant_bits:                              # rounding takes memory, too, from whichever step on
        prepare(model, quant_bits, quant_group, tables_bits)
    for optimizer in optimizers:                # at rates of zero no step changes a weight
        for group in optimizer.param_groups:
            group['lr'] = 0.0
    with memory_limit(device) as memory:
        key = json.dumps([(torch.cuda.get_device_name(device) if device_type == 'cuda'
                           else f'{platform.machine()}, {torch.get_num_threads()} threads'),
                          torch.__version__, world_size, dtype, compile, vars(gpt_config), total_batch_size, most,
                          teacher, flops, weight, divergence, train_only,
                          quant_bits, quant_group, tables_bits, qat_start, grad_clip > 0, ema > 0])
        known = json.load(open(path)) if os.path.exists(path) else {}
        batch_size, was = known.get(key, (0, 0))
        # an answer that was found with more memory than there is now counts for nothing
        batch_size = int(agree(batch_size if memory > 0.95 * was else 0))
        how = f'as {path} says'
        if not batch_size:
            batch_size = ([0] + sizes)[largest_that_fits(lambda n: fits(sizes[n - 1]), len(sizes))]
            how = f'the most of 1 to {sizes[-1]} that fit {memory / 2**20:,.0f} MiB, nine tenths of what is free'
            if batch_size and main_process:
                atomic_write(path, lambda f: f.write(
                    json.dumps(known | {key: (batch_size, memory)}, indent=0).encode()))
    if not batch_size:
        raise SystemExit(f"error: batch_size=auto: not even one row of block_size ({block_size}) tokens fits "
                         f"the {memory / 2**20:,.0f} MiB that are left on {device}: "
                         "use a smaller block_size or model, or several GPUs with fsdp=True")
    for module, kind in classes:
        module.__class__ = kind
    for optimizer in optimizers:
        optimizer.state.clear()
    say(f'batch_size: {batch_size} rows, {how}')
    loader.batch_size = val_loader.batch_size = batch_size
    total_batch_size = total_batch_size or batch_size * block_size * world_size
accumulation = total_batch_size // (batch_size * block_size * world_size)
say(f"data: {dataset}, {loader.n_tokens:,} training and {val_loader.n_tokens:,} validation tokens, "
    f"vocabulary {tokenizer.vocab_size}; a step is {total_batch_size:,} tokens, "
    f"the run {max_iters * total_batch_size / loader.n_tokens:.1f} epochs")
if resumed:
    for optimizer, state in zip(optimizers, resumed['optimizers']):
        load_optimizer(optimizer, state)        # but the rates are this run's knobs
for part in ('model', 'optimizers', 'ema'):
    source.pop(part, None)                      # frees their memory: they are in the model and the optimizers now
step, saved, best = resumed.get('step', 0), resumed.get('step'), resumed.get('best', {'loss': math.inf})
seconds, val_loss_before = resumed.get('seconds', 0.0), resumed.get('val_loss_before')

# -----------------------------------------------------------------------------
# what happens now and then

@contextlib.contextmanager
def averaged():
    """Inside, the weights and their moving averages have changed places."""
    @torch.no_grad()
    def swap():
        for p, a in averages.values():
            kept = p.clone()
            p.copy_(a)
            a.copy_(kept)
        if fsdp and averages:
            model.reshard()                     # drops the whole weights that were gathered before the change
    swap()
    yield
    swap()


def measure(step):
    """Loss on the whole validation split."""
    with autocast:
        result = evaluate(model, val_loader.eval_batches(), tokenizer.token_bytes)
    say(f"step {step}: validation loss {result['loss']:.4f} nats, {result['bpb']:.4f} bits per byte"
        f"{f' (weights rounded to int{quant_bits})' if step > qat_step or qat_step == 0 else ''}")
    return result


def validate(step):
    """The same; the best weights so far go to best.pt."""
    global best
    with averaged():
        result = measure(step)
        if result['loss'] < best['loss'] or train_only:     # with a frozen trunk the newest head counts as the best
            best = {**result, 'step': step}
            save_checkpoint(best_path, model, tokenizer.meta(), step=step, best=best, dataset=dataset, data=data_hash,
                            knobs=config)
    return result


def show_sample(step):
    asked = 1 if val_loader.mask is None else int(val_loader.mask.argmax())     # of chats, the first question
    prompt = val_loader.tokens[:asked].tolist()
    with averaged():
        ids = Engine(model).complete([prompt], min(sample_tokens, block_size - asked), temperature=0.8, seed=step)[0]
    model.train()
    say(f"----- sample at step {step} -----\n{tokenizer.decode(prompt[1:] + ids)}\n-----")


stopping = []                                   # the signals that asked for it
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, lambda signum, frame: stopping.append(signum))


columns = ['step', 'tokens', 'seconds', 'train_loss', 'val_loss', 'val_bpb', 'lr_factor', 'tok_s']
log_path = os.path.join(out_dir, 'log.csv')
if main_process:                                # the log goes back to where the checkpoint is
    lines = open(log_path).read().splitlines()[1:] if resumed and os.path.exists(log_path) else []
    # without what comes later, and without a line that a power cut left half written
    lines = [','.join(columns)] + [line for line in lines if line.count(',') == len(columns) - 1
                                   and line.split(',')[0].isdigit() and int(line.split(',')[0]) <= step]
    atomic_write(log_path, lambda f: f.write('\n'.join(lines + ['']).encode()))
    log = csv.DictWriter(open(log_path, 'a', buffering=1, newline=''), columns, lineterminator='\n')
if wandb_log and main_process:
    wandb.init(project=wandb_project, name=os.path.basename(out_dir), config=config)

# -----------------------------------------------------------------------------
# the loop

qat_step = math.ceil(qat_start * max_iters) if quant_bits else math.inf
if not qat_step:
    prepare(model, quant_bits, quant_group, tables_bits)
# The frozen model writes as many rows as 64 batches have of them: drafts are made after the model's own words.
# Its weights are rounded here if they are from the first step on, also in a run that goes on later.
if own_samples:
    n, cut = max(1, round(own_samples * batch_size)), max(1, block_size // 16)
    starts = [start for step in range(64) for start in loader.starts(step)[:n]]
    prompts = loader.rows(starts)[0][:, :cut].tolist()
    say(f'the model writes {64 * n} rows of its own')
    written = Engine(model).complete(prompts, block_size + 1 - cut, seed=seed)
    own = torch.tensor([p + w for p, w in zip(prompts, written)], device=device)        # (64 n, block_size + 1)
    model.train()
if step >= qat_step:
    prepare(model, quant_bits, quant_group, tables_bits)
    if step < max_iters and best.get('step', 0) <= qat_step:    # fewer max_iters have moved qat_step
        best = {'loss': math.inf}
step_times, losses_due, rate, result = [], [], 0, {'loss': None, 'bpb': None}
began = time.perf_counter()
if source and not resumed and eval_interval:
    val_loss_before = measure(0)['loss']        # what fine-tuning starts from
clock, first, timed = time.perf_counter(), step, step       # timed: the step up to which times are known
while step < max_iters:
    if step == qat_step:
        prepare(model, quant_bits, quant_group, tables_bits)
        best = {'loss': math.inf}               # from here on losses are those of the rounded weights
    torch.manual_seed(hash((seed, step, rank)))  # dropout is a function of the step: there is no random state to save
    # the rates' factor: linear warm-up, level, linear to zero over the last decay_frac
    factor = min((step + 1) / max(1, warmup_iters), 1.0, (max_iters - step) / max(1, decay_frac * max_iters))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = group['peak_lr'] * factor
    for micro in range(accumulation):
        losses_due.append((step, backward(forward, step, micro, accumulation)))
    update(model, optimizers, grad_clip)
    step += 1
    # the decay starts at 2/11 and grows with the steps, or the first weights would be remembered for too long
    for p, a in averages.values():
        a.lerp_(p.detach(), 1 - min(ema, (1 + step) / (10 + step)))
    leaving = step == max_iters or agree(not stopping) == 0         # all processes must leave after the same step
    logs, saves = (bool(every) and step % every == 0 or leaving for every in (log_interval, save_interval))
    # being asked to stop brings no evaluation forward: SIGTERM is urgent
    evals = bool(eval_interval) and step % eval_interval == 0 or step == max_iters
    shows = bool(sample_interval) and step % sample_interval == 0
    if logs or evals or saves:                  # losses are looked at only now and then, and before anything is kept
        read = [(s, {k: v.item() for k, v in parts.items()}) for s, parts in losses_due]
        wrong = [(s, f'the loss became {parts}') for s, parts in read if not all(map(math.isfinite, parts.values()))]
        # the last update is in no loss yet
        if (evals or saves) and not all(p.isfinite().all() for p in model.parameters()):
            wrong.append((step - 1, 'weights became infinite or NaN'))
        at = agree(min((s for s, _ in wrong), default=math.inf))            # what one process has seen, all must know
        if at < math.inf:
            kept = (f"{ckpt_path} still holds step {saved}: resume" if saved is not None
                    else 'nothing had been saved yet: start again')
            raise SystemExit(f"error: {wrong[0][1] if wrong else 'the loss of another process became infinite or NaN'} "
                             f"at step {at:.0f}; {kept} with a lower muon_lr ({muon_lr}) or adam_lr ({adam_lr})")
        means = {k: sum(parts[k] for _, parts in read) / len(read) for k in read[0][1]}
        losses_due = []
    # the clock, too, for which the device must be waited for; apart from that it is never idle. The first step compiles
    looks = logs or evals or saves or shows or timed == first
    if looks:
        if device_type != 'cpu':
            torch.accelerator.synchronize()
        now = time.perf_counter()
        seconds, step_times = seconds + now - clock, step_times[-20:] + [(now - clock) / (step - timed)]
        typical, timed = sorted(step_times)[(len(step_times) - 1) // 2], step
        rate = total_batch_size / typical
    if logs:
        eta = typical * (max_iters - step)
        say(f"step {step}/{max_iters} | "
            f"loss {' + '.join(f'{k} {v:.4f}' if len(means) > 1 else f'{v:.4f}' for k, v in means.items())} | "
            f"lr x{factor:.3f} | {1000 * typical:.0f} ms | {rate:,.0f} tok/s | "
            f"{f'MFU {100 * flops * rate / (peak * world_size):.0f} % | ' if peak and not train_only else ''}"
            f"ETA {int(eta // 60)}:{int(eta % 60):02d}")
    if evals:
        result = validate(step)
    if main_process and (logs or evals):
        row = {'step': step, 'tokens': step * total_batch_size, 'seconds': round(seconds, 2),
               'train_loss': means['ce'], 'lr_factor': factor, 'tok_s': round(rate)}
        if evals:
            row |= {'val_loss': result['loss'], 'val_bpb': result['bpb']}
        try:
            log.writerow(row)
        except OSError as e:
            raise SystemExit(f"error: could not write {log_path}: {e.strerror}; the checkpoints there are kept: "
                             "free some disk space and resume")
        if wandb_log:
            wandb.log(row, step=step)
    if saves:
        save_checkpoint(ckpt_path, model, tokenizer.meta(), optimizers=[o.state_dict() for o in optimizers], step=step,
                        best=best, seconds=seconds, val_loss_before=val_loss_before, dataset=dataset,
                        data=data_hash, total_batch_size=total_batch_size, knobs=config,
                        ema={name: a for name, (_, a) in averages.items()})
        saved = step
    if shows:
        show_sample(step)
    if leaving and step < max_iters:
        say(f"stopped at step {step}; saved {ckpt_path}: go on with --init_from=resume")
        break
    if looks:                                   # what was done in between is not training
        clock = time.perf_counter()

if step >= max_iters and result['loss'] is None:    # a run resumed at its end has nothing left to do but to say so
    result = validate(step)
say(json.dumps({'out_dir': out_dir, 'iters': step, 'tokens': step * total_batch_size,
                'seconds': round(seconds, 2), 'wall_seconds': round(time.perf_counter() - began, 2),
                'tok_s': round(rate), 'batch_size': batch_size, 'params': n_params['total'],
                'flops': None if train_only else flops * step * total_batch_size,
                'val_loss': result['loss'], 'val_bpb': result['bpb'],
                'best_val_loss': best['loss'] if 'step' in best else None, 'best_step': best.get('step'),
                'val_loss_before': val_loss_before}))
if world_size > 1:
    dist.barrier()
    dist.destroy_process_group()
    if wandb_log and main_process:
        wandb.finish()
    # a gloo thread that frees its last tensor while Python shuts down aborts the process: it ends before that
    atexit.register(os._exit, 0)
