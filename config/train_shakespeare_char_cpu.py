# The CPU recipe of nanoGPT's README: a 0.8M-parameter character model, 2000 steps.
# python train.py config/train_shakespeare_char_cpu.py
out_dir = "out-shakespeare-char-cpu"
dataset = "shakespeare_char"
n_layer, n_head, n_embd, block_size = 4, 4, 128, 64
bias = False
dropout = 0.0
batch_size = 12
gradient_accumulation_steps = 1
learning_rate = 1e-3
beta2 = 0.99
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
warmup_iters = 100
eval_interval = 250
eval_iters = 20
eval_full = True  # the val split is small enough to read it whole
log_interval = 10
device = "cpu"
compile = False
