# Muon for the matrices in blocks, on nanoGPT's block.
out_dir = "out-ablation/muon"
optimizer = "muon"
