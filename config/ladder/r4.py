# Rung r4 of the ladder, on a GPU: 6 x 256, 4,784,896 parameters in products, 20 bytes of text for each.
# Drama is read 22 times, code 2.7 times.
# A modern block: python train.py config/presets/modern.py config/ladder/r4.py
out_dir = "out-r4"
dataset = "drama"
n_layer, n_head, n_embd, block_size = 6, 8, 256, 128
bias, dropout = False, 0.0
batch_size, gradient_accumulation_steps = 128, 1
_parameters = 12 * n_layer * n_embd**2 + 259 * n_embd  # blocks and head
_steps = 20 * _parameters // (batch_size * block_size)
lr_schedule, wsds_horizons = "wsds", 3  # losses at 5, 10 and 20 bytes per parameter
max_iters = lr_decay_iters = round(1.075 * _steps)  # 7.5 %: the first two decays, which are left again
warmup_iters = _steps // 40
learning_rate, min_lr = 2e-3, 0.0
beta2 = 0.95 if optimizer == "muon" else 0.99
eval_interval, eval_iters, eval_full, sample_interval, log_interval = max_iters, 20, True, 0, 10
device, compile = "auto", None
