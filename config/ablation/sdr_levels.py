# Sparse tokens with two codes of longer contexts above the token's own.
out_dir = "out-ablation/sdr_levels"
use_sdr = True
sdr_levels = 3
