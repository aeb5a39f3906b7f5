# All parts of a plain modern block on the recipe: the control that has no idea in it.
out_dir = "out-ablation/modern"
norm = "rms"
qk_norm = True
pos_embedding = "rope"
mlp_act = "relu2"
emb_norm = True
zero_init_proj = True
init_gain = 0.6
logit_softcap = 15.0
tie_weights = False
