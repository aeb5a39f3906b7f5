# The plain twin of localgpt.py: the same shape and recipe, no idea in it.
# python train.py config/presets/localgpt_baseline.py
base("config/train_shakespeare_char.py", sample_interval=500, init_from="auto")
out_dir = "out-localgpt-baseline"
n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
dropout = 0.2
bias = False
tie_weights = False
