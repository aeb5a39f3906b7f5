# In training, the head also predicts the next token from the outputs of layers 1 to 3 (of 4).
out_dir = "out-ablation/aux_heads"
aux_heads = "1,2,3"
