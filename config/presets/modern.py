# A plain modern block, with no idea in it: what ideas are judged on besides nanoGPT's own (rung M1).
# python train.py config/train_shakespeare_char_cpu.py config/presets/modern.py
base("config/train_shakespeare_char_cpu.py", sample_interval=500, init_from="auto")  # what it trains on by itself
out_dir = "out-modern"
norm = "rms"
qk_norm = True
pos_embedding = "rope"
mlp_act = "relu2"
emb_norm = True
zero_init_proj = True
init_gain = 0.6
logit_softcap = 15.0
tie_weights = False
bias = False
learning_rate, min_lr = 2e-3, 3e-4  # 1.3e-3 and 3e-3 are worse
