# Oscillators of twice the published frequency in place of GELU, nothing else of BioMLP.
out_dir = "out-ablation/bio_omega_2"
use_bio_mlp = True
bio_threshold = 0.0
bio_omega = 2.0
