# Sparse events with a cheap gate, each feature's threshold steered so that it is silent for half of the tokens.
out_dir = "out-ablation/bio_adaptive"
use_bio_mlp = True
bio_gate = "diag"
bio_adaptive_threshold = True
