# Over config/train_shakespeare_char.py: 1000 steps, eager, for many short runs on one GPU.
# python -m lab.ablate ROWS --recipe=config/train_shakespeare_char.py,config/char_1000.py --out_dir=out-char
max_iters = 1000
lr_decay_iters = 1000
eval_interval = 100
eval_iters = 20
eval_full = True
compile = False
