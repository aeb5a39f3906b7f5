# Two dendritic compartments whose strength the token mixer's output sets at each token, and no events.
out_dir = "out-ablation/bio_attention"
use_bio_mlp = True
bio_compartments = 2
bio_dendrite_dim = 128
bio_lateral = "nonlinear"
bio_attention_gain = True
bio_threshold = 0.0
