# The plain twin of shakespeare_char.py, neuromanifold_kaufmann.py and cortex.py: same shape and recipe, no idea in it.
# python train.py config/presets/shakespeare_char_baseline.py
base("config/train_shakespeare_char.py", sample_interval=500, init_from="auto")
out_dir = "out-shakespeare-char-baseline"
n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
