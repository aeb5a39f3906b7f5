# Four dendritic compartments of n_embd units, coupled through a tanh, and no events.
out_dir = "out-ablation/bio_dendrites_4"
use_bio_mlp = True
bio_compartments = 4
bio_dendrite_dim = 128
bio_lateral = "nonlinear"
bio_threshold = 0.0
