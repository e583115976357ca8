# Ways to learn from a teacher, side by side: the student of distill_stdlib_bpe.py, 400 steps (1.6M tokens) each, with
# the same seed, batches and rates.
#     python bench.py --mode=ladder config/ladder_distill.py
# Labels are the teacher's, written once. "Beside" means that the teacher runs along, which costs more than the student.
# 2 CPU cores: an hour without the teacher's training (estimated, not run yet).
mode = 'ladder'
ladder = 'out-ladder-distill/ladder.json'
timed = 'none'
_train = 'python train.py config/distill_stdlib_bpe.py --max_iters=400'
_beside = f'{_train} --teacher=out-stdlib-bpe'
rungs = f'''
                               | python data/stdlib_bpe/prepare.py
teacher                        | python train.py config/train_stdlib_bpe.py
                               | python distill.py --teacher=out-stdlib-bpe --out_dir=labels-stdlib-bpe
                               | python distill.py --teacher=out-stdlib-bpe --out_dir=labels-stdlib-bpe-top --method=topk
control: the text alone        | {_train} --teacher= --out_dir=out-ways-control
12 sampled labels              | {_train} --teacher=labels-stdlib-bpe --out_dir=out-ways-sampled
12 most probable labels        | {_train} --teacher=labels-stdlib-bpe-top --out_dir=out-ways-top
sampled, no text (alpha 1)     | {_train} --teacher=labels-stdlib-bpe --alpha=1 --out_dir=out-ways-alpha1
beside, forward KL             | {_beside} --out_dir=out-ways-kl
beside, temperature 2          | {_beside} --temperature=2 --out_dir=out-ways-t2
beside, temperature 4          | {_beside} --temperature=4 --out_dir=out-ways-t4
beside, reverse KL             | {_beside} --divergence=reverse_kl --out_dir=out-ways-reverse
beside, Jensen-Shannon         | {_beside} --divergence=jsd --out_dir=out-ways-jsd
                               | python prune.py --out_dir=out-stdlib-bpe --neuron_prune_ratio=0.8412 --head_prune_ratio=0.6667 --kv_heads=1 --channel_prune_ratio=0.6667 --save_dir=out-eighth-stdlib-bpe
sampled, from pruned weights   | {_train} --init_from=out-eighth-stdlib-bpe/best.pt --teacher=labels-stdlib-bpe --out_dir=out-ways-from-pruned
'''
