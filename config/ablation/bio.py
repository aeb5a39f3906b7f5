# Oscillators in place of GELU, nothing else of BioMLP: the parameters of the plain MLP and 12 n_embd more per layer.
out_dir = "out-ablation/bio"
use_bio_mlp = True
bio_threshold = 0.0
