# The layers below the last predict the next token too, in training, each through an output matrix of its own.
out_dir = "out-ablation/aux_heads_own"
aux_heads = "1,2,3"
aux_heads_own = True
