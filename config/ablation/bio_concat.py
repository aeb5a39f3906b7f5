# Two compartments as published: a linear coupling, which adds parameters and no power.
out_dir = "out-ablation/bio_concat"
use_bio_mlp = True
bio_compartments = 2
bio_dendrite_dim = 128
bio_threshold = 0.0
