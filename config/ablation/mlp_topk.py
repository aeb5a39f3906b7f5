# The 64 largest of 512 hidden units stay, the others are set to 0.
out_dir = "out-ablation/mlp_topk"
mlp_topk = 64
