# Sparse tokens whose memory corrects its errors.
out_dir = "out-ablation/sdr_delta"
use_sdr = True
sdr_rule = "delta"
