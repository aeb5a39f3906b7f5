# GPT-2 124M on OpenWebText, half a million tokens per step.
# python data/openwebtext/prepare.py
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
out_dir = "out-gpt2"
dataset = "openwebtext"
vocab_size = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
bias = False
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
learning_rate = 6e-4
max_iters = 600_000
warmup_iters = 2000
weight_decay = 0.1
eval_interval = 1000
eval_iters = 200
log_interval = 10
wandb_project = "owt"
wandb_run_name = "gpt2-124M"
