# Tokens as points of the coset E7(7)/SU(8), with spectral coordinates in queries and keys.
base("config/train_shakespeare_char_cpu.py", sample_interval=500, init_from="auto")  # what it trains on by itself
out_dir = "out-manifold"
use_manifold = True
manifold = "e7"
