# 64 of 128 channels survive a block.
out_dir = "out-ablation/resid_topk"
resid_topk = 64
