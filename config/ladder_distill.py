# Ways to learn from a teacher, side by side: the student of distill_stdlib_bpe.py, 300 steps (1.2M tokens) each, with
# the same batches and rates.
#     python bench.py --mode=ladder config/ladder_distill.py
# Labels are the teachers', written once. "Beside" means that the teacher runs along, which costs more than the student.
# 2 CPU cores: some three and a half hours as one process of one thread, of which the second teacher and its labels take one and a half.
mode = 'ladder'
ladder = 'out-ladder-distill/ladder.json'
record = 'config/ladder_distill.json'
seeds = '1337,1338,1339'        # of the rows that are set against others
timed = 'none'
_train = 'python train.py config/distill_stdlib_bpe.py --max_iters=300'
_labels = f'{_train} --seed={{seed}} --teacher=labels-stdlib-bpe'
_beside = f'{_train} --teacher=out-stdlib-bpe'
_write = 'python distill.py --teacher=out-stdlib-bpe'
rungs = f'''
                               | python data/stdlib_bpe/prepare.py
teacher                        | python train.py config/train_stdlib_bpe.py
                               | {_write} --out_dir=labels-stdlib-bpe
control: the text alone        | {_train} --seed={{seed}} --teacher= --out_dir=out-ways-control-{{seed}}
12 sampled labels              | {_labels} --out_dir=out-ways-sampled-{{seed}}
sampled, no text (alpha 1)     | {_train} --teacher=labels-stdlib-bpe --alpha=1 --out_dir=out-ways-alpha1
beside, forward KL             | {_beside} --out_dir=out-ways-kl
beside, temperature 2          | {_beside} --temperature=2 --out_dir=out-ways-t2
beside, temperature 4          | {_beside} --temperature=4 --out_dir=out-ways-t4
beside, reverse KL             | {_beside} --divergence=reverse_kl --out_dir=out-ways-reverse
beside, Jensen-Shannon         | {_beside} --divergence=jsd --out_dir=out-ways-jsd
                               | python prune.py --out_dir=out-stdlib-bpe --neuron_prune_ratio=0.8412 --head_prune_ratio=0.6667 --kv_heads=1 --channel_prune_ratio=0.6667 --save_dir=out-eighth-stdlib-bpe
sampled, from pruned weights   | {_labels} --init_from=out-eighth-stdlib-bpe/best.pt --out_dir=out-ways-from-pruned-{{seed}}
                               | {_write} --out_dir=labels-stdlib-bpe-top --method=topk
12 most probable labels        | {_train} --seed={{seed}} --teacher=labels-stdlib-bpe-top --out_dir=out-ways-top-{{seed}}
a second teacher, half as long | python train.py config/train_stdlib_bpe.py --seed=1 --max_iters=700 --out_dir=out-stdlib-bpe-2
                               | {_write}+out-stdlib-bpe-2 --out_dir=labels-stdlib-bpe-two
sampled from both              | {_train} --seed={{seed}} --teacher=labels-stdlib-bpe-two --out_dir=out-ways-two-{{seed}}
'''
