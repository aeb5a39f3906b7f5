# Linear waves twice, attention; oscillators of three times the frequency; three layers of 148.
out_dir = "out-search/linear_ffs_omega3"
attn_pattern = "fhn,fhn,softmax"
fhn_dynamics = "linear"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
n_layer = 3
n_embd = 148
n_head = 2
bio_omega = 3.0
