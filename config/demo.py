# `make demo`: about two minutes on a CPU, and the text has words in it.
dataset = "shakespeare_char"
n_layer, n_head, n_embd, block_size = 4, 4, 192, 128
bias = False
batch_size = 16
gradient_accumulation_steps = 1
learning_rate = 3e-3
beta2 = 0.99
max_iters = 1000
warmup_iters = 50
eval_interval = 250
eval_iters = 20
log_interval = 50
compile = False
