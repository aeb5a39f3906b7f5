# After each block groups of 7 channels go to the nearest E7 point; 126 channels.
out_dir = "out-ablation/vq_lattice"
vq_lattice = "e7"
n_embd, n_head = 126, 3
