# Linear waves, attention, attention; oscillators of three times the frequency; shallower and wider.
out_dir = "out-search/linear_3x148_omega3"
attn_pattern = "fhn,softmax,softmax"
fhn_dynamics = "linear"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
n_layer = 3
n_embd = 148
n_head = 2
bio_omega = 3.0
