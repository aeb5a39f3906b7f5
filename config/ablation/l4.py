# An auto-encoder of hidden states that also predicts the token after next, as an auxiliary loss.
out_dir = "out-ablation/l4"
add_l4_losses = True
