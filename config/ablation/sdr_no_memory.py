# Sparse tokens, map and context, no memory.
out_dir = "out-ablation/sdr_no_memory"
use_sdr = True
sdr_rule = "none"
