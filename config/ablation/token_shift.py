# A gated copy of the previous token is added to each embedding (smear).
out_dir = "out-ablation/token_shift"
token_shift = True
