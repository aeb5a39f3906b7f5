# The output embedding is not the token embedding: V n_embd more parameters.
out_dir = "out-ablation/untied"
tie_weights = False
