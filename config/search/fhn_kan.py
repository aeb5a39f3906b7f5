# Waves and wavelets.
out_dir = "out-search/fhn_kan"
attn_mode = "fhn"
use_kan = True
