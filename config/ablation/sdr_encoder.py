# Sparse tokens alone: no map, no context, no memory.
out_dir = "out-ablation/sdr_encoder"
use_sdr = True
sdr_radius = 0
sdr_scales = 0
sdr_rule = "none"
