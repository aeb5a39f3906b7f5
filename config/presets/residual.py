# Four residual streams, mixed by doubly stochastic matrices.
base("config/train_shakespeare_char_cpu.py", sample_interval=500, init_from="auto")  # what it trains on by itself
out_dir = "out-residual"
use_mhc = True
