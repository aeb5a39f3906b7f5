# Sigmoid attention: weights that need not sum to 1.
out_dir = "out-ablation/sigmoid"
attn_mode = "sigmoid"
