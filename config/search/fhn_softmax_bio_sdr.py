# fhn_softmax_bio on a few sparse bits, with the delta rule's memory.
out_dir = "out-search/fhn_softmax_bio_sdr"
attn_pattern = "fhn,fhn,softmax,fhn"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
use_sdr = True
sdr_rule = "delta"
sdr_size = 128
sdr_active = 12
sdr_scales = 0
sdr_radius = 0
sdr_value_dim = 48
