# Four dendritic compartments, each coupled to itself and its two neighbours on a ring.
out_dir = "out-ablation/bio_ring"
use_bio_mlp = True
bio_compartments = 4
bio_dendrite_dim = 128
bio_lateral = "nonlinear"
bio_connectivity = "ring"
bio_threshold = 0.0
