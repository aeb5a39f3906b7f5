# Sparse tokens whose memory's recall is added after the blocks, before the head.
out_dir = "out-ablation/sdr_at_head"
use_sdr = True
engram_at = "head"
