# Sparse events with a cheap gate and a fast Hebbian weight per unit, which decays along the tokens.
out_dir = "out-ablation/bio_plastic"
use_bio_mlp = True
bio_gate = "diag"
bio_plasticity = True
