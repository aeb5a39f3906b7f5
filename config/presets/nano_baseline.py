# The plain twin of nano.py: the same shape and recipe, no idea in it.
# python train.py config/presets/nano_baseline.py
base(
    "config/train_shakespeare_char.py", sample_interval=100, init_from="auto", batch_size=4, max_iters=300,
    eval_interval=100, eval_iters=10, dropout=0.0, always_save_checkpoint=True,
)  # fmt: skip
out_dir = "out-nano-baseline"
n_layer, n_head, n_embd, block_size = 4, 4, 128, 256
