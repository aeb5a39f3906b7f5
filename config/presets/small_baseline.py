# The plain twin of small.py: the same shape and recipe, no idea in it.
# python train.py config/presets/small_baseline.py
base("config/train_gpt2.py", sample_interval=500, init_from="auto")
out_dir = "out-small-baseline"
n_layer, n_head, n_embd, block_size = 12, 12, 768, 1024
