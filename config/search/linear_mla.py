# Linear waves, attention third; oscillators; each block's output a sum of all so far.
out_dir = "out-search/linear_mla"
attn_pattern = "fhn,fhn,softmax,fhn"
fhn_dynamics = "linear"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
use_mla = True
