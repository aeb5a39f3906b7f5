# fhn_softmax_bio with two small dendrites of 64 units before the oscillators.
out_dir = "out-search/fhn_softmax_bio_dendrites"
attn_pattern = "fhn,fhn,softmax,fhn"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
bio_compartments = 2
bio_dendrite_dim = 64
bio_lateral = "none"
