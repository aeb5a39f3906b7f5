# RMSNorm after the embedding.
out_dir = "out-ablation/emb_norm"
emb_norm = True
