# The "baby GPT" on the characters of Shakespeare: 10.6M parameters, minutes on one GPU.
# python train.py config/train_shakespeare_char.py
out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
bias = False
dropout = 0.2
batch_size = 64
gradient_accumulation_steps = 1
learning_rate = 1e-3
beta2 = 0.99
max_iters = 5000
warmup_iters = 100
eval_interval = 250
log_interval = 10
always_save_checkpoint = False  # it overfits: only better checkpoints are worth keeping
