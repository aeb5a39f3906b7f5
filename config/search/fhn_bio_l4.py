# Waves, oscillators, and the auto-encoder's losses.
out_dir = "out-search/fhn_bio_l4"
attn_mode = "fhn"
use_bio_mlp = True
bio_threshold = 0.0
add_l4_losses = True
