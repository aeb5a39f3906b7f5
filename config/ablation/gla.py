# Gated linear attention in every layer.
out_dir = "out-ablation/gla"
attn_mode = "gla"
