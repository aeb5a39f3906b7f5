# Four residual streams, mixed without constraints.
out_dir = "out-ablation/hc"
use_mhc = True
hc_mode = "hc"
