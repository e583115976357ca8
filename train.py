"""
Trains a GPT: characters or BPE, in float or with quantisation in the loop; from scratch, from a checkpoint, or resumed.

    python data/stdlib_char/prepare.py
    python train.py config/quickstart.py                                 # a config, then any knob as --key=value
    python train.py config/quickstart.py --init_from=resume              # goes on where it stopped, exactly
    torchrun --standalone --nproc_per_node=2 train.py config/train_38m.py # --fsdp=True for what does not fit one device

You will see a line every few steps, losses on the validation split, and now and then a sample of text. Ctrl+C (or
SIGTERM, or closing the terminal) saves and stops. out_dir receives ckpt.pt (the last state, to resume from), best.pt
(the weights with the lowest validation loss) and log.csv. The last line on stdout is one JSON document.
"""
import atexit
import contextlib
import functools
import math
import os
import shlex
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from data.batch_size import rows_that_fit
from data.checkpoint import load_weights, save_checkpoint, shape_of_student, starting_point, will_replace
from data.compiling import can_compile, compile_step, eager
from data.files import hold, in_repo, json_line
from data.loader import Loader, load_meta, micro_batches
from data.machine import (MEASURED, autocast, join_processes, keep_memory, least, peak_flops, pick_device, pick_dtype,
                          shard)
from data.meter import Log, Meter
from data.optimizers import Averages, load_optimizer, make_optimizers, update
from data.record import end_if_made, record, stopped_on_the_way
from data.rounding import BITS, GROUPS, prepare
from data.signals import on_stop
from data.teachers import check_teachers
from data.tokenizer import from_meta
from distill import make_learner
from engine import Engine, Sampling
from model import GPT, MLPS, config_of, evaluate
from quantize import grid_in

# -----------------------------------------------------------------------------
# where things are
out_dir = 'out'
dataset = 'stdlib_char'     # a folder under data/, made by its prepare.py
hold_out = ''               # '1/4': leave out the first quarter of the text, so as to label it for others (distill.py)
init_from = 'scratch'       # 'scratch', 'resume' (out_dir/ckpt.pt), or a checkpoint's path: its weights, its shape
# the model; None: n_kv_head = n_head, head_dim = n_embd / n_head, n_hidden = 4 * n_embd (swiglu: 8/3 of it)
n_layer = 4
n_head = 4
n_kv_head = None            # 1 is multi-query attention: the cache shrinks n_head times
n_embd = 256
head_dim = None
n_hidden = None
block_size = 256            # tokens of context
tie_weights = False
mlp = 'relu2'               # or swiglu: with qk_norm and embed_norm False and softcap 0 the block is a Llama's
qk_norm = True              # norms queries and keys
embed_norm = True           # norms embeddings
softcap = 15.0              # logits lie between -15 and 15; 0: they are not capped
norm_eps = 0.0              # added to every norm's mean square; 0: PyTorch's own, the machine epsilon of the dtype
rope_base = 10000.0         # rotary positions: the slowest pair turns by about 1 / rope_base radians a token
dropout = 0.0               # only for small data seen many times
multi_token_n = 0           # extra heads for t+2, t+3, ...
multi_token_weight = 0.2    # their share of the loss
multi_token_hidden_mult = 0.5   # their hidden width, in n_embd
draft_n = 0                 # unroll of the draft head; 0: none
draft_weight = 0.1
draft_hidden_mult = 0.5
draft_vocab = 0             # it chooses among the first so many tokens: a large vocabulary takes its time; 0: all
# the batch
batch_size = 16             # rows per forward, per device; 'auto': as many as fit, found by trying real steps
total_batch_size = 0        # tokens per step over all devices, reached by accumulation; 0: a forward on each
# the optimizers: Muon for all matrices but the vocabulary's, AdamW for those
max_iters = 1000
muon_lr = 0.02
muon_steps = 5              # 3: two fifths less of Muon's work; for a small batch and few epochs as good
adam_lr = 0.003
weight_decay = 0.0          # Muon's; helps when data repeats
warmup_iters = 0            # steps of linear warm-up
decay_frac = 1.0            # the last share of the steps over which the rates fall linearly to zero
grad_clip = 1.0             # largest gradient norm; 0: no clipping
ema = 0.0                   # 0.99 to 0.999: a moving average of the weights is measured and kept in best.pt; 0: none
seed = 1337
# what it learns from; the text alone unless there is a teacher
teacher = ''                # the out_dir of a trained model, several joined by +, or a folder of labels (distill.py)
alpha = 0.5                 # the teacher's share of the loss; the text has the rest
temperature = 1.0           # of the teacher's and the student's distributions when they are compared
divergence = 'forward_kl'   # forward_kl, reverse_kl, jsd
train_only = ''             # draft or multi_token: that head learns, everything else is frozen
own_samples = 0.0           # the share of rows that the frozen model wrote itself
# quantisation in the loop
quant_bits = 0              # 8 or 4: train through the rounding of the int8 or int4 checkpoint; 0: float
quant_group = 32            # 4 bits: the group size: so many columns share a step, a small integer that scales them
tables_bits = 8             # of the vocabularies, whatever the rest has
qat_start = 0.0             # share of max_iters after which the rounding begins
# logging and saving, in steps
log_interval = 10
eval_interval = 250         # loss on the whole validation split; 0: only at the end; -1: never
save_interval = 250         # 0: only at the end; -1: never
sample_interval = 500       # prints a sample; 0: never
sample_tokens = 120
wandb_log = False           # needs pip install wandb
wandb_project = 'picochat'
# the machine
device = 'auto'             # cuda, mps, cpu
dtype = 'auto'              # float32 or bfloat16 (autocast); auto: bfloat16 where the device multiplies it faster
compile = True              # torch.compile; needs a C++ compiler on a CPU, goes on without one
fsdp = False                # torchrun's processes share out weights, gradients, optimizer states and teachers
# what they may be: (least, most), or a list of all that is allowed
limits = {
    'n_layer n_head n_kv_head n_embd head_dim n_hidden block_size max_iters': (1, None),
    'batch_size': (1, None, 'auto'),
    'multi_token_n draft_n draft_vocab total_batch_size warmup_iters log_interval sample_interval '
    'sample_tokens': (0, None),
    'eval_interval save_interval': (-1, None),
    'seed': (0, 2**63 - 1),
    'mlp': [*MLPS],
    'softcap norm_eps': (0.0, None),
    'rope_base': (1.0, None),
    'dropout decay_frac qat_start alpha own_samples': (0, 1),
    'ema': (0, 0.999999),
    'temperature': (1e-3, None),
    'muon_lr adam_lr weight_decay grad_clip multi_token_weight multi_token_hidden_mult draft_weight '
    'draft_hidden_mult': (0, None),
    'muon_steps': [5, 3],
    'quant_bits': [0, *BITS],
    'tables_bits': [*BITS],
    'quant_group': [*GROUPS],
    'divergence': ['forward_kl', 'reverse_kl', 'jsd'],
    'train_only': ['', 'draft', 'multi_token'],
    'dtype': ['auto', 'float32', 'bfloat16'],
}
# -----------------------------------------------------------------------------
exec(open(in_repo('configurator.py')).read())
# -----------------------------------------------------------------------------
# set-up: the processes, the device, the text, and the checkpoint to start from

assert out_dir, "out_dir () must name a folder: --out_dir=out"
assert not (train_only and teacher), (f"train_only ({train_only}) goes without a teacher ({teacher}): "
                                      "a head learns from the frozen model and the text")
assert train_only or not own_samples, (f"own_samples ({own_samples}) is for train_only=draft or multi_token: "
                                       "while the trunk learns, what it writes is not what it will write")
teacher_files = check_teachers(teacher)      # first, since the data are prepared with the teacher's tokenizer
if wandb_log:
    import wandb

rank, world_size, device = join_processes(pick_device(device))
keep_memory()
device_type, main_process = device.split(':')[0], rank == 0
assert not fsdp or batch_size != 'auto', ("batch_size=auto cannot go with fsdp=True: one process alone holds less than "
                                          "the whole model needs; give a number of rows")
assert not fsdp or world_size > 1, ("fsdp=True shares a model out among processes and there is only one: "
                                    "start several, torchrun --standalone --nproc_per_node=2 train.py ...")
compile = compile and can_compile(device)

# the text and its tokens; a batch depends on nothing but its number
data_dir = os.path.join(in_repo('data'), dataset)
tokenizer = from_meta(load_meta(data_dir))
rows = 1 if batch_size == 'auto' else batch_size
loader = Loader(data_dir, 'train', rows, block_size, seed, device, hold_out)
val_loader = Loader(data_dir, 'val', rows, block_size, seed, device)

# the checkpoint to start from, if there is one; resumed: the same where this run goes on with it, else empty
if main_process:
    hold(out_dir)                               # locked before its checkpoint is read: another training may write there
ckpt_path, best_path = os.path.join(out_dir, 'ckpt.pt'), os.path.join(out_dir, 'best.pt')
gpt_config = config_of(config, tokenizer.vocab_size)
reads = [os.path.join(data_dir, 'meta.json'), *teacher_files]
if init_from not in ('scratch', 'resume'):
    reads.append(init_from)
if stopped_on_the_way(best_path, reads):        # in a ladder: this very command was interrupted
    init_from = 'resume'
source = starting_point(init_from, ckpt_path, config, tokenizer, data_dir, loader)
resumed = source if init_from == 'resume' else {}
if resumed.get('fast_bf16') is not None:
    MEASURED['cpu'] = resumed['fast_bf16']      # measuring again might give another answer on a busy machine
dtype = pick_dtype(dtype, device)
if resumed:
    config['init_from'] = resumed['knobs']['init_from'] # where its weights came from at first
    total_batch_size = total_batch_size or resumed['total_batch_size']
    assert total_batch_size == resumed['total_batch_size'], (
        f"{ckpt_path} was trained with total_batch_size={resumed['total_batch_size']}, not {total_batch_size}: "
        f"resume with the same, or start from it with --init_from={shlex.quote(ckpt_path)}")
else:
    end_if_made([best_path], reads)             # by a ladder (bench.py) that has run this very command before
    will_replace((ckpt_path, best_path), reads, out_dir, quiet=not main_process)

# how many rows a forward has, and how many forwards a step
if batch_size == 'auto':
    knobs = config | {'init_from': ckpt_path if resumed else init_from, 'dtype': dtype, 'compile': compile}
    most = max(1, loader.n_windows // world_size)
    if total_batch_size:
        most = micro_batches(total_batch_size, 1, block_size, world_size)
    batch_size, how = rows_that_fit(knobs, most, total_batch_size > 0, device,
                                    os.path.join(out_dir, 'batch_size.json'), lambda n: int(least(n)))
    loader.batch_size = val_loader.batch_size = batch_size
    if main_process:
        print(f'batch_size: {batch_size} rows, {how}', flush=True)
accumulation = micro_batches(total_batch_size, batch_size, block_size, world_size)
total_batch_size = accumulation * batch_size * block_size * world_size

# -----------------------------------------------------------------------------
# the model, its optimizers, and what it learns from

torch.manual_seed(seed)
model = GPT(shape_of_student(gpt_config, source) if source else gpt_config)
if source:
    load_weights(model, source)
if train_only:
    assert hasattr(model, train_only), f"train_only={train_only} needs that head: give --{train_only}_n=4"
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(train_only))
# weights that quantize.py had rounded before keep the scales and steps that it chose
rounding = {'quant_bits': quant_bits, 'quant_group': quant_group, 'tables_bits': tables_bits}
grid = grid_in(source, rounding, ckpt_path if resumed else init_from) if quant_bits else {}
model = shard(model, device_type) if fsdp else model.to(device)
optimizers = make_optimizers(model, muon_lr, adam_lr, weight_decay, muon_steps)
for optimizer, state in zip(optimizers, resumed.get('optimizers', ())):
    load_optimizer(optimizer, state)            # its momenta; the rates are this run's knobs
averages = Averages(model, ema, resumed.get('ema', {}))

# the student itself, or a Distiller around it that adds the distance from its teachers to the losses
trained, labels = make_learner(model, teacher, loader, tokenizer, divergence=divergence, temperature=temperature,
                               dataset=dataset, device=device, dtype=dtype, fsdp=fsdp)
forward = compile_step(trained, batch_size * block_size, tokenizer.vocab_size) if compile else trained
if world_size > 1 and not fsdp:
    forward = DDP(forward, device_ids=[torch.device(device).index] if device_type == 'cuda' else None)
weight = {'ce': 1 - alpha if teacher else 1.0, 'kl': alpha, 'multi_token': multi_token_weight, 'draft': draft_weight}
if train_only:
    weight = dict.fromkeys(weight, 0.0) | {train_only: 1.0}
flops = trained.flops_per_token()               # what labels cost is in their meta.json
peak = peak_flops(device)

step, saved = resumed.get('step', 0), resumed.get('step')       # saved: the step that ckpt.pt holds
best = resumed.get('best', {'loss': math.inf})
seconds, val_loss_before = resumed.get('seconds', 0.0), resumed.get('val_loss_before')
started_from = None if config['init_from'] == 'scratch' else config['init_from']
for part in ('model', 'optimizers', 'ema'):
    source.pop(part, None)                      # frees their memory: they are in the model and the optimizers now

# -----------------------------------------------------------------------------
# what happens now and then

stopping = []               # what asked for the end of this run
on_stop(lambda signum, frame: stopping.append(signum))


def say(*words):
    """Prints, in the first process. If the pipe or terminal is closed, the training is saved and ends."""
    try:
        if main_process:
            print(*words, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        stopping.append('nobody reads')


def way_out():
    """What to do when losses or weights became infinite or NaN, in words."""
    again = 'nothing had been saved yet: start again'
    if saved is not None:
        again = f'{ckpt_path} still holds step {saved}: resume'
    return f'{again} with a lower muon_lr ({muon_lr}) or adam_lr ({adam_lr})'


def measure(step):
    """Loss on the whole validation split."""
    with eager(), autocast(device, dtype):
        result = evaluate(model, val_loader.eval_batches(rank, world_size), tokenizer.token_bytes)
    say(f"step {step}: validation loss {result['loss']:.4f} nats, {result['bpb']:.4f} bits per byte"
        f"{f' (weights rounded to int{quant_bits})' if step > qat_step or qat_step == 0 else ''}")
    return result


def validate(step, best):
    """Measures the loss, and writes best.pt if it is the lowest so far -> this result, and the best one."""
    with averages.in_place():
        result = measure(step)
        if result['loss'] < best['loss'] or train_only:     # with a frozen trunk the newest head counts as the best
            best = {**result, 'step': step}
            save_checkpoint(best_path, model, tokenizer.meta(), step=step, best=best, dataset=dataset,
                            data=loader.meta['sha256']['train.bin'], knobs=config, grid=grid)
    return result, best


def save(step):
    """Writes ckpt.pt, with all that a run needs to continue exactly from here."""
    save_checkpoint(ckpt_path, model, tokenizer.meta(), optimizers=[o.state_dict() for o in optimizers], step=step,
                    best=best, seconds=meter.seconds, val_loss_before=val_loss_before, dataset=dataset,
                    data=loader.meta['sha256']['train.bin'], total_batch_size=total_batch_size, knobs=config, grid=grid,
                    ema=averages.state(), fast_bf16=MEASURED.get('cpu'))


def show_sample(step):
    """Continues the validation split's first token, or answers the first question of chats."""
    asked = 1 if val_loader.mask is None else int(val_loader.mask.argmax())
    prompt = val_loader.tokens[:asked].tolist()
    # the sample ends early if the model draws a token that ends an answer or a text
    n, ends = min(sample_tokens, block_size - asked), tokenizer.ends
    with averages.in_place(), eager():
        ids, = Engine(model).complete([prompt], n, Sampling(0.8, seed=step), stop=sorted(ends))
    text = tokenizer.decode(prompt[1:] + [token for token in ids if token not in ends])
    say(f"----- sample at step {step} -----\n{text}\n-----")


def write_own_rows():
    """
    The frozen model writes own_samples of the rows of 64 batches. When a draft head is used, it continues texts that
    the model has written, so it should train on some.
    """
    n, cut = max(1, round(own_samples * batch_size)), max(1, block_size // 16)
    starts = [start for step in range(64) for start in loader.starts(step, rank, world_size)[:n]]
    prompts = loader.rows(starts)[0][:, :cut].tolist()
    say(f'the model writes {64 * n} rows of its own')
    with eager():
        written = Engine(model).complete(prompts, block_size + 1 - cut, Sampling(seed=seed))
    return torch.tensor([p + w for p, w in zip(prompts, written)], device=device)        # (64 n, block_size + 1)


def write_log(step, train_loss, factor, result):
    """Writes a row of log.csv, and to wandb if asked. result: what validate gave, or None."""
    row = {'step': step, 'tokens': step * total_batch_size, 'seconds': round(meter.seconds, 2),
           'train_loss': train_loss, 'lr_factor': factor, 'tok_s': round(meter.rate)}
    if result:
        row |= {'val_loss': result['loss'], 'val_bpb': result['bpb']}
    log.write(row)
    if wandb_log:
        wandb.log(row, step=step)


def print_step(step, means, factor):
    left = int(meter.typical * (max_iters - step))
    losses = ' + '.join(f'{k} {v:.4f}' if len(means) > 1 else f'{v:.4f}' for k, v in means.items())
    used = f'MFU {100 * flops * meter.rate / (peak * world_size):.0f} % | ' if peak and not train_only else ''
    say(f"step {step}/{max_iters} | loss {losses} | lr x{factor:.3f} | {1000 * meter.typical:.0f} ms | "
        f"{meter.rate:,.0f} tok/s | {used}ETA {left // 60}:{left % 60:02d}")

# -----------------------------------------------------------------------------
# the loop

def every(interval, step):
    return interval > 0 and step % interval == 0


def batch(step, micro):
    """-> x and y (B, T) int64, y being x shifted by one, with -1 where nothing is learnt; and labels (B, T, ...)."""
    # processes take turns at the step's micro-batches, so that what is learnt does not depend on how many there are
    number = step, micro * world_size + rank, accumulation * world_size
    x, y = loader.batch(*number)
    soft = labels.batch(loader.starts(*number), block_size) if labels else ()
    if own_samples:
        n = len(own_rows) // 64
        mine = own_rows[(step * accumulation + micro) % 64 * n:][:n]
        x[:n], y[:n] = mine[:, :-1], mine[:, 1:]
    return x, y, *soft


def counts_of(step):
    """
    The mean number of targets of a micro-batch, over the whole step and all processes. Every micro-batch divides its
    losses by this, so that the gradient does not depend on how the step is cut into micro-batches. None for plain text,
    of which all micro-batches have equally many.
    """
    if loader.mask is None:
        return None
    each = [model.target_counts(batch(step, micro)[1]) for micro in range(accumulation)]
    counts = {name: torch.stack([count[name] for count in each]).float().mean(dim=0) for name in each[0]}
    if world_size > 1:
        for count in counts.values():
            dist.all_reduce(count)
            count /= world_size
    return counts


def only_here(micro):
    """A context in which DDP does not exchange gradients: it does so at the last micro-batch only."""
    waits = isinstance(forward, DDP) and micro < accumulation - 1
    return forward.no_sync() if waits else contextlib.nullcontext()


n_params = model.params()
say(f"model: {n_params['total']:,} parameters "
    f"({', '.join(f'{k} {v:,}' for k, v in n_params.items() if v and k != 'total')})")
say(f"machine: {device}, {dtype}, compile={compile}, {world_size} process{'es' if world_size > 1 else ''}, "
    f"{torch.get_num_threads()} threads")
say(f"data: {dataset}, {loader.n_tokens:,} training and {val_loader.n_tokens:,} validation tokens, "
    f"vocabulary {tokenizer.vocab_size}; a step is {total_batch_size:,} tokens, "
    f"the run {max_iters * total_batch_size / loader.n_tokens:.1f} epochs")

if main_process:
    log = Log(os.path.join(out_dir, 'log.csv'), until=step if resumed else None)
if wandb_log and main_process:
    wandb.init(project=wandb_project, name=os.path.basename(out_dir), config=config)
qat_step = math.ceil(qat_start * max_iters) if quant_bits else math.inf     # where the rounding begins
round_from_now = functools.partial(prepare, model, quant_bits, quant_group, tables_bits,
                                   {name: t.to(device) for name, t in grid.items()})
if qat_step == 0:
    round_from_now()
# written with the weights of step 0, which are frozen, so that a resumed run gets the same rows
own_rows = write_own_rows() if own_samples else None
if 0 < qat_step <= step:
    round_from_now()
if step >= qat_step and step < max_iters and best.get('step', 0) <= qat_step:
    best = {'loss': math.inf}   # the best so far was not rounded yet: max_iters was lowered, which moved qat_step
began, result = time.perf_counter(), {'loss': None, 'bpb': None}
if source and not resumed and eval_interval > 0:
    val_loss_before = measure(0)['loss']        # before fine-tuning
meter = Meter(step, seconds, total_batch_size, device)
model.train()

while step < max_iters:
    if step == qat_step:
        round_from_now()
        best = {'loss': math.inf}               # from here on, losses are those of rounded weights
    torch.manual_seed(hash((seed, step, rank)))  # dropout is a function of the step: there is no random state to save
    # the rates' factor: linear warm-up, level, linear to zero over the last decay_frac
    factor = min((step + 1) / max(1, warmup_iters), 1.0, (max_iters - step) / max(1, decay_frac * max_iters))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = group['peak_lr'] * factor

    counts = counts_of(step)
    for micro in range(accumulation):
        with only_here(micro), autocast(device, dtype):
            losses = forward(*batch(step, micro), counts=counts)                 # {'ce': nats per token, ...}
            loss = sum(weight[name] * value for name, value in losses.items()) / accumulation
            loss.backward()
        meter.add(step, losses)
    update(model, optimizers, grad_clip)
    step += 1
    averages.update(step)

    # this step is done; the rest of the loop logs, measures and saves
    last = step == max_iters
    stop_now = last or least(not stopping) == 0     # all processes must stop after the same step
    log_now = every(log_interval, step) or stop_now
    eval_now = every(eval_interval, step) or last and eval_interval >= 0    # not after SIGTERM, which is urgent
    save_now = every(save_interval, step) or stop_now and save_interval >= 0
    sample_now = every(sample_interval, step)
    pause = log_now or eval_now or save_now or sample_now or not meter.recent       # the first step compiles
    if log_now or eval_now or save_now:
        means = meter.read_losses(way_out(), model if eval_now or save_now else None)
    if pause:
        meter.tick(step)
    if log_now:
        print_step(step, means, factor)
    if eval_now:
        result, best = validate(step, best)
    if main_process and (log_now or eval_now):
        write_log(step, means['ce'], factor, result if eval_now else None)
    if save_now:
        save(step)
        saved = step
    if sample_now:
        show_sample(step)
    if stop_now and not last:
        say(f"stopped at step {step}" + f"; saved {ckpt_path}: go on with --init_from=resume" * save_now)
        break
    if eval_now or sample_now:
        model.train()                           # these leave it in eval mode
    if pause:
        meter.restart()

# -----------------------------------------------------------------------------
# the end

if step >= max_iters and result['loss'] is None and eval_interval >= 0:     # a finished run was resumed
    result, best = validate(step, best)
document = {'out_dir': out_dir, 'iters': step, 'tokens': step * total_batch_size,
            'seconds': round(meter.seconds, 2), 'wall_seconds': round(time.perf_counter() - began, 2),
            'tok_s': round(meter.rate), 'batch_size': batch_size, 'params': n_params['total'],
            'flops': None if train_only else flops * step * total_batch_size,
            'val_loss': result['loss'], 'val_bpb': result['bpb'],
            'best_val_loss': best['loss'] if 'step' in best else None, 'best_step': best.get('step'),
            'val_loss_before': val_loss_before}
if main_process and step >= max_iters and os.path.exists(best_path):
    record(best_path, document, reads, started_from, teacher if labels else None)
say(json_line(document))
if world_size > 1:
    dist.barrier()
    dist.destroy_process_group()
    if wandb_log and main_process:
        wandb.finish()
    # end without Python's own clean-up, during which a gloo thread that frees its last tensor would abort the process
    atexit.register(os._exit, 0)
