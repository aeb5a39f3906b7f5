# Linear waves, the third layer attention with RoPE; oscillators.
out_dir = "out-search/linear_softmax"
attn_pattern = "fhn,fhn,softmax,fhn"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
fhn_dynamics = "linear"
