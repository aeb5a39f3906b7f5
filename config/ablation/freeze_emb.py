# Embeddings stay as they were drawn.
out_dir = "out-ablation/freeze_emb"
freeze_emb = True
tie_weights = False
