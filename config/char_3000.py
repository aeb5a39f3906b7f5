# Over config/train_shakespeare_char.py: 3000 steps, eager, for many short runs on one GPU.
# python ablate.py ROWS --recipe=config/train_shakespeare_char.py,config/char_3000.py --out_dir=out-char
max_iters = 3000
lr_decay_iters = 3000
eval_iters = 20
eval_full = True
compile = False
