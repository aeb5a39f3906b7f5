# Two compartments that are not coupled.
out_dir = "out-ablation/bio_no_lateral"
use_bio_mlp = True
bio_compartments = 2
bio_dendrite_dim = 128
bio_lateral = "none"
bio_threshold = 0.0
