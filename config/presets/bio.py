# Oscillators on two dendrites of n_embd units, and sparse events: each feature is silent for about half of the tokens.
base("config/train_shakespeare_char_cpu.py", sample_interval=500, init_from="auto")  # what it trains on by itself
out_dir = "out-bio"
use_bio_mlp = True
bio_compartments = 2
bio_dendrite_dim = 128
bio_lateral = "nonlinear"
bio_gate = "diag"
bio_adaptive_threshold = True
