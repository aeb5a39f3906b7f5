# A vector per token id is added to the values of every other layer.
out_dir = "out-ablation/value_embeds"
value_embeds = True
