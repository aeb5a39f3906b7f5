# The plain twin of wigglegpt_8gb.py and wigglegpt_v2_8gb.py: the same shape and recipe, no idea in it.
# python train.py config/presets/wigglegpt_8gb_baseline.py
base(
    "config/train_gpt2.py", sample_interval=500, init_from="auto", batch_size=2, gradient_accumulation_steps=16,
    max_iters=200_000, dtype="float16", compile=False,
)  # fmt: skip
out_dir = "out-wigglegpt-8gb-baseline"
n_layer, n_head, n_embd, block_size = 4, 6, 384, 1024
