# Four dendritic compartments that are coupled each to itself alone: units as in bio_dendrites_4, no connections.
out_dir = "out-ablation/bio_self"
use_bio_mlp = True
bio_compartments = 4
bio_dendrite_dim = 128
bio_lateral = "nonlinear"
bio_connectivity = "none"
bio_threshold = 0.0
