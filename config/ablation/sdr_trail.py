# Sparse tokens whose memory follows a trail of three recalls, each from the word that the last one brought.
out_dir = "out-ablation/sdr_trail"
use_sdr = True
sdr_trail = 3
