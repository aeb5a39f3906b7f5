# linear_softmax, oscillators of twice the frequency.
out_dir = "out-search/linear_softmax_omega2"
attn_pattern = "fhn,fhn,softmax,fhn"
fhn_dynamics = "linear"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
bio_omega = 2.0
