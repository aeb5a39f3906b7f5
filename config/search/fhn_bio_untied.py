# Waves, oscillators, an output embedding of its own.
out_dir = "out-search/fhn_bio_untied"
attn_mode = "fhn"
use_bio_mlp = True
bio_threshold = 0.0
tie_weights = False
