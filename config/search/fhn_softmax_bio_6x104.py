# Two times waves, waves, attention with RoPE; oscillators; deeper and narrower.
out_dir = "out-search/fhn_softmax_bio_6x104"
attn_pattern = "fhn,fhn,softmax"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
n_layer = 6
n_embd = 104
n_head = 4
