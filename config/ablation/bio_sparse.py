# Four dendritic compartments, each with the two couplings that training made the strongest.
out_dir = "out-ablation/bio_sparse"
use_bio_mlp = True
bio_compartments = 4
bio_dendrite_dim = 128
bio_lateral = "nonlinear"
bio_connectivity = "sparse"
bio_threshold = 0.0
