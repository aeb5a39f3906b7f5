# The plain twin of medium.py: the same shape and recipe, no idea in it.
# python train.py config/presets/medium_baseline.py
base("config/train_gpt2.py", sample_interval=500, init_from="auto", batch_size=6, gradient_accumulation_steps=80)
out_dir = "out-medium-baseline"
n_layer, n_head, n_embd, block_size = 24, 16, 1024, 1024
