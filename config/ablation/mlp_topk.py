# 64 of 512 hidden units may speak.
out_dir = "out-ablation/mlp_topk"
mlp_topk = 64
